"""How a detector is trained, as the command line says it. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """What `train-student` and `train-teacher` are told; what is None is the config's, or kdpipe's.

    Attributes:
        source: `paper`, or `config`: whose optimiser, schedule, epochs and mixed precision it is.
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        lr: Peak learning rate.
        seed: Seed of everything random.
        scale: `(w, h)` of mmdet's Resize.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint there.
        amp: Mixed precision.
        workers: Loader workers.
        options: `KEY=VALUE` overrides of the config.
        strict_data: Refuse data of which some would be left out.
        skip_bad_images: Leave out images that cannot be read or are not as annotated.
    """

    source: str = "paper"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    scale: tuple[int, int] | None = None
    work_dir: Path | None = None
    resume: bool = False
    amp: bool = False
    workers: int | None = None
    options: tuple[str, ...] = ()
    strict_data: bool = False
    skip_bad_images: bool = False
