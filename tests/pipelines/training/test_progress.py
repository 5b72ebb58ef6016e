import pytest
import torch

from kdpipe.pipelines.training.progress import PeakMemoryHook


def test_peak_memory_is_that_of_all_steps_and_of_what_comes_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look begins anew: mmengine's log has forgotten the peak."""
    looks = iter([3, 2, 5])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(looks))
    hook = PeakMemoryHook()
    for step in range(2):
        hook.after_train_iter(None, step)
    assert hook.peak == 3
    hook.after_train(None)
    assert hook.peak == 5
