import pytest
import torch

from kdpipe.cache import CacheError
from kdpipe.cache.identity import difference, digest_json, digest_tensors


def test_tensor_digest_ignores_order_and_strides() -> None:
    a, b = torch.randn(3, 4), torch.arange(5)
    first = digest_tensors({"a": a, "b": b})
    assert first == digest_tensors({"b": b, "a": a.t().contiguous().t()})
    assert len(first) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(6)},
        {"b": torch.zeros(3, 2)},
        {"a": torch.zeros(3, 2, dtype=torch.float16)},
        {"a": torch.zeros(3, 2), "c": torch.zeros(0)},
        {"a": torch.zeros(3, 2).index_fill(0, torch.tensor([2]), 1e-45)},
    ],
)
def test_tensor_digest_sees_every_difference(other: dict[str, torch.Tensor]) -> None:
    assert digest_tensors(other) != digest_tensors({"a": torch.zeros(3, 2)})


def test_tensor_digest_of_odd_tensors() -> None:
    assert digest_tensors({"a": torch.tensor(3), "b": torch.zeros(0, 2), "c": torch.ones(2, dtype=torch.bfloat16)})


def test_json_digest_is_canonical() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": (1, 2), "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": "1"})
    with pytest.raises(CacheError, match="JSON values"):
        digest_json({"a": {1, 2}})
    with pytest.raises(CacheError, match="JSON values"):
        digest_json({"a": float("nan")})


def test_difference_names_what_differs() -> None:
    first = {"teacher": "x", "options": {"scale": [1333, 800], "same": 1}, "gone": {}}
    second = {"teacher": "y", "options": {"scale": [640, 480], "same": 1, "new": None}}
    assert difference(first, second) == [
        "gone: found {}, wanted nothing",
        "options.new: found nothing, wanted null",
        "options.scale: found [1333, 800], wanted [640, 480]",
        'teacher: found "x", wanted "y"',
    ]
    assert difference(first, first) == []
