"""Checkpoints of the bare detector, with the weights that were measured."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper

__all__ = ["PlainCheckpointHook", "SameBuffersHook"]


class PlainCheckpointHook(Hook):  # type: ignore[misc]
    """Writes a checkpoint of the bare detector beside each checkpoint of the Runner.

    `epoch_3.pth` (for resuming) gets the companion `epoch_3.<name>.pth`, and `<name>.pth` is always the newest. They
    hold `state_dict` and `meta` (config text, class names, epoch) and load strictly into the stock mmdet detector.

    Args:
        name: `student` or `teacher`.
        config_text: The detector's own config, as stock mmdet reads it.
    """

    priority = "LOWEST"

    def __init__(self, name: str, config_text: str) -> None:
        self.name = name
        self.config_text = config_text

    def before_train(self, runner: Any) -> None:
        # resumed: the process may have ended between the two files, or some epochs behind the last checkpoint
        if runner.epoch and runner.epoch >= _epoch(Path(runner.work_dir, f"{self.name}.pth")):
            self._write(runner, runner.epoch)

    def after_train_epoch(self, runner: Any) -> None:
        self._write(runner, runner.epoch + 1)

    def _write(self, runner: Any, epoch: int) -> None:
        if not is_main_process():
            return
        newest, numbered = (Path(runner.work_dir, f"{stem}.pth") for stem in (self.name, f"epoch_{epoch}"))
        checkpoint = {
            "state_dict": _measured_weights(runner),
            "meta": {
                "cfg": self.config_text,
                "dataset_meta": dict(runner.train_dataloader.dataset.metainfo),
                "epoch": epoch,
                "iter": runner.iter,
            },
        }
        _save(checkpoint, newest)
        if numbered.exists():
            _link(newest, numbered.with_suffix(f".{self.name}.pth"))
        for companion in newest.parent.glob(f"epoch_*.{self.name}.pth"):
            if not companion.with_name(f"{companion.name.split('.')[0]}.pth").exists():
                companion.unlink()


def _measured_weights(runner: Any) -> dict[str, torch.Tensor]:
    """The weights of the bare detector that validations measure, which a hook may have averaged."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    checkpoint = {"state_dict": model.state_dict()}
    runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
    prefix = "student." if hasattr(model, "student") else ""
    return {
        name.removeprefix(prefix): value.cpu()
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def _epoch(path: Path) -> int:
    """Epoch of a checkpoint of the bare detector; 0 where there is none that can be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]["epoch"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
        return 0


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # torch's own writer tells a full disk as something else
    torch.save(checkpoint, content)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content.getbuffer())
    partial.replace(path)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing the target in one step."""
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # not every file system knows hard links
        shutil.copyfile(source, partial)
    partial.replace(target)


class SameBuffersHook(Hook):  # type: ignore[misc]
    """Gives every process the buffers of the first at the end of an epoch, before these are saved and measured.

    Each process has had statistics of BatchNorm of its own images until then.
    """

    priority = "VERY_HIGH"

    def after_train_epoch(self, runner: Any) -> None:
        averaged = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        for model in (runner.model, *averaged):
            for buffer in model.buffers():
                broadcast(buffer)
