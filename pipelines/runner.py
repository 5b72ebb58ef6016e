"""mmengine's Runner behind a quiet console, and the hooks that every training of kdpipe carries."""

import io
import itertools
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.console import ProgressBar, stop

__all__ = [
    "AP_NAMES",
    "Bfloat16OptimWrapper",
    "FormattedConfig",
    "PlainCheckpointHook",
    "ProgressHook",
    "QuietRunner",
    "RunnerError",
    "coco_metrics",
]

_RUNS = itertools.count(1)  # runners of this process


class FormattedConfig(Config):  # type: ignore[misc]
    """A config that will not change any more, formatted once.

    mmengine asks for the text at every checkpoint, and formatting takes a second.

    Args:
        config: Is copied.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.to_dict(), filename=config.filename)
        self.__dict__["_formatted"] = super().pretty_text

    @property
    def pretty_text(self) -> str:
        return str(self.__dict__["_formatted"])


AP_NAMES = ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "bbox_mAP_s", "bbox_mAP_m", "bbox_mAP_l")


def coco_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """COCO metrics by mmdet's names (`AP_NAMES`), out of all that an evaluation gave under whatever prefix.

    A detector that finds nothing has AP 0; mmdet gives no figure at all.
    """
    found = {name.rsplit("/", 1)[-1]: float(value) for name, value in metrics.items() if "coco/" in name}
    return found or dict.fromkeys(AP_NAMES, 0.0)


class RunnerError(KdpipeError):
    """A training cannot go on."""


class QuietRunner(Runner):  # type: ignore[misc]
    """mmengine's Runner, whose log goes to the file in the work directory; the console shows errors only."""

    _train_loop: Any
    _val_loop: Any
    optim_wrapper: Any

    def __init__(self, *args: Any, experiment_name: str, **kwargs: Any) -> None:
        # mmengine keeps log, figures and scope by this name and the second, in which a process may begin several
        super().__init__(*args, experiment_name=f"{experiment_name}_{next(_RUNS)}", **kwargs)

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.ERROR)
                handler.setStream(sys.stderr)
        return logger

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """As mmengine's, but the start method of processes stays what it is: loaders name theirs.

        Without GPUs, processes are joined here, since mmengine would choose a GPU for each.
        """
        if self.distributed and not torch.cuda.is_available() and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        processes = {"mp_start_method": multiprocessing.get_start_method(), "opencv_num_threads": 0}
        super().setup_env({**env_cfg, "mp_cfg": processes})

    def build_loops(self) -> None:
        """Build data sets and optimiser now, which mmengine leaves until training begins."""
        self._train_loop = self.build_train_loop(self._train_loop)
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, **options: Any
    ) -> dict[str, Any]:
        """As mmengine's; to resume, the checkpoint has to fit the model exactly.

        Raises:
            RunnerError: It does not, or is damaged.
        """
        try:
            return dict(super().load_checkpoint(filename, map_location, strict or self._resume, **options))
        except (RuntimeError, EOFError) as error:
            raise RunnerError(
                f"Cannot go on from {filename}: {str(error).strip()}\nResume with the config, the cache and the "
                "--methods that the training began with, or begin anew in another --work-dir."
            ) from error


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):  # type: ignore[misc]
    """Mixed precision on devices without float16 arithmetic (the CPU): autocast to bfloat16, no loss scaling."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


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

    def after_train_epoch(self, runner: Any) -> None:
        if not is_main_process():
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        detector = getattr(model, "student", model)
        checkpoint = {
            "state_dict": {key: value.cpu() for key, value in detector.state_dict().items()},
            "meta": {
                "cfg": self.config_text,
                "dataset_meta": dict(runner.train_dataloader.dataset.metainfo),
                "epoch": runner.epoch + 1,
                "iter": runner.iter,
            },
        }
        folder = Path(runner.work_dir)
        newest = folder / f"{self.name}.pth"
        _save(checkpoint, newest)
        if (folder / f"epoch_{runner.epoch + 1}.pth").exists():
            _link(newest, folder / f"epoch_{runner.epoch + 1}.{self.name}.pth")
        for companion in folder.glob(f"epoch_*.{self.name}.pth"):
            if not (folder / f"{companion.name.split('.')[0]}.pth").exists():
                companion.unlink()


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


class ProgressHook(Hook):  # type: ignore[misc]
    """Progress bar over the whole training with steps/s and time left, and one line per epoch.

    Attributes:
        step_times: Seconds of each step but the first of each pass.
        metrics: COCO metrics of the last evaluation, as `coco_metrics` gives them; None before the first.
    """

    priority = "VERY_LOW"

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name
        self.progress: ProgressBar | None = None
        self.step_times: list[float] = []
        self.metrics: dict[str, float] | None = None
        self._epoch_losses: list[torch.Tensor] = []
        self._last = 0.0

    def before_train(self, runner: Any) -> None:
        stop.between_steps = True
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
        self.metrics = coco_metrics(metrics or {})
        if self.progress is not None:
            self.console.print(f"{self.name}: AP {self.metrics['bbox_mAP']:.3f}")

    def after_train(self, runner: Any) -> None:
        self.close()

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
