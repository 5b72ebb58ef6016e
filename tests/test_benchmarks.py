"""Benchmarks that can only be run elsewhere still run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_benchmark_measures_every_row_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), "--device", "cpu", "--small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    ended = subprocess.run([*command, "--seconds", "840"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()][1:]
    assert {row["row"]: row["note"] for row in rows if row["note"]} == {}
    listed = subprocess.run([*command, "--list"], env=environment, capture_output=True, text=True, check=True)
    assert [row["row"] for row in rows] == listed.stdout.splitlines()
    cells = {row["row"]: row["cells"] for row in rows}
    from_cache = cells["train/faster-rcnn/float32/pyramid, student's RoIs"]
    assert from_cache["s/step"] > 0
    assert from_cache["positive"] > 0
    assert cells["teacher/x101/pyramid"]["to the end, x forward pass"] > 0
    stages = cells["stages/x101/pyramid"]
    assert "not found" not in stages, "a function whose time is taken has another name by now"
    assert sum(isinstance(value, float) and value > 0 for value in stages.values()) > 10
    table = (out / "gpu.md").read_text()
    assert all(f"| {row['row'].partition('/')[2]} |" in table for row in rows)
    assert not list(tmp_path.glob("kdpipe-gpu-*"))


def test_gpu_benchmark_without_a_gpu_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "no CUDA device" in ended.stderr
