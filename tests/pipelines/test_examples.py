"""The examples run as they stand; `training/test_config_file.py` has the mmdet config."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from kdpipe.cache.read.reader import open_cache

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Kit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAUNCHERS = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_every_example_has_a_test() -> None:
    tests = [Path(__file__), Path(__file__).parent / "training" / "test_config_file.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in tests)
    names = [path.name for path in EXAMPLES.iterdir() if path.is_file()]
    assert names
    assert [name for name in names if f'"{name}"' not in text] == []


def test_the_script_reads_targets(kit: "Kit", work: Path, forks: "Forks") -> None:
    image_id = int(open_cache(kit.cache).image_ids[2])
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = forks.start(code, EXAMPLES / "read_targets.py", kit.cache, image_id, cwd=work)
    assert run.wait() == 0, run.err
    head, of_image, *best = run.out.splitlines()
    assert head == "8 images, tier pyramid, int4"
    assert of_image.startswith(f"image {image_id}: ")
    scores = [float(line.split()[0]) for line in best]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert {line.split("  ")[1] for line in best} <= set(kit.classes)


@pytest.mark.slow
def test_the_tasks_of_the_array_make_one_cache(kit: "Kit", work: Path, tmp_path: Path) -> None:
    """Each task of a Slurm array runs the script by itself; here with sbatch's variables and without a scheduler."""
    script, cache = EXAMPLES / "cache_array.sbatch", tmp_path / "array.zarr"
    command = tmp_path / "kdpipe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kdpipe.pipelines.cli "$@"\n')
    command.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    path = f"{tmp_path}:{plain['PATH']}"
    options = [*kit.data, *kit.VIEW, "--part-size", 4, "--device", "cpu"]
    for task in (1, 0):
        assert not (task == 0 and open_cache(cache, allow_partial=True).is_complete)
        slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": f"{8 + task}", "SLURM_ARRAY_TASK_ID": f"{task}"}
        slurm |= {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
        done = subprocess.run(
            ["bash", script, kit.teacher, cache, *map(str, options)],
            env={**plain, **slurm, "PATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
            cwd=work,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(open_cache(cache).image_ids) == sorted(open_cache(kit.cache).image_ids)


def test_the_notebook_draws_targets(kit: "Kit", work: Path, forks: "Forks") -> None:
    """Its code cells, one after the other, as a kernel runs them."""
    notebook = json.loads((EXAMPLES / "draw_targets.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []
    code = "\n".join("".join(cell["source"]) for cell in cells)
    run = forks.start(code, cwd=work, CACHE=kit.cache, MPLBACKEND="agg")
    assert run.wait() == 0, run.err
    assert run.out.startswith("8 images, pyramid int4")
    for name in ("boxes.png", "pyramid.png"):
        with Image.open(work / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{name} is empty"
