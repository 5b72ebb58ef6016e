"""How a detector is trained, as the command line says it. Nothing heavy is imported here."""

from dataclasses import dataclass

__all__ = ["AMP_TYPES", "MULTI_SCALE", "SCHEDULES", "TrainingOptions"]

AMP_TYPES = ("auto", "bfloat16", "float16")
MULTI_SCALE = "2x-ms"
SCHEDULES = {"1x": 12, MULTI_SCALE: 24}  # epochs


@dataclass(frozen=True)
class TrainingOptions:
    """What `train-student` and `train-teacher` are told; what is None is the config's, or kdpipe's.

    Attributes:
        recipe: `config`: optimiser, schedule, epochs and mixed precision are the config's, where it sets them and no
            option says otherwise; `paper` or None: they are the paper's.
        epochs: Passes over the training images.
        schedule: One of `SCHEDULES`: its number of epochs, with kdpipe's warm-up and cosine.
        batch_size: Images per step and process.
        lr: Peak learning rate.
        seed: Seed of everything random.
        scale: `(w, h)` of mmdet's Resize.
        amp: Mixed precision: one of `AMP_TYPES`, of which `auto` is bfloat16, or float16 on a GPU without it; None is
            full precision.
        workers: Loader workers.
        overrides: `KEY=VALUE` of the config, applied last.
        strict_data: Refuse data of which some would be left out.
        skip_bad_images: Leave out images that cannot be read or are not as annotated.
    """

    recipe: str | None = None
    epochs: int | None = None
    schedule: str | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    scale: tuple[int, int] | None = None
    amp: str | None = None
    workers: int | None = None
    overrides: tuple[str, ...] = ()
    strict_data: bool = False
    skip_bad_images: bool = False
