"""Distillation from a config file of mmengine, as examples/distil.py shows it, without the command line."""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from mmcv.transforms import Compose
from mmdet.utils import register_all_modules
from PIL import Image

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.images import ImageError

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Kit

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
DATA = """
train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=4, multiprocessing_context=None)
train_dataloader["dataset"].update(
    type="CocoDataset",
    data_root=None,
    ann_file={ann!r},
    data_prefix=dict(img={img!r}),
    metainfo=dict(classes={classes!r}),
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
model["ckd"] = dict(queue_size=256)
"""


@pytest.mark.parametrize("roi_source", ["student", "teacher"])
def test_the_example(kit: "Kit", work: Path, forks: "Forks", roi_source: str) -> None:
    config, script = ((EXAMPLES / name).read_text(encoding="utf-8") for name in ("distil.py", "train.py"))
    base = kit.config(channels=8, fc=24)
    base.train_pipeline = base.train_dataloader.dataset.pipeline
    (work / "base.py").write_text(base.pretty_text)
    config = config.replace("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "./base.py")
    config = config.replace('"coco.zarr"', repr(str(kit.cache))).replace(
        'roi_source="student"', f'roi_source="{roi_source}"'
    )
    data = DATA.format(ann=str(kit.ann), img=f"{kit.img}/", classes=kit.classes)
    (work / "distil.py").write_text(config + data)
    training = forks.start(script, cwd=work)
    assert training.wait() == 0, training.err
    state = torch.load(work / "work_dirs" / "distil" / "epoch_1.pth", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "sgfi", "ckd"}


def test_the_example_names_a_replaced_image(kit: "Kit", work: Path) -> None:
    """The keys of its `PackDetInputs` are enough for the message."""
    register_all_modules(init_default_scope=True)
    (keys,) = re.findall(r"meta_keys=(\(.*?\))", (EXAMPLES / "distil.py").read_text(encoding="utf-8"))
    pack = {"type": "PackDetInputs", "meta_keys": ast.literal_eval(keys)}
    reads = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (64, 64), "keep_ratio": True}]
    add = {"type": "AddTeacherTargets", "cache": str(kit.cache), "methods": ["sgfi"], "roi_source": "student"}
    image_id = int(open_cache(kit.cache).image_ids[0])
    path = work / "replaced.png"
    Image.new("RGB", (77, 55)).save(path)
    sample = {"img_id": image_id, "img_path": str(path)}
    with pytest.raises(ImageError, match=r"replaced\.png is 77 x 55 pixels, and was 128 x 96"):
        Compose([*reads, pack, add])(dict(sample))
    pack["meta_keys"] = [key for key in pack["meta_keys"] if key not in ("img_path", "homography_matrix")]
    with pytest.raises(KdpipeError, match=r"lacks homography_matrix, img_path, .* in meta_keys"):
        Compose([*reads, pack, add])(dict(sample))
