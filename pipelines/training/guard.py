"""Stops a training of no more use: a loss that is not finite, or always 0. Says which one collapsed or dominates."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from rich.console import Console

from kdpipe.distill.methods import loss_name
from kdpipe.pipelines.training.runner import RunnerError
from kdpipe.pipelines.training.schedule import WARMUP_STEPS

__all__ = ["CollapseHook", "FiniteHook", "SharesHook", "UsefulLossesHook"]

_PATIENCE = 100  # steps within which a loss has to say something
_SPREAD = 0.9  # mean cosine above which boxes are hardly told apart
_SHARE, _DOMINATES = "share_", 0.5  # what is logged of a loss's gradient, and the part of one that has the last word
_DENSE_PATIENCE = 1000  # the boxes of an untrained dense student may meet no object for long


class FiniteHook(Hook):  # type: ignore[misc]
    """Ends the training at the first loss that is not finite, and before weights that are not finite are saved."""

    priority = "VERY_HIGH"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        values = _numbers({name: value for name, value in (outputs or {}).items() if "loss" in name})
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            parts = {name: value for name, value in wrong.items() if name != "loss"} or wrong
            losses = ", ".join(f"{name} is {value}" for name, value in parts.items())
            images = ", ".join(str(sample.get("img_id", "?")) for sample in data_batch["data_samples"])
            raise RunnerError(f"At step {runner.iter + 1}, {losses} (images {images}). {_remedy(runner)}")

    def after_train_epoch(self, runner: Any) -> None:
        for name, value in _bare(runner).state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise RunnerError(
                    f"After step {runner.iter}, the weights {name} are not finite any more: the gradients were too "
                    f"large. {_remedy(runner)}"
                )


class UsefulLossesHook(Hook):  # type: ignore[misc]
    """Ends the training when a distillation loss that was asked for has been exactly 0 from the beginning.

    Looks once, after 100 steps or the first epoch, at what all processes saw; a weight of 0 is taken as meant. A dense
    student has 1,000 steps, and a training that is shorter than these ends with a warning.

    Args:
        console: Where the warning is shown; it is in the log, too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps, self._patience = 0, _PATIENCE
        self._silent: set[str] | None = None
        self._counts: dict[str, int] = {}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._silent is None:
            weights = getattr(_bare(runner), "weights", {})
            self._silent = {loss_name(loss) for loss, weight in weights.items() if weight}
            self._patience = _DENSE_PATIENCE if getattr(_bare(runner), "dense", False) else _PATIENCE
        if self._steps >= self._patience or not outputs:
            return
        self._steps += 1
        self._silent = {name for name, value in _numbers({n: outputs[n] for n in self._silent}).items() if value == 0}
        for name in ("positive", "negative", "unpaired", "exact", "mirrored", "skipped"):
            self._counts[name] = self._counts.get(name, 0) + int(outputs.get(f"kd_{name}", 0))
        if self._steps == self._patience and self._is_silent_everywhere():
            raise RunnerError(self._report())

    def after_train_epoch(self, runner: Any) -> None:
        if self._patience == _PATIENCE and self._steps < _PATIENCE:
            self._steps = _PATIENCE
            if self._is_silent_everywhere():
                raise RunnerError(self._report())

    def after_train(self, runner: Any) -> None:
        if self._steps < self._patience and self._is_silent_everywhere():
            _warn(self._report(), runner, self._console)

    def _is_silent_everywhere(self) -> bool:
        """Whether a loss was 0 in all processes, with whose counts it is reported. All of them ask this at one step."""
        of_all = all_gather_object((self._silent or set(), self._counts))
        self._silent = set.intersection(*(silent for silent, _ in of_all))
        self._counts = {name: sum(counts.get(name, 0) for _, counts in of_all) for name in self._counts}
        return bool(self._silent)

    def _report(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self._counts.items())
        return (
            f"{', '.join(sorted(self._silent or ()))} was 0 in every step so far: nothing is learned from it. RoIs, "
            f"and views of the images seen: {counts}. Without positive RoIs there is nothing for sgfi and reg, without "
            "paired ones nothing for ckd and cls of a dense student, and skipped images (--missing-view skip) give no "
            "RoIs at all. Leave the loss out of --methods, or give it a weight of 0."
        )


class CollapseHook(Hook):  # type: ignore[misc]
    """Warns once where CKD's projection takes all boxes to nearly one point, so that the loss teaches nothing.

    That is a mean cosine (`ckd_spread`) above 0.9 in each of 100 steps after the warm-up; of a short training, in each
    step of its second half.

    Args:
        console: Where the warning is shown; it is in the log, too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._high = 0
        self._is_told = False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        spread = (outputs or {}).get("ckd_spread")
        if spread is None or self._is_told or runner.iter < min(WARMUP_STEPS, runner.max_iters // 2):
            return
        self._high = self._high + 1 if float(spread) > _SPREAD else 0
        if self._high >= min(_PATIENCE, max(runner.max_iters // 2, 1)):
            self._is_told = True
            warning = (
                f"The loss ckd teaches next to nothing: in the last {self._high} steps, the mean cosine between the "
                f"projected embeddings of different boxes (ckd_spread) was above {_SPREAD}; now it is "
                f"{float(spread):.3f}. Leave ckd out of --methods."
            )
            _warn(warning, runner, self._console)


class SharesHook(Hook):  # type: ignore[misc]
    """Says in the end how much of the gradient at the pyramid each loss had, and which distillation loss dominates.

    A mean over the second half of the training. A loss dominates with more than half of the gradient.

    Args:
        console: Where it is said; it is in the log, too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._looks: list[dict[str, float]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if outputs and 2 * runner.iter >= runner.max_iters:
            shares = {name: value for name, value in outputs.items() if name.startswith(_SHARE)}
            if shares:
                self._looks.append(_numbers(shares))

    def after_train(self, runner: Any) -> None:
        if not self._looks:
            return
        names = dict.fromkeys(name for look in self._looks for name in look)
        means = {name: sum(look.get(name, 0.0) for look in self._looks) / len(self._looks) for name in names}
        ordered = sorted(means.items(), key=lambda item: -item[1])
        line = f"Gradient at the pyramid, second half (steps looked at: {len(self._looks)}): " + ", ".join(
            f"{name.removeprefix(_SHARE)} {100 * share:.0f} %" for name, share in ordered
        )
        learned = {loss_name(loss).removeprefix("loss_"): loss for loss in getattr(_bare(runner), "weights", {})}
        first, share = ordered[0]
        if (loss := learned.get(first.removeprefix(_SHARE))) is not None and share > _DOMINATES:
            line += f". {loss} dominates: if AP does not gain by it, weigh it less (-o distill.weights.{loss})"
        self._console.print(f"{line}.", markup=False, highlight=False)
        runner.logger.info(f"{line}.")


def _warn(warning: str, runner: Any, console: Console) -> None:
    """Shows a warning, and writes it to the log."""
    console.print(f"Warning: {warning}", markup=False, highlight=False)
    runner.logger.warning(warning)


def _numbers(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The values of scalars, which a GPU is waited for once."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.detach().float() for value in values.values()]).tolist(), strict=True))


def _bare(runner: Any) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _remedy(runner: Any) -> str:
    saved = (
        f"The last checkpoint, of epoch {runner.epoch}, is good"
        if runner.epoch
        else "There is no checkpoint yet, since the first epoch is not finished"
    )
    weights = ", a lower weight of the loss (-o distill.weights.NAME=0.5)" if hasattr(_bare(runner), "weights") else ""
    return f"{saved}. Use a lower rate (--lr){weights} or full precision (without --amp), and look at these images."
