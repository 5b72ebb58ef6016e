"""`kdpipe report` of a cache."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.pipelines.report.test_page import EVIL, Tags

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def test_a_cache(kit: "Kit", work: Path) -> None:
    ended = kit.run("report", kit.cache)
    assert "Report: shapes.report.html" in ended.out
    page = Tags((work / "shapes.report.html").read_text())
    figures = [each["id"] for tag, each in page.tags if tag == "figure"]
    assert figures == ["figure-bytes", "figure-scores", *(f"figure-image-{number:02}" for number in range(1, 9))]
    ap = kit.run("verify", kit.cache, "--ap").out.split("│")[1].strip()
    for text in ("Teacher AP", ap, "features", "embeddings", "kdpipe cache-teacher", str(kit.teacher), "pyramid, int4"):
        assert text in page.text
    assert not [path for path in kit.cache.iterdir() if "report" in path.name]


def test_images_that_are_gone(kit: "Kit", work: Path) -> None:
    kit.run("report", kit.cache, "--img-dir", work, "--out", "page.html")
    text = Tags((work / "page.html").read_text()).text
    assert "Not all images are shown: " in text
    assert "Histogram of scores" in text


def test_a_cache_whose_data_is_gone(kit: "Kit", work: Path) -> None:
    copy = kit.annotations(work / "data" / "ann.json")
    kit.run(
        "cache-teacher", "--ckpt", kit.teacher, "--ann-file", copy, "--img-dir", kit.img, *kit.VIEW, "--out", "x.zarr"
    )
    shutil.rmtree(work / "data")
    kit.run("report", "x.zarr")
    text = Tags((work / "x.report.html").read_text()).text
    assert "AP is not measured: " in text


def test_names_that_are_markup(kit: "Kit", work: Path) -> None:
    evil = EVIL.replace("/", "")
    images = work / "images"
    shutil.copytree(kit.img, images)
    content = json.loads(kit.ann.read_text())
    first = content["images"][0]
    (images / first["file_name"]).rename(images / f"{evil}.png")
    first["file_name"] = f"{evil}.png"
    (work / "ann.json").write_text(json.dumps(content))
    source = ("--ckpt", kit.teacher, "--ann-file", "ann.json", "--img-dir", images)
    kit.run("cache-teacher", *source, *kit.VIEW, "--out", f"{evil}.zarr")
    kit.run("report", f"{evil}.zarr", "--out", "page.html")
    page = Tags((work / "page.html").read_text())
    assert page.text.count(evil) >= 3
    assert all((each["src"] or "").startswith("data:") for tag, each in page.tags if tag == "img")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]


def test_figures_alone(kit: "Kit", work: Path) -> None:
    kit.run("report", kit.cache, "--png", "figures")
    assert {"bytes.png", "scores.png", "image-01.png"} <= {path.name for path in (work / "figures").iterdir()}
    assert [path.name for path in work.iterdir()] == ["figures"]
