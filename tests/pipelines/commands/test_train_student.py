"""`kdpipe train-student`, as users type it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.models.detectors import TwoStageDetector
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.pipelines.detectors.checkpoints import register_safe_types
from kdpipe.pipelines.training.transforms import AddTeacherTargets

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Ended, Kit

IN_STOCK_MMDET = """
import sys
import torch
import kdpipe.pipelines  # mmcv's ops, where mmcv came without them
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
register_all_modules(init_default_scope=True)
for path in sys.argv[2:]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    config = Config.fromstring(checkpoint["meta"]["cfg"], file_format=".py")
    detector = MODELS.build(config.model)
    detector.load_state_dict(checkpoint["state_dict"], strict=True)
    detector.cfg = config
    found = inference_detector(detector.eval(), sys.argv[1]).pred_instances
    assert torch.isfinite(found.bboxes).all() and len(found) > 0
    assert len(DATASETS.build(config.train_dataloader.dataset)) == 8
    assert tuple(checkpoint["meta"]["dataset_meta"]["classes"])[0] == "disc"
ops = {"losses", "losses.numeric", "rois", "rois.align_cpu", "rows"}  # RoIAlign on a CPU
ops = {"kdpipe.distill", *(f"kdpipe.distill.{name}" for name in ops)}
assert not [name for name in sys.modules if name.startswith("kdpipe.distill") and name not in ops]
"""


def scalars(work_dir: Path) -> dict[str, list[float]]:
    """What the log says of each step."""
    values: dict[str, list[float]] = {}
    for file in work_dir.glob("*/vis_data/scalars.json"):
        for line in file.read_text().splitlines():
            for name, value in json.loads(line).items():
                values.setdefault(name, []).append(value)
    return values


def resumable(path: Path) -> Any:
    """Weights, queue, momentum and schedule of a checkpoint to resume from."""
    register_safe_types()
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {key: content[key] for key in ("state_dict", "optimizer", "param_schedulers")}


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.fixture(scope="module")
def trained(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Ended]":
    """Work directory and output of two epochs with all methods, the defaults."""
    work_dir = tmp_path_factory.mktemp("trained") / "w"
    return work_dir, kit.train_student(work_dir, "--epochs", 2, *kit.val)


def test_files_and_output(trained: "tuple[Path, Ended]") -> None:
    work_dir, ended = trained
    result = json.loads((work_dir / "result.json").read_text())
    assert 0 <= result["ap"] <= 1
    assert result["metrics"]["bbox_mAP"] == result["ap"]
    assert f"student: AP {result['ap']:.3f}" in ended.out
    assert ended.out.splitlines()[-1].startswith(f"{work_dir / 'student.pth'}: AP {result['ap']:.3f}, ")
    assert ended.err == ""
    names = {"epoch_1.pth", "epoch_2.pth", "epoch_1.student.pth", "epoch_2.student.pth", "student.pth"}
    assert {file.name for file in work_dir.glob("*.pth")} == names
    content = torch.load(work_dir / "student.pth", weights_only=True)
    assert not [name for name in content["state_dict"] if "student" in name or "teacher" in name or "queue" in name]
    assert content["meta"]["epoch"] == 2


def test_tensorboard_has_every_loss(trained: "tuple[Path, Ended]") -> None:
    (events,) = trained[0].glob("*/vis_data/events*")
    board = EventAccumulator(str(events)).Reload()
    names = set(board.Tags()["scalars"])
    own_losses = {"loss", "loss_cls", "loss_bbox", "loss_rpn_cls", "loss_rpn_bbox"}
    assert own_losses | {"loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg", "lr", "coco/bbox_mAP"} <= names
    assert all(
        torch.isfinite(torch.tensor([event.value for event in board.Scalars(name)])).all() for name in own_losses
    )


def test_stock_mmdet_loads_the_student_strictly(trained: "tuple[Path, Ended]", kit: "Kit") -> None:
    image = next(kit.val_img.iterdir())
    files = [trained[0] / "student.pth", trained[0] / "epoch_1.student.pth"]
    done = subprocess.run([sys.executable, "-c", IN_STOCK_MMDET, image, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resumed_training_is_the_same_bit_for_bit(trained: "tuple[Path, Ended]", kit: "Kit", work: Path) -> None:
    ended = kit.interrupted(*kit.student_command(work / "w"), "--epochs", 2, *kit.val)
    assert ended.err.strip() == "Interrupted."
    assert not (work / "w" / "epoch_2.pth").exists()
    assert "already holds a training" in kit.refused(*kit.student_command(work / "w"), "--epochs", 2)
    kit.train_student(work / "w", "--epochs", 2, "--resume", *kit.val)
    straight, resumed = resumable(trained[0] / "epoch_2.pth"), resumable(work / "w" / "epoch_2.pth")
    assert any("queue" in name for name in straight["state_dict"])
    assert same(straight, resumed)
    assert not same(straight["state_dict"], resumable(work / "w" / "epoch_1.pth")["state_dict"])


def test_number_of_workers_changes_nothing(trained: "tuple[Path, Ended]", kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--epochs", 2, workers=2)
    assert not [thread for thread in threading.enumerate() if thread.name == "QueueFeederThread"], "workers are ended"
    assert same(resumable(trained[0] / "epoch_2.pth"), resumable(work / "w" / "epoch_2.pth"))


def test_a_worker_names_the_picture_that_was_replaced(kit: "Kit", work: Path) -> None:
    shutil.copytree(kit.img, work / "images")
    first, second = sorted((work / "images").iterdir())[:2]
    shutil.copy(second, first)
    message = kit.refused(*kit.student_command(work / "w", "--img-dir", work / "images", workers=1))
    assert f"image {first} is another picture than the one that the teacher saw" in message
    assert len(message.splitlines()) == 1


def test_another_seed_gives_another_student(trained: "tuple[Path, Ended]", kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--seed", 1)
    first, other = (torch.load(x / "epoch_1.student.pth", weights_only=True) for x in (trained[0], work / "w"))
    assert not same(first["state_dict"], other["state_dict"])


def test_resume_needs_what_the_training_began_with(trained: "tuple[Path, Ended]", kit: "Kit", work: Path) -> None:
    shutil.copytree(trained[0], work / "w")
    command = kit.student_command(work / "w", "--methods", "none", "--resume", "--epochs", 3)
    assert "--methods that the training began with" in kit.refused(*command)
    assert "Nothing to resume" in kit.refused(*kit.student_command(work / "new"), "--resume")


def test_resume_refuses_another_cache(trained: "tuple[Path, Ended]", kit: "Kit", work: Path) -> None:
    shutil.copytree(trained[0], work / "w")
    kit.run("cache-teacher", *kit.source, "--scale", "96x96", "--proposals", "40", "--out", work / "other.zarr")
    command = kit.student_command(work / "w", "--resume", "--epochs", 3, cache=work / "other.zarr")
    assert "spec.scale: found [128, 96], wanted [96, 96]" in kit.refused(*command)


METHODS = {
    "none": set[str](),
    "sgfi": {"loss_sgfi"},
    "ckd": {"loss_ckd"},
    "pred": {"loss_kd_cls", "loss_kd_careg"},
    "cls": {"loss_kd_cls"},
    "reg": {"loss_kd_reg"},
    "cls,reg,careg": {"loss_kd_cls", "loss_kd_reg", "loss_kd_careg"},
    "box,cross,dist": {"loss_kd_box", "loss_cross", "loss_dist"},
}


@pytest.mark.parametrize("methods", METHODS)
def test_methods(kit: "Kit", work: Path, methods: str) -> None:
    ended = kit.train_student(work / "w", "--methods", methods)
    assert "AP is not measured" in ended.out
    log = scalars(work / "w")
    all_losses = set().union(*METHODS.values())
    assert all_losses & log.keys() == METHODS[methods]
    assert all(torch.isfinite(torch.tensor(log[name])).all() for name in METHODS[methods] | {"loss"})
    assert any(name.startswith("kd_") for name in log) == (methods != "none")


def test_trains_where_the_teacher_is_no_more(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, config = work / "teacher.pth", work / "teacher.py"
    shutil.copy(kit.teacher, teacher)
    config.write_text(kit.config().pretty_text)
    kit.run("cache-teacher", "--ckpt", teacher, "--config", config, *kit.data, *kit.VIEW, "--out", work / "x.zarr")
    teacher.unlink()
    config.unlink()
    built: list[TwoStageDetector] = []
    start = TwoStageDetector.__init__

    def count(self: TwoStageDetector, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(TwoStageDetector, "__init__", count)
    kit.train_student(work / "w", cache=work / "x.zarr")
    assert {detector.neck.out_channels for detector in built} == {8}  # the student; the teacher has 16


def test_views_are_counted(kit: "Kit", work: Path) -> None:
    """Mirrored by default, left out where asked, exact where both views are cached; all 8 images in one step."""
    options = ("--methods", "cls", "--batch-size", 8)
    kit.train_student(work / "mirror", *options)
    mirror = scalars(work / "mirror")
    assert mirror["kd_exact"][0] + mirror["kd_mirrored"][0] == 8
    assert 0 < mirror["kd_mirrored"][0] < 8
    kit.train_student(work / "skip", *options, "--missing-view", "skip")
    skip = scalars(work / "skip")
    assert (skip["kd_skipped"], skip["kd_exact"]) == (mirror["kd_mirrored"], mirror["kd_exact"])
    both = work / "both.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--views", "identity,hflip", "--out", both)
    kit.train_student(work / "both", *options, cache=both)
    exact = scalars(work / "both")
    assert (exact["kd_exact"], exact["kd_mirrored"]) == ([8.0], [0.0])


def test_mixed_precision(kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--amp", *kit.val)
    log = scalars(work / "w")
    assert all(torch.isfinite(torch.tensor(values)).all() for name, values in log.items() if "loss" in name)
    weights = torch.load(work / "w" / "student.pth", weights_only=True)["state_dict"]
    assert all(value.dtype != torch.bfloat16 and torch.isfinite(value).all() for value in weights.values())


def test_multi_scale_schedule(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    add = AddTeacherTargets.__call__

    def watch(self: AddTeacherTargets, results: dict[str, Any]) -> dict[str, Any]:
        heights.append(results["data_samples"].img_shape[0])
        return add(self, results)

    monkeypatch.setattr(AddTeacherTargets, "__call__", watch)
    kit.train_student(work / "w", "--schedule", "2x-ms")
    assert len(heights) == 8
    assert len(set(heights)) > 3
    assert 0.8 * 96 - 1 <= min(heights) < max(heights) <= 96


def test_images_that_moved(kit: "Kit", work: Path) -> None:
    old, new = work / "old", work / "new"
    shutil.copytree(kit.folder / "shapes", old)
    data = ("--ann-file", old / "annotations" / "train.json", "--img-dir", old / "train")
    cache = work / "x.zarr"
    kit.run("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--targets", "predictions", "--out", cache)
    shutil.move(old, new)
    command = kit.student_command(work / "w", "--methods", "pred", "--workers", 0, cache=cache)
    message = kit.refused(*command)
    assert str(old) in message
    assert "--ann-file" in message
    assert "--img-dir" in kit.refused(*command, "--ann-file", new / "annotations" / "train.json")
    kit.run(*command, "--ann-file", new / "annotations" / "train.json", "--img-dir", new / "train")
    assert (work / "w" / "student.pth").exists()


def test_work_directory_by_default(kit: "Kit", work: Path) -> None:
    command = ("train-student", "--cache", kit.cache, "--student", kit.student, "--methods", "cls,reg", "--epochs", 1)
    kit.run(*command, "--batch-size", 8, "--workers", 0)
    assert (work / "work_dirs" / "student_cls-reg" / "student.pth").exists()
    assert "already holds a training" in kit.refused(*command)


def test_options_of_the_config_and_of_the_recipe(kit: "Kit", work: Path) -> None:
    options = ("--lr", 0.001, "--scale", "96x64", "-o", "model.roi_head.bbox_head.fc_out_channels=20")
    kit.train_student(work / "w", "--methods", "sgfi", *options, "-o", "distill.weights.sgfi=0")
    content = torch.load(work / "w" / "student.pth", weights_only=True)
    assert content["state_dict"]["roi_head.bbox_head.fc_cls.weight"].shape == (7, 20)
    assert "distill" not in content["meta"]["cfg"]
    log = scalars(work / "w")
    assert max(log["lr"]) <= 0.001
    assert log["loss_sgfi"] == [0.0]


def members(session: int) -> list[int]:
    """Processes that are alive in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended in the meantime
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_behind(kit: "Kit", work: Path, forks: "Forks", number: signal.Signals) -> None:
    """Killed, interrupted by Ctrl-C (which reaches every process of the terminal), or asked to end."""
    command = ("train-student", "--cache", kit.cache, "--student", kit.student, "--methods", "cls", "--work-dir", "w")
    options = ("--epochs", 500, "--batch-size", 4, "--workers", 2)
    process = forks.start(kit.COMMAND, *command, *options, cwd=work)
    try:
        while not (work / "w" / "epoch_1.pth").exists() and process.poll() is None:
            time.sleep(0.1)
        assert len(members(process.pid)) > 3  # the fork server and its workers
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait() == (-number if number == signal.SIGKILL else 130), process.err
        if number != signal.SIGKILL:
            assert process.err.strip() == "Interrupted."
        limit = time.monotonic() + 30
        while members(process.pid) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not members(process.pid)
    finally:
        if process.poll() is None or members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
