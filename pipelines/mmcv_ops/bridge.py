"""mmdet on today's torch: the ops of a compiled mmcv, where there is none.

mmcv's ops call functions of the compiled module ``mmcv._ext``, which mmcv-lite does not have and which does not
compile against recent versions of torch. `install_bridge` lets ``import mmcv._ext`` find
`kdpipe.pipelines.mmcv_ops.table` in its place.
"""

import ast
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Literal

__all__ = ["EXTENSION", "extension_names", "extension_state", "install_bridge"]

EXTENSION = "mmcv._ext"


class _BridgeLoader(Loader):
    """Makes ``mmcv._ext`` out of `kdpipe.pipelines.mmcv_ops.table`."""

    def exec_module(self, module: types.ModuleType) -> None:
        ops = importlib.import_module("kdpipe.pipelines.mmcv_ops.table")
        module.__dict__.update(ops.BRIDGED)
        module.__dict__["__getattr__"] = ops.unavailable_op


class _NativeLoader(Loader):
    """Hands out a compiled module that has been made already."""

    def __init__(self, loader: Loader, module: types.ModuleType) -> None:
        self._loader = loader
        self._module = module

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)


class _BridgeFinder(MetaPathFinder):
    """Finds the bridge where mmcv has no compiled ops, or has some that do not load."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        native = PathFinder.find_spec(fullname, path)
        if native is None or native.loader is None:
            return ModuleSpec(EXTENSION, _BridgeLoader(), origin="kdpipe.pipelines.mmcv_ops.table")
        try:
            module = importlib.util.module_from_spec(native)
        except ImportError as error:
            warnings.warn(
                f"mmcv's compiled ops do not load ({error}); kdpipe's own are used in their place. "
                "`kdpipe doctor` says what to do about it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return ModuleSpec(EXTENSION, _BridgeLoader(), origin="kdpipe.pipelines.mmcv_ops.table")
        return ModuleSpec(EXTENSION, _NativeLoader(native.loader, module), origin=native.origin)


def install_bridge() -> None:
    """Let mmcv's ops run without a compiled mmcv.

    Imports nothing of mmcv or torch: what is needed is imported when mmcv asks for its ops. Where a compiled
    ``mmcv._ext`` is present and loads, that one is used. Calling this twice does no harm.
    """
    if not any(isinstance(finder, _BridgeFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BridgeFinder())


def extension_state() -> tuple[Literal["native", "bridged", "broken"], str]:
    """Whose ops mmcv runs, and for ``broken`` (compiled ones that do not load, so the bridge's run) the reason.

    Raises:
        ImportError: where mmcv itself is missing or does not import.
    """
    mmcv = importlib.import_module("mmcv")
    native = PathFinder.find_spec(EXTENSION, mmcv.__path__)
    if native is None:
        return "bridged", ""
    try:
        importlib.util.module_from_spec(native)
    except ImportError as error:
        return "broken", str(error)
    return "native", ""


def extension_names() -> tuple[str, ...]:
    """Names of the compiled functions that `mmcv.ops` asks for, read from its sources without importing it."""
    package = importlib.util.find_spec("mmcv")
    names: set[str] = set()
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(folder, "ops").glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_ext"):
                    names.update(ast.literal_eval(node.args[1]))
    return tuple(sorted(names))
