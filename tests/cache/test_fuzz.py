"""Whatever happens to the files of a cache: reading names it, or what is read is right; `verify` finds it always.

The quick tests try a handful of each kind, the slow ones every file, a bit of every byte of the metadata, and many of
the data.
"""

import itertools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.cache import CacheError, TeacherCache, open_cache
from kdpipe.cache.format.record import check_digests, check_metadata, read_record
from kdpipe.cache.format.root import read_root
from kdpipe.cache.verify.verification import Verification, remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


class Victim:
    """A small cache that is damaged and restored, and what it should say.

    Attributes:
        path: of the cache.
        files: its files, relative to it.
    """

    def __init__(self, folder: Path, kit: "type[Kit]", codec: str) -> None:
        self.sound, self.path = folder / "sound.zarr", folder / "x.zarr"
        spec = kit.spec(
            codec=codec, tier="pyramid", dtype="int8", channels=2, strides=(32, 64), roi_levels=1, proposals=4
        )
        kit.fill(kit.writer(self.sound, spec, kit.images(4), part_size=1_500))
        shutil.copytree(self.sound, self.path)
        self.files = sorted(str(file.relative_to(self.sound)) for file in self.sound.rglob("*") if file.is_file())
        self.parts = sorted((self.sound / "parts").glob("0*"))
        assert len(self.parts) >= 2
        self.wanted = self.read()

    def read(self) -> dict[Any, Any]:
        """Everything that the cache says; a `CacheError` in place of what it refuses to say."""
        try:
            cache = open_cache(self.path, allow_partial=True)
        except CacheError as error:
            return {"root": error}
        said: dict[Any, Any] = {"ids": tuple(cache.image_ids.tolist()), "spec": cache.spec, "identity": cache.identity}
        said |= {"metadata": cache.metadata, "skipped": cache.skipped}
        try:
            open_cache(self.path)
        except CacheError as error:
            said["partial"] = error
        try:
            said["head"] = cache.head()
        except CacheError as error:
            said["head"] = error
        for image_id in cache.image_ids.tolist():
            said[image_id] = self._targets(cache, image_id)
        return said

    @staticmethod
    def _targets(cache: TeacherCache, image_id: int) -> Any:
        try:
            return vars(cache.targets(image_id)) | {"index": cache.index(image_id)}
        except CacheError as error:
            return error

    def verify(self) -> Verification | CacheError:
        try:
            return verify_cache(self.path, lambda done, total: None, threads=1)
        except CacheError as error:
            return error

    def check(self, what: str, part: int | None = None, array: str | None = None) -> None:
        """Reading is right or refused, naming where; verify finds something; restore."""
        said = self.read()
        wrong = [key for key, value in said.items() if not same(value, self.wanted.get(key))]
        for key in wrong:
            if key == "ids":
                assert "partial" in said, what
                continue
            assert isinstance(said[key], CacheError), f"{what}: {key} is silently wrong"
            message = str(said[key])
            if isinstance(key, int):
                assert part is None or f"part {part}" in message, f"{what}: {message}"
                assert array in (None, "index", "file_names") or f"{array!r}" in message, f"{what}: {message}"
                if array not in (None, "index", "file_names") and "zarr.json" not in what:
                    assert f"image {key}" in message, f"{what}: {message}"
        found = self.verify()
        assert isinstance(found, CacheError) or found.faults, f"{what}: verify finds nothing"
        if part is not None and isinstance(found, Verification):
            assert any(fault.part == part for fault in found.faults), what

    def restore(self, *names: str) -> None:
        for name in names:
            file = self.path / name
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.sound / name, file)

    def flip(self, name: str, bit: int) -> None:
        """Flip a bit of a file, check, restore."""
        with self.flipped(name, bit):
            self.check(f"bit {bit} of {name}", *place(name))

    @contextmanager
    def flipped(self, name: str, bit: int) -> Iterator[None]:
        """A bit of a file is another one. In place: file systems hurry to write files that were cut first."""
        with (self.path / name).open("r+b", buffering=0) as file:
            at, good = bit // 8, os.pread(file.fileno(), 1, bit // 8)
            os.pwrite(file.fileno(), bytes([good[0] ^ 1 << bit % 8]), at)
            yield
            os.pwrite(file.fileno(), good, at)

    def bits(self, name: str) -> int:
        return 8 * (self.sound / name).stat().st_size


def place(name: str) -> tuple[int | None, str | None]:
    """Part and array of a file."""
    parts = Path(name).parts
    if parts[0] != "parts" or len(parts) < 3:
        return None, None
    return int(parts[1]), parts[2] if len(parts) > 3 else None


def same(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, torch.Tensor):
        return isinstance(wanted, torch.Tensor) and torch.equal(found, wanted)
    if hasattr(found, "tobytes"):
        return hasattr(wanted, "tobytes") and bool(found.tobytes() == wanted.tobytes())
    return bool(found == wanted)


@pytest.fixture(scope="module", params=["zstd", "none"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kit: "type[Kit]") -> Victim:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        return Victim(tmp_path_factory.mktemp("fuzz"), kit, request.param)


@pytest.fixture(autouse=True)
def restored(victim: Victim) -> Iterator[None]:
    yield
    shutil.rmtree(victim.path)
    shutil.copytree(victim.sound, victim.path)


def is_metadata(name: str) -> bool:
    return name.endswith("zarr.json")


def test_the_victim_is_sound(victim: Victim) -> None:
    found = victim.verify()
    assert isinstance(found, Verification)
    assert found.faults == ()
    assert not any(isinstance(value, CacheError) for value in victim.wanted.values())


def test_a_bit_of_every_file(victim: Victim) -> None:
    choose = random.Random(0)
    for name in victim.files:
        victim.flip(name, choose.randrange(victim.bits(name)))


def swaps(victim: Victim, count: int | None) -> list[tuple[str, str]]:
    """Pairs of files with different content, first those of equal size, between parts and between arrays."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(victim.files, 2)
        if (victim.sound / one).read_bytes() != (victim.sound / other).read_bytes()
    ]
    size = {name: (victim.sound / name).stat().st_size for name in victim.files}
    pairs.sort(key=lambda pair: size[pair[0]] != size[pair[1]])
    equal = [pair for pair in pairs if size[pair[0]] == size[pair[1]]]
    rest = pairs[len(equal) :]
    random.Random(0).shuffle(rest)
    return [*equal[:count], *rest[:count]]


def swap(victim: Victim, one: str, other: str) -> None:
    shutil.copyfile(victim.sound / one, victim.path / other)
    shutil.copyfile(victim.sound / other, victim.path / one)
    said = victim.read()
    for key, value in said.items():
        assert isinstance(value, CacheError) or same(value, victim.wanted.get(key)) or key == "ids", (one, other, key)
    found = victim.verify()
    assert isinstance(found, CacheError) or found.faults, (one, other)
    victim.restore(one, other)


def test_files_in_the_place_of_others(victim: Victim) -> None:
    """Also those of the same array in another part, whose size and checksums are sound."""
    for one, other in swaps(victim, count=8):
        swap(victim, one, other)


def test_parts_in_the_place_of_others(victim: Victim) -> None:
    one, other = (victim.path / "parts" / name for name in ("00000", "00001"))
    one.rename(victim.path / "aside")
    other.rename(one)
    (victim.path / "aside").rename(other)
    victim.check("swapped parts")


def damages() -> dict[str, Callable[[Path], None]]:
    def cut(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])

    def empty(file: Path) -> None:
        file.write_bytes(b"")

    def folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    def longer(file: Path) -> None:
        file.write_bytes(file.read_bytes() + b"\0" * 16)

    return {
        "gone": Path.unlink,
        "empty": empty,
        "cut": cut,
        "longer": longer,
        "a folder": folder,
    }


def damage_all(victim: Victim, names: list[str], kind: str) -> None:
    for name in names:
        damages()[kind](victim.path / name)
        victim.check(f"{name} {kind}", *place(name))
        victim.restore(name)


@pytest.mark.parametrize("kind", damages())
def test_files_gone_or_cut(victim: Victim, kind: str) -> None:
    damage_all(victim, random.Random(kind).sample(victim.files, 8), kind)


def test_an_extra_file_changes_nothing(victim: Victim) -> None:
    folders = [victim.path, *(entry for entry in sorted(victim.path.rglob("*")) if entry.is_dir())]
    names = itertools.cycle(["c.9", "c.1.7", ".DS_Store", "zarr.json.bak"])
    for folder, name in zip(folders, names, strict=False):
        (folder / name).write_bytes(b"x" * 9)
        assert same(victim.read(), victim.wanted)
        found = victim.verify()
        assert isinstance(found, Verification)
        assert len(found.faults) == 1
        top = folder.relative_to(victim.path).parts
        remove_faults(victim.path, found)
        if top[:1] == ("head",) or (len(top) > 1 and top[0] == "parts"):
            assert not (folder / name).exists()
        else:
            (folder / name).unlink()


def test_a_shape_that_is_huge(victim: Victim) -> None:
    """Neither a large allocation nor another error."""
    for name in (name for name in victim.files if is_metadata(name)):
        text = (victim.path / name).read_text()
        if '"shape":[' in text:
            (victim.path / name).write_text(text.replace('"shape":[', '"shape":[9999999999999999,'))
            victim.check(name, *place(name))
            victim.restore(name)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_in_the_place_of_a_file(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(victim.files))
    content = data.draw(st.binary(max_size=4096))
    (victim.path / name).write_bytes(content)
    victim.check(f"{name} replaced", *place(name))
    victim.restore(name)


@pytest.mark.slow
def test_a_bit_of_every_byte_of_the_metadata(victim: Victim) -> None:
    """Every seventh bit, so one of each byte, by the functions that guard all metadata.

    That reading asks them is tested above. Other parts have the same files as the first.
    """

    def flipped(name: str) -> Iterator[int]:
        for bit in range(0, victim.bits(name), 7):
            with victim.flipped(name, bit):
                yield bit

    for name in (name for name in victim.files if is_metadata(name) and not re.match("parts/0*[1-9]", name)):
        file = victim.path / name
        parts = Path(name).parts
        record = read_record(file.parents[1]) if len(parts) == 4 else None
        for bit in flipped(name):
            what = f"bit {bit} of {name}"
            if record is not None:
                assert check_metadata(file.parents[1], record, parts[2]), what
            elif len(parts) == 3 and parts[0] == "head":
                assert check_digests(victim.path / "head", read_record(victim.path / "head") or {}), what
            elif len(parts) == 3 or name == "head/zarr.json":
                assert read_record(file.parent) is None or parts[0] == "plan", what
            elif name == "parts/zarr.json":
                assert check_digests(victim.path, read_record(victim.path) or {}), what
            if parts[0] in ("zarr.json", "plan"):
                with pytest.raises(CacheError):
                    read_root(victim.path)


@pytest.mark.slow
def test_many_bits_of_the_data(victim: Victim) -> None:
    choose = random.Random(1)
    for name in victim.files:
        if not is_metadata(name):
            for bit in choose.sample(range(victim.bits(name)), 12):
                victim.flip(name, bit)


@pytest.mark.slow
def test_every_file_gone_or_cut(victim: Victim) -> None:
    for kind in damages():
        damage_all(victim, victim.files, kind)


@pytest.mark.slow
def test_every_swap(victim: Victim) -> None:
    for one, other in swaps(victim, count=60):
        swap(victim, one, other)
