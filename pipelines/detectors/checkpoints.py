"""Checkpoints of mmdet 2.x, mmdet 3.x and kdpipe, read without running what is pickled in them."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from kdpipe.cache.errors import KdpipeError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "class_names",
    "load_checkpoint",
    "load_strict",
    "refused_type",
    "register_safe_types",
    "unwrapped",
]

SafeType = Callable[..., Any] | tuple[Callable[..., Any], str]

_LISTED = 10  # names shown of each kind of disagreement
_CONTAINERS = ("state_dict", "model", "model_state_dict", "module")  # where trainers put the weights
# What wrappers put before all names: DistributedDataParallel, torch.compile, MMRazor, and trainers of other projects.
_PREFIXES = ("module.", "_orig_mod.", "architecture.", "model.")
_STATISTICS = ("min", "max", "current", "mean")


class CheckpointError(KdpipeError):
    """A checkpoint is missing, unreadable, unsafe, or does not fit the model."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says, on the CPU.

    Attributes:
        state_dict: parameters and buffers by name, without the prefix ``module.``; `load_strict` knows others.
        meta: the checkpoint's ``meta``: config text, classes, epoch; empty for a bare state dict.
        path: the file that it came from.
        trusted: whether its config may name anything, and so run code.
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path
    trusted: bool = False


def _history_method(owner: object, name: str) -> Any:
    """Stands in for ``getattr``, which mmengine pickles with every HistoryBuffer to name its statistics."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name!r}")
    return getattr(HistoryBuffer, name)


def _numeric_dtype(code: str, align: bool = False, copy: bool = False) -> Any:
    """Stands in for ``numpy.dtype``: booleans and numbers only, no objects and no structures."""
    dtype = np.dtype(code, align=align, copy=copy)
    if dtype.kind not in "biufc":
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code!r}")
    return dtype


def _safe_types() -> list[SafeType]:
    """What mmdet's and mmengine's checkpoints hold beyond tensors and Python's own containers."""
    scalar: Any = np.float64(0).__reduce__()[0]
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    types: list[SafeType] = [HistoryBuffer, np.ndarray]
    types += [(_history_method, "builtins.getattr"), (_numeric_dtype, "numpy.dtype")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and numpy 2
        types += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    types += list(dict.fromkeys(type(np.dtype(code)) for code in np.typecodes["All"] if np.dtype(code).kind in "biufc"))
    return types


def register_safe_types() -> None:
    """Lets plain ``torch.load`` read mmengine's checkpoints in this process, so that its Runner can resume.

    The types are those that `load_checkpoint` allows. Loading stays weights-only, and that of what mmengine downloads
    becomes so: torch.hub would unpickle anything.
    """
    torch.serialization.add_safe_globals(_safe_types())
    mmengine_checkpoint.load_url = partial(torch.hub.load_state_dict_from_url, weights_only=True)


def _allowing_safe_types() -> AbstractContextManager[Any]:
    # leaving `safe_globals` forgets its types, also those that were registered before: pass the new ones only
    registered = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([item for item in _safe_types() if item not in registered])


def load_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Reads a checkpoint: mmdet 3.x, mmdet 2.x, or a bare state dict.

    Where a checkpoint holds averaged weights beside the trained ones, the choice is mmdet's: ``state_dict``.

    Args:
        path: the file. It is mapped into memory where its format allows.
        trust: unpickle anything in it, which may run code of whoever made the file, and so may its config.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or holds a type that is not known as
            harmless; nothing of it has run.
    """
    path = Path(path)
    if not path.is_file():
        fault = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {fault}. Give the .pth file of the detector.")
    content = _read(path, trust)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary with a state_dict."
        )
    state = content
    while inner := [state[name] for name in _CONTAINERS if isinstance(state.get(name), Mapping)]:
        state = inner[0]
    meta = content.get("meta") if state is not content else None
    return Checkpoint(_plain_state(state, path), dict(meta) if isinstance(meta, Mapping) else {}, path, trust)


def _read(path: Path, trust: bool) -> Any:
    mmap = zipfile.is_zipfile(path)  # torch < 1.6 wrote another format, which cannot be mapped
    try:
        if trust:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False)
        with _allowing_safe_types():
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # unpickling may raise anything
        if type_name := refused_type(error):
            raise CheckpointError(
                f"checkpoint {path} was refused: it holds {type_name}, which is not a type known as harmless, and "
                "loading it could run code of whoever made the file. Nothing of it has run. If you trust where the "
                "file comes from, give --trust-checkpoint."
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a PyTorch checkpoint: it is truncated, "
            f"corrupt, or of another format ({type(error).__name__}: {reason}). Download or save it again."
        ) from error


def refused_type(error: Exception) -> str:
    """What a file holds because of which torch refused to unpickle it; empty where reading it failed otherwise."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return match[1] if match else ""


def _plain_state(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path} holds no weights: its state_dict is {type(state).__name__} and empty or no dict."
        )
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{path} is not a detector's checkpoint: expected a dictionary with a state_dict of tensors, found entries "
            f"that are no tensors: {_some(others)}."
        )
    plain: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        plain[name.removeprefix("module.")] = value
    # mmdet 2.x keeps each averaged weight a second time, as a buffer of the detector
    for name in list(plain):
        plain.pop(f"ema_{name.replace('.', '_')}", None)
    vars(plain)["_metadata"] = getattr(state, "_metadata", OrderedDict())  # versions, for layers that changed names
    return plain


def class_names(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """Class names that the checkpoint was trained for, in label order; None where it does not say."""
    dataset = checkpoint.meta.get("dataset_meta")
    for source in (dataset if isinstance(dataset, Mapping) else {}, checkpoint.meta):
        for key in ("classes", "CLASSES"):
            names = source.get(key)
            if isinstance(names, str):
                return (names,)
            if isinstance(names, Sequence) and names:
                return tuple(str(name) for name in names)
    return None


def load_strict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, path: Path | None = None, ignore_prefixes: Sequence[str] = ()
) -> None:
    """Loads weights so that none is left over, none keeps its random start, and all shapes agree.

    What wrappers put before all names (``_orig_mod.``, ``architecture.``, ``model.``) is taken off where all then fits.

    Args:
        model: is changed in place. After an error its weights are undefined.
        state_dict: as `Checkpoint.state_dict`.
        path: the file of the checkpoint, for messages.
        ignore_prefixes: names that start so may be left over, e.g. ``roi_head.mask_head.``.

    Raises:
        CheckpointError: lists what is missing, unexpected and mis-shaped.
    """
    model_state, ignored = model.state_dict(), tuple(ignore_prefixes)

    def relevant(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        entries = (
            (name, value) for name, value in weights.items() if name in model_state or not name.startswith(ignored)
        )
        return _with_metadata(OrderedDict(entries), _metadata(weights))

    counters = {
        name for name in model_state if name.endswith("num_batches_tracked")
    }  # no layer reads them; new since 2018
    state = relevant(state_dict)
    for choice in unwrapped(state_dict):
        if model_state.keys() - counters <= (candidate := relevant(choice)).keys() <= model_state.keys():
            state = candidate
            break
    if path is not None and model_state.keys() - counters <= {name.removeprefix("student.") for name in state}:
        _refuse_training(state, path)
    for name in counters:
        state.setdefault(name, model_state[name])
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(_disagreement(model_state, state, path) or str(error)) from error


def _metadata(state: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Versions of layers, which tell them what names they had."""
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    return metadata


def _with_metadata(state: OrderedDict[str, Tensor], metadata: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    vars(state)["_metadata"] = OrderedDict(metadata)
    return state


def unwrapped(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The weights as they are, then without one, two, ... prefixes that all names have in common."""
    yield state
    state = _without(r"_orig_mod\.", state)  # torch.compile wraps parts, too
    yield state
    while state and (prefix := next((each for each in _PREFIXES if all(name.startswith(each) for name in state)), "")):
        state = _without(f"^{re.escape(prefix)}", state)
        yield state


def _without(pattern: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    metadata = {re.sub(pattern, "", f"{name}.").removesuffix("."): value for name, value in _metadata(state).items()}
    return _with_metadata(OrderedDict((re.sub(pattern, "", name), value) for name, value in state.items()), metadata)


def _refuse_training(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a checkpoint of a student's training, which holds more than the student."""
    if not any(name.startswith("student.") for name in state):
        return
    beside = (path.with_suffix(".student.pth"), path.with_name("student.pth"))
    plain = next((file for file in beside if file.is_file()), "the student.pth of that training")
    raise CheckpointError(
        f"{path} is what a training resumes from: it holds the parts of the distillation beside the student. The bare "
        f"detector is in {plain}: use that."
    )


def _disagreement(model_state: Mapping[str, Tensor], checkpoint_state: Mapping[str, Tensor], path: Path | None) -> str:
    missing = [name for name in model_state if name not in checkpoint_state]
    unexpected = [name for name in checkpoint_state if name not in model_state]
    shaped = [
        f"{name}: checkpoint {tuple(checkpoint_state[name].shape)}, model {tuple(model_state[name].shape)}"
        for name in model_state
        if name in checkpoint_state and checkpoint_state[name].shape != model_state[name].shape
    ]
    lines = [
        f"  {len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
        if names
    ]
    if not lines:
        return ""
    counts = f"{len(model_state)} tensors wanted, {len(checkpoint_state)} found"
    head = f"the checkpoint {path or ''} does not fit the model ({counts}):"
    advice = "Give the config that the checkpoint was trained with, or the checkpoint that belongs to the config."
    return "\n".join([head, *lines, advice])


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
