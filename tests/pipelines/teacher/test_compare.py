"""A cache changes nothing: targets, losses and gradients are those beside the live teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from rich.console import Console
from torch import Tensor
from torchvision.ops import roi_align

from kdpipe.cache.read.reader import open_cache
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.methods import needed_fields
from kdpipe.distill.outputs import BatchRois, TeacherMap
from kdpipe.distill.rois.align import roi_align_levels
from kdpipe.distill.rois.sampling import RoiSampling
from kdpipe.distill.teacher.any_box import TeacherView, apply_teacher_head, read_teacher_view
from kdpipe.distill.teacher.cached_boxes import read_roi_targets
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.maps import WarpedMaps
from kdpipe.distill.teacher.targets import RoiTargets, teacher_roi_features
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.live import LiveTeacher
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config
from kdpipe.pipelines.training.config import training_config
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.transforms import AddTeacherTargets, with_teacher_targets

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

IMAGES, SCALE = 4, (160, 120)
CLASSES = ("RBC", "WBC", "Platelets")
MAPS = ("whole", "gt-mask", "anchor-mask", "gaussian-mask", "pkd")
METHODS = ("sgfi", "ckd", "cls", "reg", "careg", "roifi", "cross", "dist", "box", *MAPS)
DENSE_METHODS = ("sgfi", "ckd", "pred", "roifi", "cross", "dist", "reg", "box", *MAPS)
STUDENTS = {"faster-rcnn": METHODS, "retinanet": DENSE_METHODS, "fcos": DENSE_METHODS}
OF_MAPS = {name.replace("-", "_") for name in MAPS}
LOSSES = {
    "faster-rcnn": {
        "sgfi",
        "ckd",
        "kd_cls",
        "kd_reg",
        "kd_careg",
        "kd_box",
        "roifi",
        "cross",
        "dist",
        "rpn_cls",
        *OF_MAPS,
    },
    "retinanet": {"sgfi", "ckd", "kd_cls", "kd_reg", "kd_box", "roifi", "cross", "dist", "cls", "bbox", *OF_MAPS},
    "fcos": {
        "sgfi",
        "ckd",
        "kd_cls",
        "kd_reg",
        "kd_box",
        "roifi",
        "cross",
        "dist",
        "cls",
        "bbox",
        "centerness",
        *OF_MAPS,
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*meshgrid:UserWarning")  # of mmdet's FCOS head
VIEW = ("--scale", "160x120", "--proposals", "40", "--codec", "none")


class BloodCells:
    """Photographs, an untrained teacher, its caches, and a narrower student."""

    def __init__(self, kit: "Kit", folder: Path, bccd: Path) -> None:
        self.kit, self.folder = kit, folder
        self.ann, self.img = bccd / "train.json", bccd / "JPEGImages"
        self.data: DetectionData = load_coco(self.ann, self.img, IMAGES).copied_to(folder / "train.json")
        self.data.write_copy()
        self.ckpt = kit.save_detector(folder / "t.pth", kit.config(classes=3), self.data.class_names)
        checkpoint = load_checkpoint(self.ckpt)
        cfg = teacher_config(checkpoint, None)
        self.teacher = load_teacher(checkpoint, cfg, proposals=40, device=torch.device("cpu"))
        self.student = kit.config(channels=8, fc=24, classes=3)
        dense = {family: kit.dense(family, classes=3).model for family in ("retinanet", "fcos")}
        self.models = {"faster-rcnn": self.student.model, **dense}

    def cache(self, dtype: str, views: str = "identity,hflip") -> Path:
        out = self.folder / f"{dtype}-{views}.zarr"
        if not out.exists():
            source = ("--ckpt", self.ckpt, "--ann-file", self.ann, "--img-dir", self.img, "--limit", IMAGES)
            self.kit.run("cache-teacher", *source, *VIEW, "--views", views, "--dtype", dtype, "--out", out)
        return out

    def dataset(self, cache: Path, flip: bool) -> Any:
        """The images as a training's pipeline hands them out, all flipped or none."""
        cfg: Config = training_config(
            self.student, self.data, None, TrainingOptions(epochs=1, scale=SCALE), Console(quiet=True)
        )
        dataset = cfg.train_dataloader.dataset
        for transform in dataset.pipeline:
            if transform["type"] == "RandomFlip":
                transform["prob"] = float(flip)
        add = {"type": "AddTeacherTargets", "cache": str(cache), "methods": METHODS, "roi_source": "student"}
        dataset.pipeline = with_teacher_targets(dataset.pipeline, add)
        built = DATASETS.build(dataset)
        built.full_init()
        return built

    def batch(self, cache: Path, flip: bool) -> Any:
        """All of these images."""
        dataset = self.dataset(cache, flip)
        return pseudo_collate([dataset[index] for index in range(IMAGES)])

    def detector(self, source: Any, family: str = "faster-rcnn") -> DistilledDetector:
        """The same student of a family whatever the source, with a queue that is not empty."""
        spec = open_cache(self.cache("float32")).spec.to_json()  # which may be made now, with random numbers
        torch.manual_seed(0)
        ckd = {"dim": 16, "queue_size": 512}
        model = DistilledDetector(self.models[family], spec, STUDENTS[family], source, ckd=ckd)
        model.init_weights()
        boxes = 100 * torch.rand(300, 2).repeat(1, 2) + torch.tensor([0.0, 0.0, 60.0, 60.0])
        earlier = torch.randn(300, model.spec.embedding_dim).relu(), boxes, torch.randint(1, 9, (300,))
        model.ckd.queue.push(TeacherKeys(*earlier))
        model.train()
        return model

    def cached(self, dtype: str, family: str = "faster-rcnn") -> DistilledDetector:
        return self.detector({"type": "CachedTargets", "cache": str(self.cache(dtype))}, family)

    def pyramid(self, number: int, flip: bool) -> tuple[Tensor, ...]:
        """The teacher's of a photograph, which it sees at 160 x 120."""
        image = read_image(self.img / self.data.images[number].file_name)
        with torch.no_grad():
            return self.teacher.pyramid(image, (120, 160), flip)[0]

    def live(self, family: str = "faster-rcnn") -> DistilledDetector:
        return self.detector(LiveTeacher(self.teacher, open_cache(self.cache("float32")).spec), family)


@pytest.fixture(scope="module")
def cells(kit: "Kit", bccd: Path, tmp_path_factory: pytest.TempPathFactory) -> BloodCells:
    return BloodCells(kit, tmp_path_factory.mktemp("cells"), bccd)


def step(model: DistilledDetector, batch: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """All losses of a step, and the gradient of each with respect to every parameter that it reaches."""
    torch.manual_seed(3)
    losses = model(**model.data_preprocessor(batch, True), mode="loss")
    values = {name: torch.stack(x).sum() if isinstance(x, list) else x for name, x in losses.items() if "loss" in name}
    parameters = dict(model.named_parameters())
    gradients = {}
    for name, value in values.items():
        raw_gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients[name] = {p: g for p, g in zip(parameters, raw_gradients, strict=True) if g is not None}
    return {name: value.detach() for name, value in values.items()}, gradients


def difference(actual: Tensor | None, expected: Tensor) -> float:
    """Relative, in the norm of the whole tensor."""
    assert actual is not None
    return (
        float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
        if expected.any()
        else float(actual.abs().max())
    )


def said(model: DistilledDetector, batch: Any, rois: BatchRois, needs: Any) -> Any:
    views = model.data_preprocessor(batch, True)["targets"]
    return apply_teacher_head(views, rois, TeacherHead(model.teacher.head_state(), model.spec), model.spec, needs)


def rois_of(cells: BloodCells, flip: bool) -> BatchRois:
    """Boxes of all sizes anywhere in the student's view, none of them the teacher's, every third a positive."""
    g = torch.Generator().manual_seed(int(flip))
    low = torch.rand(60, 2, generator=g) * torch.tensor([120.0, 80.0])
    boxes = torch.cat([low, low + 2 + torch.rand(60, 2, generator=g) * torch.tensor([36.0, 36.0])], dim=1)
    boxes[::10] = torch.tensor([0.0, 0.0, 160.0, 120.0])
    rois = torch.cat([torch.arange(60)[:, None] // 15, boxes], dim=1)
    return BatchRois(rois, torch.zeros(60, dtype=torch.int64), torch.arange(60) % 3 == 0)


def scaled(scale: float, flip: bool) -> Any:
    """From a photograph of 640 x 480 to the same at so many times its size, perhaps flipped."""
    return np.array([[-scale, 0, 640 * scale], [0, scale, 0], [0, 0, 1]]) if flip else np.diag([scale, scale, 1.0])


def warped(target: Any, strides: Any, spec: Any) -> list[TeacherMap]:
    student_maps = {stride: torch.zeros(1, 8, -(-120 // stride), -(-160 // stride)) for stride in strides}
    return [WarpedMaps([target.maps], spec, student_maps, [(120, 160)])[stride] for stride in strides]


@pytest.mark.parametrize("flip", [False, True])
def test_the_live_teachers_own_rois_are_those_of_the_cache(cells: BloodCells, flip: bool) -> None:
    """The same sample of the same proposals and annotations, and what the teacher says of them."""
    cache, needs = open_cache(cells.cache("float32")), needed_fields(METHODS)
    batch = cells.batch(cells.cache("float32"), flip)
    sampling = RoiSampling(num=24, positive_fraction=0.5)
    torch.manual_seed(7)
    live = LiveTeacher(cells.teacher, cache.spec, METHODS, vars(sampling)).targets(batch, torch.device("cpu"))
    torch.manual_seed(7)
    for image, actual in zip(batch["data_samples"], live, strict=True):
        assert isinstance(actual, RoiTargets)
        truth = image.gt_instances
        expected = read_roi_targets(
            cache,
            image.img_id,
            image.homography_matrix,
            image.img_shape,
            truth.bboxes.tensor,
            truth.labels,
            needs=needs,
            sampling=sampling,
            missing_view="mirror",
            generator=torch.default_generator,
            map_levels=range(5),
        )
        assert (
            (actual.view, actual.num_positive)
            == (expected.view, expected.num_positive)
            == ("exact", expected.num_positive)
        )
        assert 0 < actual.num_positive < len(actual.labels) == 24
        assert torch.equal(actual.labels, expected.labels)
        torch.testing.assert_close(actual.boxes, expected.boxes, rtol=0, atol=1e-3)
        for name in ("logits", "deltas", "embeddings"):
            assert difference(getattr(actual, name), getattr(expected, name)) < 1e-5, name
        features = [teacher_roi_features([x], cache.spec) for x in (actual, expected)]
        assert difference(*features) < 1e-5
        maps = [warped(target, cache.spec.strides, cache.spec) for target in (actual, expected)]
        for of_live, of_cache in zip(*maps, strict=True):
            assert difference(of_live.values, of_cache.values) < 1e-5
            assert torch.equal(of_live.inside, of_cache.inside)


@pytest.mark.parametrize("flip", [False, True])
def test_targets_are_those_of_the_live_teacher(cells: BloodCells, flip: bool) -> None:
    """From a float32 cache, beside the live teacher, and as mmdet's own detector gives them."""
    rois, needs = rois_of(cells, flip), needed_fields(METHODS)
    batch = cells.batch(cells.cache("float32"), flip)
    cached, live = said(cells.cached("float32"), batch, rois, needs), said(cells.live(), batch, rois, needs)
    model = cells.teacher.model
    live_values: dict[str, list[Tensor]] = {"roi_features": [], "embeddings": [], "logits": [], "deltas": []}
    hook = model.roi_head.bbox_head.fc_cls.register_forward_pre_hook(
        lambda _, x: live_values["embeddings"].append(x[0])
    )
    with torch.no_grad():
        for index, image in enumerate(batch["inputs"]):
            rows = rois.rois[:, 0] == index
            pyramid, _ = cells.teacher.pyramid_of_input(image)
            result = model.roi_head._bbox_forward(pyramid, bbox2roi([rois.rois[rows, 1:]]))
            live_values["roi_features"].append(result["bbox_feats"][rois.positive[rows]])
            live_values["logits"].append(result["cls_score"])
            live_values["deltas"].append(result["bbox_pred"].reshape(-1, 3, 4))
    hook.remove()
    assert {view.view for view in cells.cached("float32").data_preprocessor(batch, True)["targets"]} == {"exact"}
    for name, parts in live_values.items():
        expected = torch.cat(parts)
        assert difference(getattr(live, name), expected) < 1e-5, name
        assert difference(getattr(cached, name), expected) < 1e-5, name


@pytest.mark.parametrize("views", ["identity,hflip", "identity"])
@pytest.mark.parametrize("flip", [False, True])
def test_boxes_of_a_scaled_and_cropped_view_are_found_in_the_teachers(
    cells: BloodCells, views: str, flip: bool
) -> None:
    """The student sees the photograph of 640 x 480 at 1.5 times its size, perhaps flipped, then cropped."""
    cache = open_cache(cells.cache("float32", views))
    info = cells.data.images[0]
    assert (info.width, info.height) == (640, 480)
    crop = np.array([[1.0, 0, -130], [0, 1, -70], [0, 0, 1]])
    view = read_teacher_view(cache, info.image_id, crop @ scaled(1.5, flip), missing_view="mirror")
    mirrored = flip and views == "identity"
    assert view.view == ("mirrored" if mirrored else "exact")

    boxes = rois_of(cells, flip).rois[:, 1:]  # in the teacher's view of 160 x 120, a quarter of the photograph
    rois = BatchRois(torch.cat([torch.zeros(60, 1), boxes * 4 * 1.5], dim=1), torch.zeros(60), torch.ones(60).bool())
    rois.rois[:, 1:] -= torch.tensor([130.0, 70, 130, 70])
    model = cells.cached("float32")
    needs = ("roi_features", "logits", "deltas")
    actual = apply_teacher_head([view], rois, TeacherHead(model.teacher.head_state(), model.spec), model.spec, needs)

    teacher_boxes = boxes
    if mirrored:
        teacher_boxes = torch.stack([160 - boxes[:, 2], boxes[:, 1], 160 - boxes[:, 0], boxes[:, 3]], dim=1)
    pyramid = cells.pyramid(0, flip and not mirrored)
    with torch.no_grad():
        expected = cells.teacher.model.roi_head._bbox_forward(pyramid, bbox2roi([teacher_boxes]))
    features, deltas = expected["bbox_feats"], expected["bbox_pred"].reshape(-1, 3, 4)
    if mirrored:
        features, deltas = features.flip(-1), deltas * torch.tensor([-1.0, 1, 1, 1])
    assert difference(actual.roi_features, features) < 1e-4
    assert difference(actual.logits, expected["cls_score"]) < 1e-4
    assert difference(actual.deltas, deltas) < 1e-4


def test_a_pyramid_moves_in_storage_type_and_without_what_is_not_needed(cells: BloodCells) -> None:
    cache = open_cache(cells.cache("int8"))
    matrix = scaled(0.25, flip=False)
    view = read_teacher_view(cache, cells.data.images[1].image_id, matrix, missing_view="mirror").to("cpu")
    levels = [level for level in view.pyramid if level is not None]
    assert [level.dtype for level in levels] == [torch.int8] * len(view.pyramid) == [torch.int8] * 4  # and no P6
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    assert view.scale is not None
    one = open_cache(cells.cache("float32", "identity"))
    skipped = read_teacher_view(one, cells.data.images[1].image_id, scaled(0.25, flip=True), missing_view="skip")
    assert (skipped.view, skipped.pyramid) == ("skipped", ())


@pytest.mark.parametrize("roi_source", ["teacher", "student"])
@pytest.mark.parametrize(
    ("methods", "strides", "levels"),
    [
        (["pkd"], None, [1, 2, 3, 4]),  # P2, three quarters of the pyramid, is not read
        (["whole"], None, [0, 1, 2, 3, 4]),
        (["gt-mask", "pkd"], (8, 16, 32, 64, 128), [1, 2, 3, 4]),  # RetinaNet
        (["pkd", "ckd"], None, {"teacher": [1, 2, 3, 4], "student": [0, 1, 2, 3, 4]}),  # with the RoI head's
        (["ckd"], None, {"teacher": [], "student": [0, 1, 2, 3]}),
    ],
)
def test_only_levels_that_the_losses_compare_are_read(
    cells: BloodCells, roi_source: str, methods: list[str], strides: Any, levels: Any
) -> None:
    cache = cells.cache("float32")
    add = AddTeacherTargets(str(cache), methods, roi_source, student_strides=strides)
    targets = add(cells.dataset(cache, False)[0])["targets"]
    levels = levels[roi_source] if isinstance(levels, dict) else levels
    assert targets.view == "exact"
    assert [i for i, x in enumerate(targets.maps.levels if targets.maps else ()) if x is not None] == levels
    if roi_source == "teacher":
        assert (len(targets.boxes) > 0) is ("ckd" in methods)


@pytest.mark.parametrize("views", ["identity,hflip", "identity"])
@pytest.mark.parametrize("flip", [False, True])
def test_maps_are_those_that_the_teacher_makes_of_what_the_student_sees(
    cells: BloodCells, flip: bool, views: str
) -> None:
    """Where the flipped view is cached, exactly; where it is not, the mirrored map of the one that is."""
    cache = open_cache(cells.cache("float32", views))
    matrix = scaled(0.25, flip)
    view = read_teacher_view(cache, cells.data.images[0].image_id, matrix, missing_view="mirror", levels=range(5))
    mirrored = flip and views == "identity"
    pyramid = cells.pyramid(0, flip and not mirrored)
    strides = cache.spec.strides
    for stride, level, actual in zip(strides, pyramid, warped(view, strides, cache.spec), strict=True):
        expected = level.flip(-1) if mirrored else level  # 160 pixels are whole cells, up to P5
        if stride < 64 or not mirrored:
            assert difference(actual.values, expected[..., : actual.values.shape[2], : actual.values.shape[3]]) < 1e-4
        assert actual.inside.any()


@pytest.mark.parametrize("family", STUDENTS)
@pytest.mark.parametrize("flip", [False, True])
def test_losses_and_gradients_are_those_beside_the_live_teacher(cells: BloodCells, flip: bool, family: str) -> None:
    batch = cells.batch(cells.cache("float32"), flip)
    losses, gradients = step(cells.cached("float32", family), batch)
    expected, wanted_gradients = step(cells.live(family), batch)
    assert losses.keys() == expected.keys()
    assert {f"loss_{name}" for name in LOSSES[family]} <= losses.keys()
    for name in expected:
        assert expected[name] > 0, name
        assert difference(losses[name], expected[name]) < 1e-5, name
        assert gradients[name].keys() == wanted_gradients[name].keys()
        assert sum(bool(gradient.any()) for gradient in wanted_gradients[name].values()) > 10
        for parameter, gradient in wanted_gradients[name].items():
            assert difference(gradients[name][parameter], gradient) < 1e-5, f"{name} {parameter}"


@pytest.mark.parametrize("family", STUDENTS)
@pytest.mark.parametrize(("dtype", "of_loss", "of_gradient"), [("float16", 1e-4, 2e-2), ("int8", 2e-3, 0.2)])
def test_storage_types_stay_close(
    cells: BloodCells, dtype: str, of_loss: float, of_gradient: float, family: str
) -> None:
    batch = cells.batch(cells.cache(dtype), False)
    losses, gradients = step(cells.cached(dtype, family), batch)
    expected, wanted_gradients = step(cells.live(family), batch)
    for name in expected:
        assert difference(losses[name], expected[name]) < of_loss, name
        # but for rounding errors: pkd does not depend on the biases of the pyramid's last convolutions
        least = 1e-4 * max(float(g.norm()) for g in wanted_gradients[name].values())
        worst = max(difference(gradients[name][p], g) for p, g in wanted_gradients[name].items() if g.norm() > least)
        assert worst < of_gradient, name


def test_a_teacher_is_not_in_the_checkpoint(cells: BloodCells) -> None:
    model = cells.live()
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "sgfi", "ckd", "roifi", "cross", *MAPS}
    assert model.student.state_dict().keys() == MODELS.build(cells.student.model).state_dict().keys()


def test_the_live_teacher_computes_in_full_precision_and_draws_no_random_numbers(cells: BloodCells) -> None:
    batch = cells.batch(cells.cache("float32"), False)
    source = LiveTeacher(cells.teacher, open_cache(cells.cache("float32")).spec)
    torch.manual_seed(1)
    plain = source.targets(batch, torch.device("cpu"))
    drawn = torch.rand(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = source.targets(batch, torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    for view, other in zip(views, plain, strict=True):
        assert isinstance(view, TeacherView)
        assert isinstance(other, TeacherView)
        assert view.view == "exact"
        pairs = zip(view.pyramid, other.pyramid, strict=True)
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("large", [False, True])
def test_two_points_per_cell_hardly_move_sgfi(cells: BloodCells, large: bool) -> None:
    """Against a point per pixel on every level of the student, at objects of photographs and at large RoIs."""
    batch, student = cells.batch(cells.cache("float32"), False), cells.live().student
    boxes = [sample.gt_instances.bboxes.tensor for sample in batch["data_samples"]]
    if large:
        g = torch.Generator().manual_seed(0)
        corners = [torch.rand(8, 2, generator=g) * torch.tensor([40.0, 30.0]) for _ in range(IMAGES)]
        boxes = [torch.cat([corner, corner + torch.tensor([120.0, 90.0])], dim=1) for corner in corners]
    rois = bbox2roi(boxes)
    strides = open_cache(cells.cache("float32")).spec.strides
    with torch.no_grad():
        images = torch.stack(batch["inputs"]).float()
        student_pyramid = student.extract_feat((images - images.mean()) / images.std())
        teacher_level = torch.cat([cells.teacher.pyramid_of_input(image)[0][0] for image in batch["inputs"]])
        expected = roi_align(teacher_level, rois, 7, 1 / strides[0], 0, True)
        levels = [
            roi_align(level, rois, 7, 1 / stride, 0, True)
            for level, stride in zip(student_pyramid, strides, strict=True)
        ]
        adaptive = torch.stack(levels, dim=1)
        two = roi_align_levels(student_pyramid, strides, rois)
        torch.manual_seed(0)
        sgfi = SGFI(8, 16)
        exact, bounded = (float(sgfi(features, expected)[0]) for features in (adaptive, two))
    assert abs(bounded - exact) < 0.02 * exact
    assert 0 < difference(two, adaptive) < 0.08


def test_maps_of_a_live_teacher_are_where_it_runs(cells: BloodCells, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are still on the CPU then; losses of maps alone have no RoIs."""
    batch, spec = cells.batch(cells.cache("float32"), False), open_cache(cells.cache("float32")).spec
    live = LiveTeacher(cells.teacher, spec, ("pkd",), vars(RoiSampling()))
    see = live._see

    def see_elsewhere(image: torch.Tensor) -> Any:
        pyramid, sample = see(image)
        return tuple(level.to("meta") for level in pyramid), sample

    monkeypatch.setattr(live, "_see", see_elsewhere)
    for target in live.targets(batch, torch.device("cpu")):
        assert isinstance(target, RoiTargets)
        assert target.maps is not None
        assert {level.device.type for level in target.maps.levels if level is not None} == {"meta"}
