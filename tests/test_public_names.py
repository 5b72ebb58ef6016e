"""What a package says it exports is there, although it is imported when first used."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("cache", "distill")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_public_name_is_there(package: str) -> None:
    module = importlib.import_module(f"kdpipe.{package}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name), name
    assert sorted(name for names in module._MODULES.values() for name in names) == sorted(module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_packages_are_light() -> None:
    code = "import sys, kdpipe.cache, kdpipe.distill; print({'torch', 'zarr', 'mmdet'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
