"""The frozen semantic branch of HTC out of its parameters: what mmdet's own branch sees."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.heads.semantic import SemanticBranch

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

pytestmark = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``:UserWarning")


def built(
    pair: "type[Pair]", fusion: int = 1, size: int = 14, **options: Any
) -> tuple[Any, dict[str, Tensor], CacheSpec]:
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    sizes = {"in_channels": pair.channels, "conv_out_channels": pair.channels, "num_classes": 9}
    branch = MODELS.build(
        {"type": "FusedSemanticHead", "num_ins": 5, "fusion_level": fusion, **sizes, **options}
    ).eval()
    state = {f"roi_head.semantic_head.{name}": value for name, value in branch.state_dict().items()}
    return branch, state, replace(pair.spec, semantic=(fusion, size))


@pytest.mark.parametrize("fusion", [0, 1, 3])
@pytest.mark.parametrize("size", [7, 14])
def test_sees_what_mmdet_sees(pair: "type[Pair]", fusion: int, size: int) -> None:
    branch, state, spec = built(pair, fusion, size)
    levels = [torch.randn(pair.channels, 96 // stride, 128 // stride) for stride in (4, 8, 16, 32)]
    levels.append(torch.randn(pair.channels, 2, 2))
    rebuilt = SemanticBranch(state, spec)
    with torch.no_grad():
        expected = branch(tuple(level[None] for level in levels))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rebuilt.map_of(levels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    stride = spec.strides[fusion]
    align = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0}
    extractor = MODELS.build(
        {"type": "SingleRoIExtractor", "roi_layer": align, "out_channels": 6, "featmap_strides": [stride]}
    )
    boxes = torch.tensor([[3.0, 5.0, 60.0, 90.0], [0.0, 0.0, 128.0, 96.0], [100.0, 20.0, 120.0, 33.0]])
    rois = torch.cat([torch.zeros(3, 1), boxes], dim=1)
    pooled = functional.adaptive_avg_pool2d(extractor([expected], rois), 7)
    torch.testing.assert_close(rebuilt.at(actual, boxes), pooled, rtol=1e-4, atol=1e-5)
    assert float(pooled.abs().mean()) > 1e-3


def test_what_cannot_be_rebuilt_is_named(pair: "type[Pair]") -> None:
    _, state, spec = built(pair)
    with pytest.raises(TeacherHeadError, match="a semantic branch of which the cache does not say"):
        SemanticBranch(state, replace(spec, semantic=()))
    _, state, spec = built(pair, norm_cfg={"type": "BN"})
    with pytest.raises(TeacherHeadError, match=r"bn\.bias.*Expected convolutions without norms"):
        SemanticBranch(state, spec)
