"""What all tests share."""

import os
from pathlib import Path

import pytest

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # mmcv 2.1 warns about an import that mmdet 3.3 itself does
    config.addinivalue_line("filterwarnings", "ignore:``MultiScaleDeformableAttention`` has been moved:ImportWarning")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Folder of the blood cell data set: photographs in Pascal VOC layout, and their COCO JSON splits."""
    folder = Path(os.environ.get("KDPIPE_BCCD", ROOT.parent / "shared" / "data" / "bccd"))
    if not (folder / "train.json").is_file():
        pytest.skip(f"no bccd data set in {folder}; set KDPIPE_BCCD to its folder")
    return folder
