"""`kdpipe report` of trainings, as users run it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.pipelines.cli.report import report_trainings_in
from tests.pipelines.report.test_page import Tags

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.fixture(scope="module")
def page(kit: "Kit", trainings: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    ended = kit.run("report", trainings, "--out", out, "--cache", kit.cache)
    assert f"Report: {out}" in ended.out
    return out.read_text()


def test_all_that_a_folder_of_trainings_has_is_on_the_page(page: str) -> None:
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    for name in ("ap", "losses", "distillation-losses", "shares-0", "step-time", "ap-over-epochs"):
        assert f"figure-{name}" in ids
    for name in ("ap-by-class", "ap-by-size", "ap-by-iou", "precision-recall", "gain-by-class", "image-01"):
        assert f"figure-{name}" in ids
    assert {"results", "training", "accuracy", "images", "run"} <= set(ids)
    for text in ("Teacher AP", "sgfi + ckd + pred", "plain", "2 of 2 epochs", "kdpipe", "PyTorch"):
        assert text in tags.text
    assert "missing" not in tags.text


def test_detections_are_kept(kit: "Kit", trainings: Path, page: str) -> None:
    kept = [path.name for path in (trainings / "plain" / "kdpipe").glob("*.bbox.json")]
    assert "detections.bbox.json" in kept
    assert any(name.startswith("teacher-") for name in kept)
    again = kit.run("report", trainings, "--out", trainings / "again.html", "--cache", kit.cache, "--no-inference")
    assert "once" not in again.out
    assert "missing" not in Tags((trainings / "again.html").read_text()).text


def test_what_is_missing_is_said(kit: "Kit", trainings: Path, tmp_path: Path) -> None:
    work = tmp_path / "alone"
    shutil.copytree(trainings / "distilled", work)
    for path in (work / "kdpipe").glob("*.bbox.json"):
        path.unlink()
    kit.run("report", work, "--no-inference")
    text = Tags((work / "report.html").read_text()).text
    assert "There is no student without distillation here to compare with" in text
    assert "The detections of alone are missing: they are not kept" in text
    (work / "kdpipe" / "val.json").unlink()
    kit.run("report", work)
    assert "No validation images" in Tags((work / "report.html").read_text()).text


def test_the_teacher_is_not_there(kit: "Kit", trainings: Path, tmp_path: Path) -> None:
    work = tmp_path / "alone"
    shutil.copytree(trainings / "plain", work)
    for path in (work / "kdpipe").glob("teacher-*"):
        path.unlink()
    kit.run("report", work, "--cache", kit.cache, "--teacher-ckpt", tmp_path / "gone.pth")
    assert "The teacher's detections are missing: the teacher's checkpoint is not there" in (
        Tags((work / "report.html").read_text()).text
    )
    other = kit.save_detector(tmp_path / "other.pth", kit.config(channels=8))
    kit.run("report", work, "--cache", kit.cache, "--teacher-ckpt", other)
    assert "The teacher's detections are missing: " in Tags((work / "report.html").read_text()).text


def test_figures_alone(kit: "Kit", trainings: Path, tmp_path: Path, page: str) -> None:
    ended = kit.run("report", trainings, "--png", tmp_path / "figures", "--cache", kit.cache)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"ap.png", "losses.png", "precision-recall.png", "image-01.png"} <= names
    assert f"{len(names)} figures" in ended.out
    assert not (trainings / "report.html").exists()


def test_images_of_the_cache_are_where_it_says_whatever_img_dir_is(kit: "Kit", trainings: Path, tmp_path: Path) -> None:
    """`--img-dir` names validation images, which lie in another folder here."""
    kit.run("report", trainings, "--out", tmp_path / "a.html", "--cache", kit.cache, "--img-dir", kit.val_img)
    ids = {attributes.get("id") for _, attributes in Tags((tmp_path / "a.html").read_text()).tags}
    assert {"figure-paper-6", "figure-image-01"} <= ids
    kit.run("report", trainings, "--out", tmp_path / "b.html", "--cache", kit.cache, "--img-dir", tmp_path / "gone")
    text = Tags((tmp_path / "b.html").read_text()).text
    assert "No image is shown: the validation images are not there" in text


def test_refusals(kit: "Kit", trainings: Path, tmp_path: Path) -> None:
    assert "holds no training" in kit.refused("report", tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert "was not written by kdpipe report" in kit.refused("report", trainings, "--out", mine)
    assert mine.read_text() == "mine"


def test_names_that_are_markup(kit: "Kit", evil_trainings: Path) -> None:
    kit.run("report", evil_trainings, "--cache", kit.cache)
    page = Tags((evil_trainings / "report.html").read_text())
    assert all((each["src"] or "").startswith("data:") for tag, each in page.tags if tag == "img")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert page.text.count("<img src=x onerror=alert(1)>") > 8


def test_the_figures_of_the_paper(page: str) -> None:
    ids = [attributes["id"] for tag, attributes in Tags(page).tags if tag == "figure"]
    assert {"figure-paper-2", "figure-paper-5", "figure-paper-6"} <= set(ids)


def test_a_training_ends_with_its_report(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.pipelines.cli.training.report_trainings_in", report_trainings_in)
    ended = kit.train_student("w", *kit.val, "--methods", "none")
    assert ended.out.splitlines()[-2] == "Report: w/report.html"
    text = Tags((work / "w" / "report.html").read_text()).text
    assert "AP of each class" in text  # of detections that the training kept
    assert f"--student {kit.student}" in text
    assert "kdpipe report makes them" in text
    kit.train_student("w", *kit.val, "--methods", "none", "--epochs", 2, "--resume", "--no-report")
    assert "1 of 1 epochs" in (work / "w" / "report.html").read_text()


def test_a_report_that_fails_is_no_failed_training(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.pipelines.cli.training.report_trainings_in", report_trainings_in)
    monkeypatch.setattr("kdpipe.pipelines.report.report.render_page", lambda *args: 1 / 0)
    ended = kit.train_student("w", *kit.val, "--methods", "none")
    assert "No report was written: division by zero" in ended.out
    assert (work / "w" / "student.pth").exists()


@pytest.mark.slow
def test_a_comparison_ends_with_its_report(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.pipelines.cli.compare.report_trainings_in", report_trainings_in)
    options = ("--cache", kit.cache, "--student", kit.student, "--methods", "none", "--methods", "cls", *kit.val)
    kit.run("compare", *options, "--work-dir", "w", "--epochs", 1, "--batch-size", 4, "--workers", 0)
    page = Tags((work / "w" / "report.html").read_text())
    assert "plain" in page.text
    assert "gap closed" in page.text
    assert not list((work / "w").rglob("seed-0/report.html"))
