"""The layers of the code: pipelines -> distill -> cache, OpenMMLab at the edge, and documented names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cache", "distill", "pipelines")  # each may import those before it
OPENMMLAB = {"mmcv", "mmdet", "mmengine"}
# the model that mmengine's runner trains, and what a student of mmdet shows to its losses
_ADAPTERS = ("detector", "preprocessor", "students/dense", "students/two_stage", "students/structure")
ADAPTERS = {f"distill/{name}.py" for name in _ADAPTERS}
# rooms of pipelines/ above the others -> those that may import them
COMMANDS = {
    "commands": ("commands", "report", "demo", "cli"),
    "report": ("report", "demo", "cli"),
    "demo": ("demo", "cli"),
    "cli": ("cli",),
}
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
PACKAGES = [path for path in MODULES if path.name == "__init__.py"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions too; relative ones begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def commands_imported(file: str, tree: ast.AST) -> list[str]:
    """The commands, or what starts them, that a module of `pipelines/` imports from below them."""
    room = file.split("/")[1]
    return [
        imported
        for imported in imports(tree)
        if any(
            f"{imported}.".startswith(f"kdpipe.pipelines.{above}.") and room not in below
            for above, below in COMMANDS.items()
        )
    ]


@pytest.mark.parametrize("path", [path for path in MODULES if name(path).startswith("pipelines/")], ids=name)
def test_commands_are_imported_by_what_starts_them_only(path: Path) -> None:
    assert commands_imported(name(path), parse(path)) == []


@pytest.mark.parametrize(
    ("file", "code", "count"),
    [
        ("pipelines/training/x.py", "from kdpipe.pipelines.commands.doctor import run_doctor", 1),
        ("pipelines/training/x.py", "def f():\n    from kdpipe.pipelines import commands", 1),
        ("pipelines/data/x.py", "import kdpipe.pipelines.demo.run", 1),
        ("pipelines/commands/x.py", "from kdpipe.pipelines.cli.options import PATH", 1),
        ("pipelines/commands/x.py", "from kdpipe.pipelines.commands.dry_run import estimate", 0),
        ("pipelines/demo/x.py", "from kdpipe.pipelines.commands.cache_teacher import cache_teacher", 0),
        ("pipelines/cli/x.py", "from kdpipe.pipelines.demo.run import run_demo", 0),
    ],
)
def test_a_command_that_is_imported_is_found(file: str, code: str, count: int) -> None:
    assert len(commands_imported(file, ast.parse(code))) == count


def violations(layer: str, file: str, tree: ast.AST) -> list[str]:
    """What a module of a layer imports and must not."""
    above = LAYERS[LAYERS.index(layer) + 1 :]
    lines = []
    for imported in imports(tree):
        first, _, rest = imported.partition(".")
        if imported.startswith(".") or first in LAYERS:
            lines.append(f"{imported}: not absolute")
        elif first == "kdpipe" and rest.split(".")[0] not in LAYERS:
            lines.append(f"{imported}: no layer")
        elif first == "kdpipe" and rest.split(".")[0] in above:
            lines.append(f"{imported}: a layer above")
        elif first in OPENMMLAB and layer != "pipelines" and file not in ADAPTERS:
            lines.append(f"{imported}: OpenMMLab outside of the adapters")
    return lines


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down(path: Path) -> None:
    assert violations(path.relative_to(ROOT).parts[0], name(path), parse(path)) == []


@pytest.mark.parametrize(
    ("layer", "file", "code"),
    [
        ("cache", "cache/x.py", "from kdpipe.distill.losses.sgfi import sgfi_loss"),
        ("cache", "cache/x.py", "import kdpipe.pipelines.cli.main"),
        ("distill", "distill/x.py", "def f():\n    from kdpipe.pipelines import cli"),
        ("distill", "distill/x.py", "from kdpipe import pipelines"),
        ("cache", "cache/x.py", "import mmcv"),
        ("distill", "distill/x.py", "from mmdet.registry import MODELS"),
        ("cache", "cache/detector.py", "import mmengine.config"),
        ("pipelines", "pipelines/x.py", "from . import cli"),
        ("pipelines", "pipelines/x.py", "from cache.errors import KdpipeError"),
    ],
)
def test_a_wrong_import_is_found(layer: str, file: str, code: str) -> None:
    assert len(violations(layer, file, ast.parse(code))) == 1


def test_the_adapters_exist() -> None:
    assert {name(path) for path in MODULES} >= ADAPTERS


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_public_names_are_documented(path: Path) -> None:
    tree = parse(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), "the module"
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def offered(tree: ast.Module) -> list[str]:
    """The public names of a package: `__all__`, or without it whatever its `__init__.py` imports or defines."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif not isinstance(node, ast.Expr):
            names.append(ast.unparse(node).partition("\n")[0])
    return names


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_packages_offer_a_dozen_things_at_most(path: Path) -> None:
    assert len(offered(parse(path))) <= 12


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ('"""A package."""', []),
        ("from kdpipe.cache.spec import CacheSpec", ["CacheSpec"]),
        ("from kdpipe.cache.spec import CacheSpec\n__all__ = ['CacheSpec', 'other']", ["CacheSpec", "other"]),
        ("import zarr as z\ndef f(): ...", ["z", "def f():"]),
    ],
)
def test_what_a_package_offers_is_found(code: str, names: list[str]) -> None:
    assert offered(ast.parse(code)) == names


def without_args(tree: ast.Module) -> list[str]:
    """Public functions, and methods of public classes, with three parameters or more and no Args in the docstring."""
    found = []
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        methods = node.body if public and isinstance(node, ast.ClassDef) else [node] if public else []
        for function in methods:
            if isinstance(function, ast.FunctionDef) and (function.name == "__call__" or function.name[0] != "_"):
                arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
                if count >= 3 and "Args:" not in (ast.get_docstring(function) or ""):
                    found.append(function.name)
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if not name(path).startswith("pipelines/")], ids=name)
def test_three_parameters_or_more_are_documented(path: Path) -> None:
    assert without_args(parse(path)) == []


def test_a_function_without_args_is_found() -> None:
    documented = '    """Do.\n\n    Args:\n        a: x.\n    """'
    code = f"def f(a, b, *, c):\n    pass\ndef g(a, b, c):\n{documented}\ndef _h(a, b, c):\n    pass\n"
    assert without_args(ast.parse(code)) == ["f"]
