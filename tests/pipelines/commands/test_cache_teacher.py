"""`kdpipe cache-teacher`, as users type it: what the cache holds is what the teacher says."""

import errno
import json
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.models.layers import multiclass_nms
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import MAX_OBJECTS
from kdpipe.cache.write.selection import merge_unlikely
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.teacher import Teacher, load_teacher, teacher_config

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Kit

FIELDS = {
    "predictions": {"boxes", "logits", "deltas"},
    "embeddings": {"boxes", "logits", "deltas", "embeddings"},
    "objects": {"boxes", "logits", "deltas", "embeddings", "roi_features"},
    "pyramid": {"boxes", "logits", "deltas", "embeddings", "features"},
}


@pytest.fixture(scope="module")
def teacher(kit: "Kit") -> Teacher:
    checkpoint = load_checkpoint(kit.teacher)
    return load_teacher(checkpoint, teacher_config(checkpoint, None), proposals=40, device=torch.device("cpu"))


def close(actual: torch.Tensor | None, expected: torch.Tensor | None, dtype: str, scale: torch.Tensor | None) -> bool:
    """Equal as far as the storage type allows: about half a step of int8, half precision, or 1e-6."""
    assert actual is not None
    assert expected is not None
    if scale is not None:
        step = scale.float().reshape(*scale.shape, *[1] * (expected.dim() - scale.dim()))
        return bool(((actual.float() * step - expected).abs() <= 0.51 * step + 1e-7).all())
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    return torch.allclose(
        actual.float(), expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max()))
    )


@pytest.mark.parametrize(
    ("tier", "dtype", "codec"),
    [
        ("predictions", "float32", "none"),
        ("embeddings", "float16", "lz4"),
        ("objects", "int4", "zstd"),
        ("objects", "int8", "zstd"),
        ("objects", "float32", "lz4"),
        ("pyramid", "int4", "zstd"),
        ("pyramid", "int8", "none"),
        ("pyramid", "float16", "zstd"),
        ("pyramid", "float32", "zstd"),
    ],
)
def test_holds_what_the_teacher_says(
    kit: "Kit", work: Path, teacher: Teacher, tier: str, dtype: str, codec: str
) -> None:
    out = work / "x.zarr"
    kind = ("--targets", tier, "--dtype", dtype, "--codec", codec, "--views", "identity,hflip")
    ended = kit.run("cache-teacher", *kit.source, *kit.VIEW, *kind, "--out", out)
    assert "8 images, 0 skipped" in ended.out
    cache, data = open_cache(out), load_coco(kit.ann, kit.img)
    assert set(cache.spec.fields) == FIELDS[tier]
    assert cache.image_ids.tolist() == [image.image_id for image in data.images]
    others = "float32" if dtype == "float32" else "float16"
    for info in data.images[::5]:
        for view in ("identity", "hflip"):
            targets = cache.targets(info.image_id, view)
            record = ask(teacher, kit.img / info.file_name, data.gt_boxes(info.image_id), cache.spec, info, view)
            assert (targets.num_proposals, targets.input_size) == (record.num_proposals, record.input_size)
            assert targets.num_proposals <= 40
            assert torch.equal(targets.boxes, record.boxes)
            assert targets.num_jittered == record.num_jittered > 64 * (tier == "objects") - 1
            truth = targets.boxes[targets.num_proposals + targets.num_jittered :]
            assert np.allclose(truth, data.gt_boxes(info.image_id), atol=1e-4)
            assert close(targets.logits, record.logits, others, None)
            assert record.deltas is not None
            assert record.logits is not None
            deltas, labels = record.deltas, torch.from_numpy(data.gt_labels(info.image_id))
            if cache.spec.is_quantized:
                deltas = merge_unlikely(deltas, record.logits, record.boxes, labels, 0.01)
            assert close(targets.deltas, deltas, others, None)
            if "embeddings" in FIELDS[tier]:
                assert close(targets.embeddings, record.embeddings, others, targets.embedding_scale)
            if "roi_features" in FIELDS[tier]:
                assert record.roi_features is not None
                assert targets.roi_rows is not None
                assert len(data.gt_boxes(info.image_id)) <= len(targets.roi_rows) <= MAX_OBJECTS
                expected = record.roi_features[targets.roi_rows.long()]
                if dtype == "int4":
                    assert float((targets.float_roi_features() - expected).norm() / expected.norm()) < 0.2
                else:
                    assert close(targets.roi_features, expected, dtype, targets.roi_scale)
            if "features" in FIELDS[tier]:
                for level, expected in enumerate(record.features or ()):
                    mine = targets.pyramid()[level]
                    assert mine is not None
                    if dtype == "int4":
                        assert float((mine - expected).norm() / expected.norm()) < 0.2
                    elif targets.scale is None:
                        assert close(mine, expected, dtype, None)
                    else:
                        assert close(targets.features[level], expected, dtype, targets.scale[level])  # type: ignore[index]
    state = teacher.model.state_dict()
    head = cache.head()
    assert all(torch.equal(head[name], state[name]) for name in head)
    assert {name for name in state if name.startswith(("rpn_head.", "roi_head."))} == set(head)


def ask(teacher: Teacher, path: Path, boxes: Any, spec: Any, info: Any, view: str) -> TeacherRecord:
    return teacher.record(
        read_image(path), boxes, spec=spec, image_id=info.image_id, file_name=info.file_name, view=view
    )


def test_detections_from_the_cache_are_those_of_the_live_teacher(kit: "Kit", work: Path, teacher: Teacher) -> None:
    """By mmdet's own pipeline and prediction, given as many proposals: so the AP from the cache is the teacher's."""
    out = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "predictions", "--dtype", "float32", "--out", out)
    cache, data = open_cache(out), load_coco(kit.ann, kit.img)
    cfg = teacher_config(load_checkpoint(kit.teacher), None)
    pipeline = Compose([step for step in cfg.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"])
    test_cfg = teacher.model.roi_head.test_cfg
    total = 0
    for info in data.images:
        targets = cache.targets(info.image_id)
        scores = torch.softmax(targets.logits, dim=1)[: targets.num_proposals]  # type: ignore[arg-type]
        boxes = targets.class_boxes(cache.spec)[: targets.num_proposals]
        actual, labels = multiclass_nms(
            boxes.flatten(1), scores, test_cfg.score_thr, test_cfg.nms, test_cfg.max_per_img
        )
        sample = pipeline({"img_path": str(kit.img / info.file_name), "img_id": info.image_id})
        with torch.no_grad():
            live = teacher.model.test_step({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]})[0]
        assert torch.equal(labels, live.pred_instances.labels)
        assert torch.allclose(actual[:, 4], live.pred_instances.scores, atol=1e-6)
        assert torch.allclose(actual[:, :4], live.pred_instances.bboxes, atol=1e-3)
        total += len(labels)
    assert total > 8 * 10


def test_padding_of_a_batch_does_not_leak_in(kit: "Kit", teacher: Teacher) -> None:
    """The cached predictions are those of the whole detector's box head at the cached boxes of the image alone."""
    cache, data = open_cache(kit.cache), load_coco(kit.ann, kit.img)
    info = data.images[3]
    targets = cache.targets(info.image_id, fields=["logits"])
    with torch.no_grad():
        pyramid, _ = teacher.pyramid(read_image(kit.img / info.file_name), targets.input_size, False)
        result = teacher.model.roi_head._bbox_forward(pyramid, bbox2roi([targets.boxes]))
    assert torch.allclose(targets.logits.float(), result["cls_score"], atol=0.05)  # type: ignore[union-attr]


def test_limit_and_parts(kit: "Kit", work: Path) -> None:
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--limit", 5, "--part-size", "32KiB", "--out", "x.zarr")
    cache, data = open_cache("x.zarr"), load_coco(kit.ann, kit.img)
    assert cache.image_ids.tolist() == [image.image_id for image in data.images[:5]]
    assert 2 < len(list((work / "x.zarr" / "parts").glob("0*"))) <= 5
    kit.train_student(work / "w", "--methods", "cls", cache=work / "x.zarr")  # it trains on the five


def test_default_name_comes_from_the_data_set(kit: "Kit", work: Path) -> None:
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "predictions")
    assert len(open_cache(work / "shapes.zarr")) == 8


SMALL_PARTS = ("--part-size", "32KiB", "--out", "x.zarr")


def test_interrupted_and_resumed_is_the_same_byte_for_byte(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("cache-teacher", *kit.source, *kit.VIEW, *SMALL_PARTS)
    asked_ids: list[int] = []
    record = Teacher.record

    def interrupt(self: Teacher, *args: Any, **options: Any) -> TeacherRecord:
        asked_ids.append(options["image_id"])
        if len(asked_ids) == 5:
            raise KeyboardInterrupt
        return record(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "record", interrupt)
        ended = kit.run(*command, code=130)
    assert "the same command goes on from there" in ended.out
    partial = open_cache("x.zarr", allow_partial=True)
    assert 0 < len(partial) < 5
    partial.targets(int(partial.image_ids[0]))
    assert "incomplete" in kit.refused("train-student", "--cache", "x.zarr")
    before = kit.tree(work / "x.zarr")

    others = {"--proposals": 30, "--targets": "embeddings", "--dtype": "float16", "--scale": "64x48", "--limit": 7}
    for option, value in others.items():
        message = kit.refused(*command, option, value)
        assert "made with something else" in message
        assert kit.tree(work / "x.zarr") == before

    ended = kit.run(*command)
    assert f"{len(partial)} of 8 images are cached already" in ended.out
    assert f"{8 - len(partial)} new images" in ended.out
    done = kit.tree(work / "x.zarr")
    kit.run(*command[:-1], "undisturbed.zarr")
    assert kit.tree(work / "undisturbed.zarr") == done
    assert "0 new images" in kit.run(*command).out
    assert kit.tree(work / "x.zarr") == done


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_process_stopped_in_between(kit: "Kit", work: Path, forks: "Forks", number: signal.Signals) -> None:
    ann = kit.annotations(work / "many.json", copies=6)
    data = ("--ann-file", ann, "--img-dir", kit.img)
    command = ("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, *SMALL_PARTS)
    process = forks.start(kit.COMMAND, *command, cwd=work)
    while not (work / "x.zarr" / "parts" / "00002").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send(number)
    assert process.wait() == (-number if number == signal.SIGKILL else 130), process.err
    assert 0 < len(open_cache("x.zarr", allow_partial=True)) < 48
    kit.run(*command)
    kit.run(*command[:-1], "undisturbed.zarr")
    for folder in ("parts", "head", "plan"):  # the recorded config is laid out otherwise in this process, see `kit`
        assert kit.tree(work / "x.zarr" / folder) == kit.tree(work / "undisturbed.zarr" / folder)


def broken(kit: "Kit", folder: Path, how: str) -> tuple[Path, Path]:
    """A copy of the images with one of them spoilt; returns the folder, and that image."""
    shutil.copytree(kit.img, folder)
    path = sorted(folder.iterdir())[2]
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "no image": b"text" * 99}[how])
    return folder, path


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "no image"])
def test_bad_images_stop_the_run_or_are_skipped(kit: "Kit", work: Path, how: str) -> None:
    images, path = broken(kit, work / "images", how)
    data = ("--ann-file", kit.ann, "--img-dir", images, *kit.VIEW, "--targets", "predictions", "--out", "x.zarr")
    message = kit.refused("cache-teacher", "--ckpt", kit.teacher, *data)
    assert str(path) in message
    ended = kit.run("cache-teacher", "--ckpt", kit.teacher, *data, "--skip-bad-images")
    assert "7 images, 1 skipped" in ended.out
    assert "7 new images" in ended.out
    assert f"skipped: image {path}" in ended.out.replace("\n", "")
    cache = open_cache("x.zarr")
    assert [entry["file_name"] for entry in cache.skipped] == [path.name]
    assert str(path) in cache.skipped[0]["reason"]
    if how == "truncated":  # training leaves the image out
        kit.train_student(work / "w", "--methods", "pred", cache=work / "x.zarr")
        kit.train_student(work / "plain", "--methods", "none", cache=work / "x.zarr")


def test_images_are_not_skipped_for_their_folder_or_disk(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ("cache-teacher", "--ckpt", kit.teacher, "--ann-file", kit.ann, *kit.VIEW, "--targets", "predictions")
    (work / "empty").mkdir()
    options = ("--out", "x.zarr", "--skip-bad-images", "--part-size", "1KiB")
    message = kit.refused(*start, "--img-dir", work / "empty", *options)
    assert "None of the 8 images of" in message
    assert "--img-dir" in message
    read = Path.read_bytes
    stale = sorted(kit.img.iterdir())[5]

    def read_bytes(path: Path) -> bytes:
        if path == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        message = kit.refused(*start, "--img-dir", kit.img, *options)
    assert f"image {stale} cannot be read (Stale file handle)" in message
    assert open_cache("x.zarr", allow_partial=True).skipped == []
    ended = kit.run(*start, "--img-dir", kit.img, *options)
    assert "8 images, 0 skipped" in ended.out


def test_image_of_another_size_than_annotated(kit: "Kit", work: Path) -> None:
    """An image that is not of the size in the annotations would have misplaced boxes."""
    content = json.loads(kit.ann.read_text())
    content["images"][1]["width"] += 10
    ann = work / "other.json"
    ann.write_text(json.dumps(content))
    message = kit.refused("cache-teacher", "--ckpt", kit.teacher, "--ann-file", ann, "--img-dir", kit.img, *kit.VIEW)
    assert content["images"][1]["file_name"] in message
    assert "138 x 96" in message


def old_layout(config: Config) -> str:
    """The text of the same detector in the layout of mmdet 2.x."""
    config = config.copy()
    model = config.model.to_dict()
    before = model.pop("data_preprocessor")
    normalise = {"mean": before["mean"], "std": before["std"], "to_rgb": before["bgr_to_rgb"]}
    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **normalise},
        {"type": "Pad", "size_divisor": before["pad_size_divisor"]},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    view = {"type": "MultiScaleFlipAug", "img_scale": (128, 96), "flip": False, "transforms": steps}
    test = {"type": "CocoDataset", "pipeline": [{"type": "LoadImageFromFile"}, view]}
    text: str = Config({"model": model, "img_norm_cfg": normalise, "data": {"test": test, "val": test}}).pretty_text
    return text


def test_config_from_the_checkpoint_or_by_name(kit: "Kit", work: Path) -> None:
    old, bare = work / "old.pth", work / "bare.pth"
    kit.save_detector(old, kit.config(), text=old_layout(kit.config()))
    torch.save(torch.load(kit.teacher, weights_only=True)["state_dict"], bare)
    file = work / "config.py"
    file.write_text(kit.config().pretty_text)
    expected = kit.tree(kit.cache / "parts")
    for name, ckpt, config in (("old", old, ()), ("bare", bare, ("--config", file))):
        options = ("--proposals", 40, "--out", f"{name}.zarr")  # the scale is the config's
        kit.run("cache-teacher", "--ckpt", ckpt, *config, *kit.data, *options)
        assert kit.tree(work / f"{name}.zarr" / "parts") == expected
    assert "carries no config" in kit.refused("cache-teacher", "--ckpt", bare, *kit.data)
    by_name = ("cache-teacher", "--ckpt", bare, *kit.data, "--config")
    message = kit.refused(*by_name, "faster-rcnn_r50_fpn_1x_coco")  # found, and not the config of these weights
    assert "of another shape" in message
    assert "faster-rcnn_r50_fpn_1x_coco" in kit.refused(*by_name, "faster-rcnn_r50_fpn_1x_cocoo")
    assert not list(work.glob("shapes.zarr"))


def test_other_normalisation_is_not_the_same_teacher(kit: "Kit", work: Path) -> None:
    shutil.copytree(kit.cache, work / "x.zarr")
    config = kit.config()
    config.model.data_preprocessor.mean = [0.0, 0.0, 0.0]
    (work / "config.py").write_text(config.pretty_text)
    shutil.rmtree(work / "x.zarr" / "parts" / "00000")
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--out", "x.zarr")
    assert "teacher.config" in kit.refused(*command, "--config", work / "config.py")
    kit.run(*command)
    assert kit.tree(work / "x.zarr") == kit.tree(kit.cache)


def test_mask_branch_is_ignored(kit: "Kit", work: Path) -> None:
    config = kit.config("mask-rcnn_r50_fpn_1x_coco")
    ckpt = kit.save_detector(work / "mask.pth", config)
    assert any("mask_head" in name for name in torch.load(ckpt, weights_only=True)["state_dict"])
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--limit", 2, "--out", "x.zarr")
    assert not [name for name in open_cache("x.zarr").head() if "mask" in name]


def test_teachers_of_other_families_are_refused(kit: "Kit", work: Path) -> None:
    config = kit.config("retinanet_r50_fpn_1x_coco")
    message = kit.refused("cache-teacher", "--ckpt", kit.save_detector(work / "r.pth", config), *kit.data)
    assert "RetinaNet" in message
    assert "two-stage" in message
    assert not list(work.glob("*.zarr"))


def test_teacher_that_does_not_fit_its_config(kit: "Kit", work: Path) -> None:
    content = torch.load(kit.teacher, weights_only=True)
    del content["state_dict"]["neck.lateral_convs.0.conv.bias"]
    content["state_dict"]["extra.weight"] = torch.zeros(1)
    content["state_dict"]["rpn_head.rpn_cls.bias"] = torch.zeros(5)
    torch.save(content, work / "t.pth")
    message = kit.refused("cache-teacher", "--ckpt", work / "t.pth", *kit.data)
    for part in ("1 missing: neck.lateral_convs.0.conv.bias", "1 unexpected: extra.weight", "checkpoint (5,)"):
        assert part in message


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_malicious_checkpoint_is_refused_before_it_runs(kit: "Kit", work: Path) -> None:
    content = torch.load(kit.teacher, weights_only=True)
    content["meta"]["hook_msgs"] = Payload(work / "ran")
    torch.save(content, work / "t.pth")
    for command in (("cache-teacher", *kit.data, *kit.VIEW), ("evaluate", *kit.data)):
        message = kit.refused(*command, "--ckpt", work / "t.pth")
        assert "--trust-checkpoint" in message
        assert not (work / "ran").exists()
    options = ("--targets", "predictions", "--limit", 1, "--trust-checkpoint")
    kit.run("cache-teacher", *kit.data, *kit.VIEW, "--ckpt", work / "t.pth", *options)
    assert (work / "ran").exists()
