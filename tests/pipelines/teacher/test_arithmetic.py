"""On a GPU the teacher computes in float32 in full, by algorithms that give equal bits; elsewhere nothing changes."""

from typing import Any

import pytest
import torch

from kdpipe.pipelines.teacher.arithmetic import full_precision, in_full_precision


def switches() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    values: dict[str, Any] = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    if hasattr(cudnn, "conv"):
        return {**values, "conv": cudnn.conv.fp32_precision, "matmul": matmul.fp32_precision}
    return {**values, "conv": cudnn.allow_tf32, "matmul": matmul.allow_tf32}


def test_switches_are_set_for_a_gpu_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = switches()
    assert before["conv"] in ("tf32", True)  # as torch has it
    exact = "ieee" if hasattr(torch.backends.cudnn, "conv") else False
    with pytest.raises(ValueError, match="inside"), full_precision(torch.device("cuda", 0)):
        assert switches() == {"benchmark": False, "deterministic": True, "conv": exact, "matmul": exact}
        raise ValueError("inside")
    assert switches() == before
    with full_precision(torch.device("cpu")):
        assert switches() == before


def test_a_method_runs_with_them() -> None:
    class Thing:
        device = torch.device("cuda", 0)

        @in_full_precision
        def ask(self, factor: int, *, plus: int) -> tuple[int, bool]:
            return 2 * factor + plus, torch.backends.cudnn.deterministic

    assert Thing().ask(3, plus=1) == (7, True)
    assert not torch.backends.cudnn.deterministic
