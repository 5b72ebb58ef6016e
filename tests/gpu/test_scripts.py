"""The way of kdpipe to a GPU machine without a network, as far as a machine with neither a GPU nor CUDA goes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, run.sh itself is what runs these tests")
def test_wheels_are_installed_and_tests_and_benchmark_run(tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}

    def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [str(FOLDER / script), *map(str, args)]
        return subprocess.run(command, env=python, text=True, capture_output=True, timeout=540)

    fetched = run("wheels.sh", wheels, version)
    assert fetched.returncode == 0, fetched.stderr
    assert {wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")} >= {"mmdet", "mmengine", "mmcv_lite", "zarr"}

    ran = run("run.sh", wheels, out, "--device", "cpu", "--small", "--only", "teacher/x101/forward")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tests = (out / "tests.log").read_text()
    assert "needs a CUDA device" in tests
    assert "failed" not in tests
    assert "teacher/x101/forward pass" in (out / "gpu.jsonl").read_text()
