"""`kdpipe evaluate`, as users type it."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.options import EvaluateOptions
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.training.runner import QuietRunner

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.fixture(scope="module")
def trained(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("trained") / "w"
    kit.train_student(work_dir, "--methods", "none", *kit.val)
    return work_dir


def test_is_the_ap_that_training_measured(
    kit: "Kit", work: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the validation images that the checkpoint's config names, and the same when they are given.

    Both in the same second, by which mmengine names what a runner keeps.
    """
    now, test, names = time.time(), QuietRunner.test, []

    def test_and_tell(runner: QuietRunner) -> Any:
        names.append(runner.experiment_name)
        return test(runner)

    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(QuietRunner, "test", test_and_tell)
    expected = json.loads((trained / "result.json").read_text())["metrics"]
    for ann_file, img_dir in ((None, None), (kit.val_ann, kit.val_img)):
        options = EvaluateOptions(trained / "student.pth", data=DataOptions(ann_file, img_dir), batch_size=3)
        actual = evaluate(options, Console(quiet=True))
        assert actual == pytest.approx(expected, abs=1e-9)
    assert len(set(names)) == 2


def test_prints_a_table(kit: "Kit", work: Path, trained: Path) -> None:
    ended = kit.run("evaluate", "--ckpt", trained / "student.pth")
    ap = json.loads((trained / "result.json").read_text())["ap"]
    assert all(name in ended.out for name in ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"))
    assert f"{ap:.3f}" in ended.out
    assert "—" in ended.out, "there are no large objects"
    assert "-1.000" not in ended.out
    assert ended.err == ""
    assert not list(work.iterdir())


def test_config_by_file_and_scale(kit: "Kit", work: Path, trained: Path) -> None:
    torch.save(torch.load(trained / "student.pth", weights_only=True)["state_dict"], work / "bare.pth")
    data = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    assert "carries no config" in kit.refused("evaluate", "--ckpt", work / "bare.pth", *data)
    options = ("--config", kit.student, *data, "--scale", "96x64")
    assert "AP50" in kit.run("evaluate", "--ckpt", work / "bare.pth", *options).out


def test_what_a_distillation_resumes_from_names_the_student(kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--methods", "sgfi", *kit.val)
    for command in (("evaluate",), ("cache-teacher", "--out", work / "c.zarr")):
        message = kit.refused(*command, "--ckpt", work / "w" / "epoch_1.pth", *kit.data)
        assert f"{work}/w/epoch_1.student.pth" in message
    assert not (work / "c.zarr").exists()


def test_a_detector_that_finds_nothing_has_ap_zero(kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--methods", "none", *kit.val, "-o", "model.test_cfg.rcnn.score_thr=1.0")
    assert json.loads((work / "w" / "result.json").read_text())["ap"] == 0
    ended = kit.run("evaluate", "--ckpt", work / "w" / "student.pth")
    assert ended.out.count("0.000") == 6
    assert "Traceback" not in ended.err


def test_what_cannot_be_evaluated(kit: "Kit", work: Path) -> None:
    data = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    assert "does not exist" in kit.refused("evaluate", "--ckpt", work / "x.pth", *data)
    message = kit.refused("evaluate", "--ckpt", kit.teacher)  # its config names data/coco
    assert "--ann-file" in message
    content = json.loads(kit.val_ann.read_text())
    content["categories"][0]["name"] = "heart"
    (work / "val.json").write_text(json.dumps(content))
    data = ("--ann-file", work / "val.json", "--img-dir", kit.val_img)
    assert "are not those of the checkpoint" in kit.refused("evaluate", "--ckpt", kit.teacher, *data)
    message = kit.refused("evaluate", "--ckpt", kit.teacher, "--ann-file", kit.val_ann, "--img-dir", work)
    assert json.loads(kit.val_ann.read_text())["images"][0]["file_name"] in message
