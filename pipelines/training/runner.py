"""mmengine's Runner behind a quiet console, which goes on rightly and leaves no half a file."""

import copy
import errno
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.checkpoints import refused_type
from kdpipe.pipelines.detectors.credentials import masked
from kdpipe.pipelines.training.process_group import join_process_group
from kdpipe.pipelines.training.schedule import schedule_shape, wind_forward

__all__ = ["Bfloat16OptimWrapper", "FormattedConfig", "QuietRunner", "RunnerError"]

_INITIAL = "initial_"  # mmengine's prefix of what a scheduler begins with
_RESULT_CHANGING = (
    "The value of momentum in EMA is usually a small number",
    "the gradient of some iterations is lost",  # accumulated, when a training is resumed
    "because the model has BatchNorm layers",  # of accumulated gradients
    "Failed to convert",  # SyncBN
)
_RUNS = itertools.count(1)  # runners of this process


class FormattedConfig(Config):  # type: ignore[misc]
    """A config that will not change any more, formatted once, without credentials.

    mmengine asks for the text at every checkpoint, and formatting takes a second.

    Args:
        config: Is copied.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.to_dict(), filename=config.filename)
        self.__dict__["_formatted"] = masked(super().pretty_text)

    @property
    def pretty_text(self) -> str:
        return str(self.__dict__["_formatted"])


def _is_told(record: logging.LogRecord) -> bool:
    """Whether a line of mmengine's log is for the console, too: errors, and warnings that change what is learned."""
    return record.levelno >= logging.ERROR or any(text in record.getMessage() for text in _RESULT_CHANGING)


class RunnerError(KdpipeError):
    """A training cannot go on."""


class QuietRunner(Runner):  # type: ignore[misc]
    """mmengine's Runner, whose log goes to the file in the work directory; the console shows errors only."""

    _schedule: Any = None
    _train_loop: Any
    _val_loop: Any
    optim_wrapper: Any

    def __init__(self, *args: Any, experiment_name: str, **kwargs: Any) -> None:
        # mmengine keeps log, figures and scope by this name and the second, in which a process may begin several
        super().__init__(*args, experiment_name=f"{experiment_name}_{next(_RUNS)}", **kwargs)

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler) and isinstance(handler.stream, io.TextIOWrapper):
                handler.stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
                handler.addFilter(_is_told)
                handler.setStream(sys.stderr)
        return logger

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """As mmengine's, but the start method of processes stays what it is: loaders name theirs.

        Several processes are joined here: mmengine would do so without a word, and needs a GPU.
        """
        if self.distributed and not torch.distributed.is_initialized():
            join_process_group(env_cfg.get("dist_cfg", {}))
        processes = {"mp_start_method": multiprocessing.get_start_method(), "opencv_num_threads": 0}
        super().setup_env({**env_cfg, "mp_cfg": processes})

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """As mmengine's; for a deterministic training on a GPU, torch wants cuBLAS to be told before it is used."""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().set_randomness(seed, diff_rank_seed, deterministic)

    def dump_config(self) -> None:
        """Not under the name of the user's config, which may lie in the work directory: `vis_data` has it, too."""

    def build_loops(self) -> None:
        """Build data sets and optimiser now, which mmengine leaves until training begins."""
        barrier()  # the first process has written the annotations that all read
        self._train_loop = self.build_train_loop(self._train_loop)
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """As mmengine's.

        Raises:
            ConfigError: A config is of no scheduler.
        """
        with building("The schedule (param_scheduler)"):
            return super().build_param_scheduler(scheduler)

    def _init_model_weights(self) -> None:
        """As mmengine's, with random numbers of the CPU: a seed gives the same weights whatever the device."""
        parameters = list(self.model.parameters())
        on_device = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.cpu()
        super()._init_model_weights()
        for parameter, data in zip(parameters, on_device, strict=True):
            parameter.data = data.copy_(parameter.data)

    def set_schedule(self, schedule: Any) -> None:
        """Set the configs of the schedulers, once the number of steps is known."""
        self._schedule, self.param_schedulers = schedule, copy.deepcopy(schedule)

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, **options: Any
    ) -> dict[str, Any]:
        """As mmengine's; to resume, the checkpoint has to fit the model exactly.

        Raises:
            RunnerError: It does not, or is damaged, or holds more than weights and figures.
        """
        try:
            checkpoint = dict(super().load_checkpoint(filename, map_location, strict or self._resume, **options))
            meta = checkpoint.get("meta") or {}
            # mmengine would execute a text under this name, which it does not write itself
            return {**checkpoint, "meta": {key: value for key, value in meta.items() if key != "config"}}
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch's, of a file that is cut short
                raise
            if type_name := refused_type(error):
                raise RunnerError(
                    f"checkpoint {filename} was refused: it holds {type_name}, which is not a type known as harmless. "
                    "Loading it could run code of whoever made the file; nothing of it has run. Give a checkpoint that "
                    "kdpipe or mmengine wrote."
                ) from error
            if "state_dict" not in str(error):  # not of the model, which names it
                raise RunnerError(
                    f"{filename} is damaged ({str(error).strip() or type(error).__name__}). Restore it; or write the "
                    f"name of an earlier one into {Path(filename).parent / 'last_checkpoint'}, such as epoch_3.pth, "
                    "and go on from there."
                ) from error
            raise RunnerError(
                f"Cannot go on from {filename}: {str(error).strip()}\nResume with the config, the cache and the "
                "--methods that the training began with, or begin anew in another --work-dir."
            ) from error

    def resume(self, filename: str, *args: Any, **options: Any) -> None:
        """As mmengine's; a schedule or rate that is not the checkpoint's holds from where it is after as many epochs.

        Raises:
            RunnerError: More epochs are done than there are to be, or the schedule cannot be wound forward.
        """
        new_schedule = (
            copy.deepcopy(_peaks(self.optim_wrapper)),
            copy.deepcopy(schedule_shape(self.param_schedulers or [])),
        )
        super().resume(filename, *args, **options)
        for name, best in list(self.message_hub.runtime_info.items()):
            if name.startswith("best_ckpt"):  # which mmengine removes for a better one: that of this directory only
                self.message_hub.update_info(name, best and str(Path(self.work_dir, Path(best).name)))
        steps = len(self.train_dataloader)
        if self.epoch > self.max_epochs:
            raise RunnerError(
                f"{self.epoch} epochs are done already, and --epochs is {self.max_epochs}: there is nothing to go on "
                "with. Give at least as many epochs, or use the checkpoint as it is."
            )
        resumed_schedule = _peaks(self.optim_wrapper), schedule_shape(self.param_schedulers or [])
        if resumed_schedule == new_schedule and self.iter == self.epoch * steps:
            return
        if any(getattr(scheduler, "need_val_args", False) for scheduler in self.param_schedulers or []):
            raise RunnerError(
                "The schedule of the config follows what validations gave, and cannot be made anew for other epochs, "
                "batch sizes, processes or rates. Resume with those that the training began with."
            )
        for group, values in zip(self.optim_wrapper.param_groups, new_schedule[0], strict=True):
            for name in [name for name in group if name.startswith(_INITIAL)]:
                del group[name]
            group.update(values)
        if self._schedule:
            self.param_schedulers = self.build_param_scheduler(self._schedule)
            wind_forward(self.param_schedulers, self.epoch, steps)
        self._train_loop._iter = self.epoch * steps

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        """As mmengine's, but the file is there entirely or not at all."""
        partial = Path(out_dir, f"{filename}.partial")
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **options)
            if is_main_process():
                partial.replace(Path(out_dir, filename))
        finally:
            if is_main_process():
                partial.unlink(missing_ok=True)


def _peaks(optimizer: OptimWrapper) -> list[dict[str, Any]]:
    """The options of each group of weights, those that are scheduled as they were before."""
    return [
        {name: value for name, value in group.items() if name != "params" and not name.startswith(_INITIAL)}
        | {name.removeprefix(_INITIAL): value for name, value in group.items() if name.startswith(_INITIAL)}
        for group in optimizer.param_groups
    ]


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):  # type: ignore[misc]
    """Mixed precision on a GPU or the CPU: autocast to bfloat16, which has the range of float32: no loss scaling."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
