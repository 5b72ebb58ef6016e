"""What a training shows while it runs, and what it measured."""

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EarlyStoppingHook, Hook
from rich.console import Console

from kdpipe.pipelines.data.voc_ap import VOC_IOUS, VOC_MODES, voc_name
from kdpipe.pipelines.runtime.console import ProgressBar, stop

__all__ = ["AP_NAMES", "VOC_PREFIX", "PeakMemoryHook", "ProgressHook", "ap_metrics", "ap_text"]

AP_NAMES = ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "bbox_mAP_s", "bbox_mAP_m", "bbox_mAP_l")
VOC_PREFIX = "voc_"  # of the names of Pascal VOC's metrics


def ap_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """AP out of all that an evaluation gave under whatever prefix.

    A detector that finds nothing has AP 0; mmdet gives no figure at all.

    Returns:
        COCO's by mmdet's names (`AP_NAMES`); and Pascal VOC's where it was measured, such as `voc_AP50_11points`.
    """
    coco = {name.rsplit("/", 1)[-1]: float(value) for name, value in metrics.items() if "coco/" in name}
    voc = {VOC_PREFIX + name.rsplit("/", 1)[-1]: float(value) for name, value in metrics.items() if "voc/" in name}
    return (coco or dict.fromkeys(AP_NAMES, 0.0)) | voc


def ap_text(value: float) -> str:
    """AP for a table; a dash where there are no objects of that size, of which pycocotools says -1."""
    return "—" if value < 0 else f"{value:.3f}"


class ProgressHook(Hook):  # type: ignore[misc]
    """Progress bar over the whole training with steps/s and time left, and one line per epoch.

    Attributes:
        step_times: Seconds of each step but the first of each pass.
        trained: Whether there was a step.
        metrics: AP of the last evaluation, as `ap_metrics` gives it; None before the first.
    """

    priority = "VERY_LOW"

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name
        self.progress: ProgressBar | None = None
        self.step_times: list[float] = []
        self.trained = False
        self.metrics: dict[str, float] | None = None
        self._epoch_losses: list[torch.Tensor] = []
        self._last = 0.0

    def before_train(self, runner: Any) -> None:
        stop.between_steps = True
        if runner.epoch:
            remark = "nothing is left to train" if runner.epoch == runner.max_epochs else "the others follow"
            self.console.print(f"{self.name}: {runner.epoch} of {runner.max_epochs} epochs are done; {remark}")
        self._start(runner.max_iters, runner.iter)

    def _start(self, total: int, done: int) -> None:
        if is_main_process():
            self.progress = ProgressBar(self.console, self.name, total, done).__enter__()
        self._last = time.perf_counter()

    def _tick(self, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx:  # the first step of a pass also waits for the loader to start
            self.step_times.append(now - self._last)
        self._last = now

    def _advance(self, done: int) -> None:
        stop.check()
        if self.progress is not None:
            recent = self.step_times[-20:]
            rate = f"{len(recent) / sum(recent):.2f} steps/s" if recent else "starting"
            self.progress.update(done, rate)

    def before_train_epoch(self, runner: Any) -> None:
        self._epoch_losses = []
        self._epoch_start = self._last = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._tick(batch_idx)
        self.trained = True
        if outputs and "loss" in outputs:
            self._epoch_losses.append(outputs["loss"].detach())
        self._advance(runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        if self.progress is None or not self._epoch_losses:
            return
        loss = torch.stack(self._epoch_losses).mean().item()
        seconds = time.perf_counter() - self._epoch_start
        self.console.print(
            f"{self.name}: epoch {runner.epoch + 1}/{runner.max_epochs}, mean loss {loss:.3f}, {seconds:.0f} s"
        )

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        stop.check()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.metrics = ap_metrics(metrics or {})
        if self.progress is not None:
            self.console.print(f"{self.name}: AP {self.metrics['bbox_mAP']:.3f}{_voc_text(self.metrics)}")

    def after_train(self, runner: Any) -> None:
        self.close()
        if runner.train_loop.stop_training:
            self.console.print(
                f"{self.name}: stopped early, after epoch {runner.epoch} of {runner.max_epochs}"
                + "".join(f"; {_stopped_by(hook)}" for hook in runner.hooks if isinstance(hook, EarlyStoppingHook))
            )

    def before_test(self, runner: Any) -> None:
        self._start(len(runner.test_dataloader), 0)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._tick(batch_idx)
        self._advance(batch_idx + 1)

    def after_test(self, runner: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the console; harmless when there is none."""
        stop.between_steps = False
        if self.progress is not None:
            self.progress.close()


class PeakMemoryHook(Hook):  # type: ignore[misc]
    """Looks at the peak of the GPU's memory after each step, before mmengine's log forgets it, and at the end.

    Attributes:
        peak: Most bytes that this process held at a time: on the GPU where there is one, else of main memory.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self.peak = 0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._look()

    def after_train(self, runner: Any) -> None:
        self._look()

    def _look(self) -> None:
        if torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated()
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak = max(self.peak, int(now))


def _voc_text(metrics: Mapping[str, float]) -> str:
    """Pascal VOC's AP of 11 points, where it was measured."""
    names = {iou: VOC_PREFIX + voc_name(iou, VOC_MODES[0]) for iou in VOC_IOUS}
    texts = [f"{metrics[name]:.3f} at IoU {iou}" for iou, name in names.items() if name in metrics]
    return f"; Pascal VOC, 11-point: {', '.join(texts)}" if texts else ""


def _stopped_by(hook: EarlyStoppingHook) -> str:
    """Why a hook stopped the training, of what it keeps."""
    if hook.wait_count >= hook.patience:
        return (
            f"EarlyStoppingHook: {hook.monitor} has not got better by {abs(hook.min_delta)} in {hook.wait_count} "
            f"validations (best {hook.best_score:.3f})"
        )
    return f"EarlyStoppingHook: {hook.monitor} met its threshold, {hook.stopping_threshold}, or is not finite"
