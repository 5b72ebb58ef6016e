"""mmdet's own detectors over the bridge, and the bridge's manners as an importer."""

import subprocess
import sys
import textwrap
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdpipe.pipelines  # noqa: F401  (the bridge goes in before mmcv is imported)
from kdpipe.pipelines.mmcv_ops.bridge import install_bridge

pytestmark = [
    # mmdet's old import path of an mmcv module
    pytest.mark.filterwarnings("ignore:``MultiScaleDeformableAttention`` has been moved:ImportWarning"),
    # mmdet's point generator
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]

CONFIGS = [
    "faster-rcnn_r50_fpn_1x_coco",
    "cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head_1x_coco",
]


def small_detector(name: str) -> Any:
    """A detector of mmdet's zoo with a narrow backbone, neck and head, and without pretrained weights."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    (path,) = (Path(mmdet.__file__).parent / ".mim" / "configs").rglob(f"{name}.py")
    model = Config.fromfile(path).model
    model.backbone.update(base_channels=8, init_cfg=None)
    narrow(model)
    model.neck.in_channels = [32, 64, 128, 256]
    return MODELS.build(model)


def narrow(config: Any) -> None:
    """Neck and heads with 32 channels for 256, 32 features for 1,024, few proposals, and no threshold of scores."""
    for key, value in config.items():
        if key.endswith("_channels") and value in (256, 1024):
            config[key] = 32
        elif (key in ("nms_pre", "max_per_img") and value >= 1000) or (key == "num" and value == 512):
            config[key] = 64
        elif key == "score_thr":
            config[key] = 0.0  # an untrained detector is sure of nothing
        for nested in value if isinstance(value, list) else [value]:
            if isinstance(nested, dict):
                narrow(nested)


def batch(detector: Any) -> dict[str, Any]:
    from mmdet.testing import demo_mm_inputs

    made = demo_mm_inputs(2, [[3, 64, 96], [3, 96, 64]], num_classes=80)
    prepared: dict[str, Any] = detector.data_preprocessor(made, True)
    return prepared


@pytest.mark.parametrize("name", CONFIGS)
def test_detector_trains_and_predicts(name: str) -> None:
    torch.manual_seed(0)
    detector = small_detector(name)
    data = batch(detector)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in detector.parameters()]

    losses = detector.loss(data["inputs"], data["data_samples"])
    total, values = detector.parse_losses(losses)
    assert all(torch.isfinite(value).all() for value in values.values())
    total.backward()
    gradients = {n: p.grad for n, p in detector.named_parameters() if p.requires_grad}
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients.values())
    offsets = [n for n in gradients if "conv_offset" in n]
    assert bool(offsets) == ("conv-c3-c5" in name)
    moved = [n for n, g in gradients.items() if g is not None and bool(g.any())]
    assert any(n.startswith("backbone.layer4") for n in moved)
    assert all(n in moved for n in offsets if n.endswith("bias"))
    torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)  # weights without their proper start are wild
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True))

    detector.eval()
    with torch.no_grad():
        results = detector.predict(data["inputs"], data["data_samples"])
    for result in results:
        assert 0 < len(result.pred_instances) <= 100
        assert torch.isfinite(result.pred_instances.bboxes).all()


def test_detector_trains_in_mixed_precision() -> None:
    torch.manual_seed(0)
    detector = small_detector("faster-rcnn_r50_fpn_1x_coco")
    data = batch(detector)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    total.backward()
    gradients = [p.grad for p in detector.roi_head.parameters()]
    assert all(torch.isfinite(value).all() for value in values.values())
    assert all(isinstance(g, Tensor) and bool(torch.isfinite(g).all()) for g in gradients)


def test_soft_nms_serves_a_detector() -> None:
    torch.manual_seed(0)
    detector = small_detector("faster-rcnn_r50_fpn_1x_coco").eval()
    detector.rpn_head.test_cfg.max_per_img = 10
    detector.roi_head.test_cfg.nms = {"type": "soft_nms", "iou_threshold": 0.5, "min_score": 0.0}
    data = batch(detector)
    with torch.no_grad():
        results = detector.predict(data["inputs"], data["data_samples"])
    assert all(len(result.pred_instances) == 100 for result in results)


# As an importer


def run_script(source: str, *path: Path) -> str:
    """What a plain script prints, with `path` before the installed packages."""
    start = f"import sys\nsys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def fake_mmcv(folder: Path, extension: str | None) -> Path:
    (folder / "mmcv").mkdir()
    (folder / "mmcv" / "__init__.py").write_text("")
    if extension is not None:
        (folder / "mmcv" / "_ext.py").write_text(extension)
    return folder


def test_the_bridge_is_light() -> None:
    run_script(
        """
        import kdpipe.pipelines
        assert not {"mmdet", "mmcv", "mmengine", "torch"} & set(sys.modules)
        """
    )


@pytest.mark.slow
def test_mmdet_works_in_a_plain_script() -> None:
    run_script(
        """
        import kdpipe.pipelines
        import mmdet
        from mmdet.apis import init_detector
        from mmcv.utils.env import collect_env
        from mmcv.utils.ext_loader import check_ops_exist
        assert check_ops_exist()
        assert "kdpipe" in collect_env()["MMCV Compiler"]
        """
    )


def test_bridge_stays_away_from_a_compiled_mmcv(tmp_path: Path) -> None:
    path = fake_mmcv(tmp_path, "def nms(): return 'native'\nruns = globals().get('runs', 0) + 1")
    printed = run_script(
        """
        import kdpipe.pipelines
        import mmcv._ext
        print(mmcv._ext.nms(), mmcv._ext.runs, hasattr(mmcv._ext, "roi_align_forward"), "torch" in sys.modules)
        from kdpipe.pipelines.mmcv_ops.bridge import extension_state
        print(extension_state())
        print(mmcv._ext.__spec__.origin)
        """,
        path,
    )
    assert printed.splitlines() == ["native 1 False False", "('native', '')", str(tmp_path / "mmcv" / "_ext.py")]


@pytest.mark.slow
def test_bridge_takes_over_from_ops_that_do_not_load(tmp_path: Path) -> None:
    path = fake_mmcv(tmp_path, None)
    (path / "mmcv" / f"_ext{EXTENSION_SUFFIXES[0]}").write_bytes(b"compiled for another torch")
    printed = run_script(
        """
        import warnings
        import kdpipe.pipelines
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import mmcv._ext
        print(mmcv._ext.nms.__module__)
        print([str(w.message) for w in caught if "kdpipe doctor" in str(w.message)])
        from kdpipe.pipelines.mmcv_ops.bridge import extension_state
        print("state:", extension_state()[0])
        """,
        path,
    )
    assert "kdpipe.pipelines.mmcv_ops.nms" in printed
    assert "mmcv's compiled ops do not load" in printed
    assert "state: broken" in printed


def test_bridge_is_installed_once() -> None:
    before = list(sys.meta_path)
    install_bridge()
    assert sys.meta_path == before
