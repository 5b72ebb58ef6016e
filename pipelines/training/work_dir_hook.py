"""Keeps in the work directory what a training that is resumed has to know beyond its checkpoint."""

from collections.abc import Mapping
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import EarlyStoppingHook, Hook

from kdpipe.pipelines.training.progress import ProgressHook
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["WorkDirHook"]

_VALIDATION = "kdpipe/validation.json"


class WorkDirHook(Hook):  # type: ignore[misc]
    """Writes the record of a training once it has begun, and what validations gave.

    A checkpoint is saved before its epoch is validated. A training that ended in between is measured first when it is
    resumed; one that was measured has the metrics, and the patience of `EarlyStoppingHook`, that it had.

    Args:
        work: The work directory.
        record: What the training is begun, or gone on, with.
        progress: Is given the metrics of a validation before the training was stopped.
    """

    priority = "LOWEST"

    def __init__(self, work: WorkDir, record: Mapping[str, Any], progress: ProgressHook) -> None:
        self.work, self.record, self.progress = work, record, progress

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        if not runner.epoch or runner.val_loop is None:
            return
        record = [self.work.read(_VALIDATION) if is_main_process() else None]
        broadcast_object_list(record)
        measured = record[0] or {}
        is_same = measured.get("validation") == self.record["validation"]
        if is_same and measured["epoch"] <= runner.epoch:  # of an earlier one where this one has not been measured
            is_current = measured["epoch"] == runner.epoch
            for hook, state in zip(_early_stopping(runner), measured["early_stopping"], strict=False):
                hook.best_score, hook.wait_count, settings = state
                if settings == _settings(hook) and is_current:  # with others, such as more patience, it goes on
                    loop.stop_training = measured["stopped"]
            if is_current:
                self.progress.metrics = measured["metrics"]
                return
        loop._decide_current_val_interval()
        due = runner.epoch % loop.val_interval == 0 or runner.epoch == runner.max_epochs
        if runner.epoch >= loop.val_begin and due:
            runner.val_loop.run()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.end_of_epoch(runner.train_dataloader, batch_idx):
            self._begin(saved=True)
        elif not self.work.begun:
            self._begin(saved=runner.epoch > 0)

    def after_train(self, runner: Any) -> None:
        self._begin(saved=True)

    def _begin(self, saved: bool) -> None:
        self.work.begun = True
        if is_main_process():
            self.work.write_record(self.record, saved=saved)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not is_main_process():
            return
        content = {
            "epoch": runner.epoch,
            "validation": self.record["validation"],
            "metrics": self.progress.metrics,
            "early_stopping": [[hook.best_score, hook.wait_count, _settings(hook)] for hook in _early_stopping(runner)],
            "stopped": bool(runner.train_loop.stop_training),
        }
        self.work.write(_VALIDATION, content)


def _early_stopping(runner: Any) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _settings(hook: EarlyStoppingHook) -> list[Any]:
    return [hook.monitor, hook.rule, hook.patience, hook.min_delta, hook.stopping_threshold]
