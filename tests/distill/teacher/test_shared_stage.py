"""The frozen head of C4 out of its parameters: what mmdet's own stage and head say."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.heads.shared_stage import SharedStageHead

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


def built(pair: "type[Pair]", style: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor], CacheSpec]:
    """mmdet's stage and box head, their parameters by the names in a detector, and the specification."""
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    stage = MODELS.build({"type": "ResLayer", "depth": 50, "stage": 3, "stride": 2, "style": style, **options})
    stage.eval()
    sizes = {"roi_feat_size": 7, "in_channels": 2048, "num_classes": pair.classes}
    head = MODELS.build({"type": "BBoxHead", "with_avg_pool": True, **sizes}).eval()
    for norm in (module for module in stage.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for name, low in {"weight": 0.5, "bias": -1.0, "running_mean": -1.0, "running_var": 1.0}.items():
            norm.state_dict()[name].uniform_(low, low + 1.5)
    state = {f"roi_head.shared_head.{name}": value for name, value in stage.state_dict().items()}
    changes = {
        "channels": 1024,
        "embedding_dim": 2048,
        "strides": (16,),
        "levels": (),
        "roi_levels": 1,
        "shared_style": style,
    }
    return stage, head, state | pair.state(head), replace(pair.spec, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["caffe", "pytorch"])
def test_says_what_mmdet_says(pair: "type[Pair]", style: str) -> None:
    stage, head, state, spec = built(pair, style)
    features = torch.randn(3, 1024, 14, 14)
    with torch.no_grad():
        wide = stage(features)
        logits, deltas = head(wide)
    rebuilt = frozen_head(state, spec)
    assert isinstance(rebuilt, SharedStageHead)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rebuilt.of_features(features)
    torch.testing.assert_close(actual.embeddings, wide.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.deltas, deltas.unflatten(1, (-1, 4)), rtol=1e-4, atol=1e-4)
    other = SharedStageHead(state, replace(spec, shared_style="pytorch" if style == "caffe" else "caffe"))
    other_outputs = other.of_features(features)
    assert float((other_outputs.embeddings - actual.embeddings).norm() / actual.embeddings.norm()) > 0.01
    empty = rebuilt.of_features(features[:0])
    assert (empty.embeddings.shape, empty.deltas.shape) == ((0, 2048), (0, pair.classes, 4))


def test_what_cannot_be_rebuilt_is_named(pair: "type[Pair]") -> None:
    _, _, state, spec = built(pair, "caffe")
    with pytest.raises(TeacherHeadError, match="a shared residual stage of which the cache does not say"):
        frozen_head(state, replace(spec, shared_style=""))
    with pytest.raises(LossInputError, match=r"\[1, 1024, 7, 7\]; expected \[1, 1024, 14, 14\]"):
        SharedStageHead(state, spec).of_features(torch.zeros(1, 1024, 7, 7))
    _, _, state, spec = built(pair, "caffe", norm_cfg={"type": "GN", "num_groups": 8})
    with pytest.raises(TeacherHeadError, match=r"layer4\.0\.gn1\.bias.*Expected bottleneck blocks with batch norms"):
        frozen_head(state, spec)
