"""Grids in TOML."""

import re
from pathlib import Path

import pytest

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.compare.grid import argument_words, merged, read_grid

GRID = """
seeds = 3
[options]
cache = "coco.zarr"
epochs = 12
amp = true
methods = ["none", "sgfi,ckd"]
cfg-options = { "model.backbone.depth" = 18, "model.neck.in_channels" = [64, 128], "a.b" = true, "c.d" = "text" }
[rows.wide]
student = "retinanet_r18_fpn_1x_coco"
amp = false
[rows."r18.small"]
methods = "pred"
baseline = "wide"
epochs = 3
cfg-options = ["distill.rois.num=96"]
"""


def test_rows_have_the_options_of_all_and_their_own(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    grid = read_grid(path)
    assert grid.seeds == 3
    wide, small = grid.rows
    overrides = ["model.backbone.depth=18", "model.neck.in_channels=[64, 128]", "a.b=True", "c.d=text"]
    assert (wide.name, wide.methods, wide.baseline) == ("wide", ("none", "sgfi,ckd"), None)
    expected = {"--cache": ["coco.zarr"], "--epochs": ["12"], "--cfg-options": overrides}
    assert wide.arguments == {**expected, "--student": ["retinanet_r18_fpn_1x_coco"]}
    assert (small.name, small.methods, small.baseline) == ("r18.small", ("pred",), "wide")
    last = [*overrides, "distill.rois.num=96"]
    assert small.arguments == {"--cache": ["coco.zarr"], "--epochs": ["3"], "--amp": [], "--cfg-options": last}


def test_words() -> None:
    arguments = merged({"--amp": [], "--epochs": ["3"], "--cfg-options": ["a=1"]}, {"--epochs": ["4"]})
    arguments = merged(arguments, {"--cfg-options": ["b=2"]})
    words = argument_words(arguments)
    assert words == ["--amp", "--epochs", "4", "--cfg-options", "a=1", "--cfg-options", "b=2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rows.a", "is not TOML"),
        ("", "names no rows"),
        ("rows = 3", "names no rows"),
        ("[row.a]\n", "has row; expected"),
        ("seeds = 0\n[rows.a]", "has seeds = 0"),
        ("seeds = true\n[rows.a]", "has seeds = True"),
        ('[rows."a/b"]', "'a/b' cannot name a student"),
        ('[rows.".."]', "cannot name a student"),
        ("[rows.a]\nseed = 3", "seed is set by compare"),
        ('[rows.a]\nwork-dir = "x"', "work-dir is set by compare"),
        ('[rows.a]\nbaseline = "b"', "has baseline 'b'; rows are a"),
        ("[rows.a]\nmethods = 3", "methods = 3"),
        ("[rows.a]\nepochs = 1979-05-27", "epochs = datetime.date"),
        ("[rows.a]\nepochs = [1, 2]", "epochs = [1, 2]; expected one value. Several are several rows"),
        ('[rows.a]\nstudent = ["a.py", "b.py"]', "student = ['a.py', 'b.py']; expected one value"),
    ],
)
def test_what_is_no_grid(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(KdpipeError, match=re.escape(message)):
        read_grid(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match="cannot be read"):
        read_grid(tmp_path / "grid.toml")
