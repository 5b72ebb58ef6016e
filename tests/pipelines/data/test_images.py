"""Images from disk: the pixels that mmdet reads, and one message for each that cannot be used."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from PIL import Image

from kdpipe.cache.identity import digest_file
from kdpipe.pipelines.data.decoding import Decoding
from kdpipe.pipelines.data.images import (
    ImageError,
    check_picture,
    image_digest,
    image_problem,
    image_size,
    load_picture,
    read_image,
)
from kdpipe.pipelines.data.truncation import lost_share
from kdpipe.pipelines.training.loading import LoadCompletedImage, complete_images
from kdpipe.pipelines.training.reading import pipeline_decoding

SUFFIXES = (".jpg", ".png", ".bmp", ".webp", ".tif")


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height: int, width: int) -> npt.NDArray[np.uint8]:
    """As smooth as a photograph."""
    return cv2.GaussianBlur(noise(height, width), (9, 9), 3).astype(np.uint8)


def jpeg(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def turned(path: Path, orientation: int, height: int = 20, width: int = 30) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {} if path.suffix == ".bmp" else {"exif": exif}
    Image.fromarray(noise(height, width)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_and_sizes_are_those_of_mmdet(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = turned(tmp_path / f"a{suffix}", orientation)
    expected = LoadImageFromFile().transform({"img_path": str(path)})["img"]
    actual = load_picture(path, expected.shape[:2])
    np.testing.assert_array_equal(actual.pixels, expected)
    assert actual.pixels.dtype == np.uint8
    assert actual.note == check_picture(path, expected.shape[:2]) == ""
    assert image_size(path) == expected.shape[:2]
    assert actual.digest == image_digest(path) == digest_file(path.read_bytes())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("color_type", ["color", "color_ignore_orientation"])
def test_the_size_follows_what_a_config_says_of_orientation(
    tmp_path: Path, suffix: str, backend: str, color_type: str
) -> None:
    path = turned(tmp_path / f"a{suffix}", 6)
    step = {"type": "LoadImageFromFile", "color_type": color_type, "imdecode_backend": backend}
    expected = LoadImageFromFile(color_type=color_type, imdecode_backend=backend).transform({"img_path": str(path)})
    assert check_picture(path, expected["img"].shape[:2], decoding=pipeline_decoding([step])) == ""
    with pytest.raises(ImageError, match=r"EXIF orientation (applied|ignored)"):
        check_picture(path, expected["img"].shape[1::-1], decoding=pipeline_decoding([step]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_grey_images_have_three_channels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise(20, 30)).convert("L").save(path)
    np.testing.assert_array_equal(read_image(path), LoadImageFromFile().transform({"img_path": str(path)})["img"])


def put(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shrink(path: Path) -> None:
    Image.fromarray(photo(60, 80)).save(path)


def swap(path: Path) -> None:
    Image.fromarray(photo(160, 120)).save(path)


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing", Path.unlink, "does not exist. Check the image folder"),
    ("folder", become_folder, "is a folder"),
    ("empty", put(b""), "is empty"),
    ("html", put(b"<!DOCTYPE html><html>Not found</html>"), "cannot be decoded: it is truncated, damaged or no image"),
    ("text", put(b"x"), "cannot be decoded: it is truncated, damaged or no image"),
    ("half", half, "truncated|cannot be decoded"),
    ("shrunk", shrink, r"is 80 x 60 pixels .* say 160 x 120"),
    ("swapped", swap, r"is 120 x 160 pixels .* say 160 x 120"),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow, of a TIFF whose tags are cut off
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_images_have_one_message(
    tmp_path: Path, suffix: str, name: str, spoil: Callable[[Path], None], message: str
) -> None:
    """The same from the header and from decoding; it names the file."""
    path = tmp_path / f"a{suffix}"
    Image.fromarray(photo(120, 160)).save(path)
    assert check_picture(path, (120, 160)) == ""
    spoil(path)
    with pytest.raises(ImageError, match=message) as caught:
        check_picture(path, (120, 160))
    assert str(path) in str(caught.value)
    assert image_problem(path, 160, 120) == str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_half_an_image_is_found_behind_zeros(tmp_path: Path, suffix: str) -> None:
    """As a download leaves it that was stopped, where the file had its size before."""
    path = tmp_path / f"a{suffix}"
    Image.fromarray(photo(120, 160)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(1 << 20))
    with pytest.raises(ImageError, match="truncated"):
        check_picture(path, (120, 160))


@pytest.mark.parametrize(
    ("suffix", "cut"),
    [(".jpg", 1500), *((suffix, cut) for suffix in (".png", ".bmp", ".webp") for cut in (3, 200, 1500))],
)
def test_truncated_images_are_found(tmp_path: Path, suffix: str, cut: int) -> None:
    cv2.imwrite(str(tmp_path / f"whole{suffix}"), noise(64, 64))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes((tmp_path / f"whole{suffix}").read_bytes()[:-cut])
    for read in (read_image, lambda path: check_picture(path, (64, 64))):
        with pytest.raises(ImageError, match=rf"cut\{suffix}.*(truncated|decoded)"):
            read(path)


@pytest.mark.parametrize("tail", [b"comment", bytes(100_000), b"\xff\xd8\xff" + b"video" * 999, b"\r\n"])
def test_bytes_behind_the_end_do_no_harm(tmp_path: Path, tail: bytes) -> None:
    for name in ("a.jpg", "a.png"):
        cv2.imwrite(str(tmp_path / name), noise(20, 30))
        expected = read_image(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + tail)
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)
        assert check_picture(tmp_path / name, (20, 30)) == ""


def test_a_jpeg_that_lacks_its_last_bytes_is_used_and_noted(tmp_path: Path) -> None:
    whole = jpeg(photo(120, 160), subsampling=0)
    for content in (
        whole[:-1],
        whole[:-2],
        whole[:-40],
        whole[:-10] + bytes(1000),
    ):  # the last as a file system pads it
        (tmp_path / "a.jpg").write_bytes(content)
        actual = load_picture(tmp_path / "a.jpg", (120, 160))
        assert "a.jpg lacks its last bytes" in actual.note
        assert check_picture(tmp_path / "a.jpg", (120, 160)) == actual.note
        np.testing.assert_array_equal(actual.pixels, cv2.imread(str(tmp_path / "a.jpg")))
        expected = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
        assert (actual.pixels != expected).any(axis=2).mean() < 0.02


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("cut", [0, 2, 10])
def test_students_and_teachers_read_the_same(tmp_path: Path, cut: int, backend: str) -> None:
    """Of a JPEG that lacks its last bytes, too; wherever the step is in a config."""
    data = jpeg(photo(60, 80))
    (tmp_path / "a.jpg").write_bytes(data[: len(data) - cut])
    stock = {"type": "LoadImageFromFile", "imdecode_backend": backend, "to_float32": True}
    inner = dict(stock)
    complete_images({"dataset": {"pipeline": [{"type": "RandomApply", "transforms": [inner], "prob": 1.0}]}})
    step = TRANSFORMS.build(inner)
    actual = step({"img_path": str(tmp_path / "a.jpg")})
    expected = load_picture(tmp_path / "a.jpg", decoding=Decoding(imdecode_backend=backend))
    assert bool(expected.note) == (cut > 0)
    np.testing.assert_array_equal(actual["img"], expected.pixels)
    assert actual["img"].dtype == np.float32
    assert actual["img_shape"] == actual["ori_shape"] == (60, 80)
    if not cut:
        np.testing.assert_array_equal(
            actual["img"], TRANSFORMS.build(stock)({"img_path": str(tmp_path / "a.jpg")})["img"]
        )


def test_steps_that_read_otherwise_stay(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"type": "LoadImageFromFile", "ignore_empty": True},
        {"type": "LoadImageFromNDArray"},
        {"type": "Resize", "scale": (8, 8)},
    ]
    expected = copy.deepcopy(steps)
    complete_images({"pipeline": steps})
    assert steps == expected
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ImageError, match=r"a\.jpg .* cannot be decoded"):
        LoadCompletedImage().transform({"img_path": str(tmp_path / "a.jpg")})


@settings(max_examples=25)
@given(st.floats(0.05, 1), st.sampled_from([0, 2]), st.sampled_from([0, 1]), st.booleans())
def test_lost_share_of_a_jpeg(kept_share: float, subsampling: int, restarts: int, padded: bool) -> None:
    """It is the share of the pixels that a tolerant decoder makes up."""
    whole = jpeg(photo(96, 128), subsampling=subsampling, restart_marker_rows=restarts)
    start = whole.index(b"\xff\xda") + 20
    cut = whole[: start + round(kept_share * (len(whole) - 2 - start))]
    filled, expected = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (cut + b"\xff\xd9", whole))
    share = float((filled != expected).any(axis=2).mean())
    lost = lost_share(cut + bytes(5000 * padded))
    assert lost is not None
    # where coded data restarts, only whole rows of blocks are counted: 16 of 96 lines at most are missed
    assert share - (0.2 if restarts else 0.03) <= lost <= share + 0.12


def test_degenerate_images(tmp_path: Path) -> None:
    """Too thin for a scale is bad; otherwise they are like others."""
    for height, width in ((1, 1), (1, 4000), (4000, 1)):
        path = tmp_path / f"{height}x{width}.png"
        Image.fromarray(noise(height, width)).save(path)
        assert check_picture(path, (height, width)) == ""
        assert load_picture(path, (height, width), (4000, 4000)).pixels.shape == (height, width, 3)
        if height != width:
            for check in (check_picture, load_picture):
                with pytest.raises(ImageError, match=rf"{path.name} is {width} x {height} .*larger --scale"):
                    check(path, (height, width), (256, 192))


def test_unreadable_names(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        check_picture(tmp_path / "a\0b.jpg", (1, 1))
    with pytest.raises(ImageError, match="cannot be read"):
        check_picture(tmp_path / ("x" * 300), (1, 1))
    with pytest.raises(ImageError, match="no image"):
        (tmp_path / "a.png").write_text("<html>")
        image_size(tmp_path / "a.png")


def test_digests_tell_files_apart() -> None:
    digests = {digest_file(bytes([value])) for value in range(256)}
    assert len(digests) == 256
    assert 0 not in digests
    assert max(map(abs, digests)) < 2**63
