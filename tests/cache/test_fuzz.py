"""Whatever happens to the files of a cache: reading names it, or what is read is right; `verify` finds it always.

The quick tests try a handful of each kind, the slow ones every file, a bit of every byte of the metadata, and many of
the data.
"""

import itertools
import os
import random
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
from kdpipe.cache.format.record import files_key, parse_record, read_files
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.verify.verification import Verification, remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


PART_BYTES = {"pyramid": 700, "objects": 1_600}


class Victim:
    """A small cache that is damaged and restored, and what it should say.

    Attributes:
        path: of the cache.
        files: its files, relative to it.
    """

    def __init__(self, folder: Path, kit: "type[Kit]", codec: str, tier: str) -> None:
        self.sound, self.path = folder / "sound.zarr", folder / "x.zarr"
        spec = kit.spec(codec=codec, tier=tier, dtype="int8", channels=2, strides=(32, 64), roi_levels=1, proposals=4)
        kit.fill(kit.writer(self.sound, spec, kit.images(3), part_size=PART_BYTES[tier]))
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
        content: dict[Any, Any] = {
            "ids": tuple(cache.image_ids.tolist()),
            "spec": cache.spec,
            "identity": cache.identity,
        }
        content |= {"metadata": cache.metadata, "skipped": cache.skipped}
        try:
            open_cache(self.path)
        except CacheError as error:
            content["partial"] = error
        try:
            content["head"] = cache.head()
        except CacheError as error:
            content["head"] = error
        for image_id in cache.image_ids.tolist():
            content[image_id] = self._targets(cache, image_id)
        return content

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
        content = self.read()
        wrong = [key for key, value in content.items() if not same(value, self.wanted.get(key))]
        for key in wrong:
            if key == "ids":
                assert "partial" in content, what
                continue
            assert isinstance(content[key], CacheError), f"{what}: {key} is silently wrong"
            message = str(content[key])
            if isinstance(key, int):
                assert part is None or f"part {part}" in message, f"{what}: {message}"
                assert array in (None, "index", "file_names") or f"{array!r}" in message, f"{what}: {message}"
                if array not in (None, "index", "file_names"):
                    assert f"image {key}" in message, f"{what}: {message}"
        verification = self.verify()
        assert isinstance(verification, CacheError) or verification.faults, f"{what}: verify finds nothing"
        if part is not None and isinstance(verification, Verification):
            assert any(fault.part == part for fault in verification.faults), what

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
    if parts[0] != "parts":
        return None, None
    return int(parts[1]), parts[3] if len(parts) == 5 else None


def same(actual: Any, expected: Any) -> bool:
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in actual)
    if isinstance(actual, tuple) and isinstance(expected, tuple):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(actual, torch.Tensor):
        return isinstance(expected, torch.Tensor) and torch.equal(actual, expected)
    if hasattr(actual, "tobytes"):
        return hasattr(expected, "tobytes") and bool(actual.tobytes() == expected.tobytes())
    return bool(actual == expected)


@pytest.fixture(scope="module", params=["zstd pyramid", "none objects"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kit: "type[Kit]") -> Victim:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        return Victim(tmp_path_factory.mktemp("fuzz"), kit, *request.param.split())


@pytest.fixture(autouse=True)
def restored(victim: Victim) -> Iterator[None]:
    yield
    shutil.rmtree(victim.path)
    shutil.copytree(victim.sound, victim.path)


def is_metadata(name: str) -> bool:
    return name.endswith(".json")


def test_the_victim_is_sound(victim: Victim) -> None:
    verification = victim.verify()
    assert isinstance(verification, Verification)
    assert verification.faults == ()
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
    if len({(victim.sound / name).stat().st_size for name in (one, other)}) > 1 or any(map(is_metadata, (one, other))):
        content = victim.read()
        for key, value in content.items():
            assert isinstance(value, CacheError) or same(value, victim.wanted.get(key)) or key == "ids", (one, other)
    verification = victim.verify()
    assert isinstance(verification, CacheError) or verification.faults, (one, other)
    victim.restore(one, other)


def test_files_in_the_place_of_others(victim: Victim) -> None:
    """Also those of the same array in another part, whose size and checksums are sound: these only `verify` finds."""
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
    extra = [folder / name for folder, name in zip(folders, names, strict=False)]
    for file in extra:
        file.write_bytes(b"x" * 9)
    assert same(victim.read(), victim.wanted)
    verification = victim.verify()
    assert isinstance(verification, Verification)
    assert {fault.where for fault in verification.faults} == {str(file.relative_to(victim.path)) for file in extra}
    assert remove_faults(victim.path, verification) == []
    for file in extra:
        file.unlink()


@pytest.mark.parametrize("bit", range(8))
def test_every_byte_of_the_metadata_counts(victim: Victim, bit: int) -> None:
    """Of records and lists of files; those of arrays are among the files that are listed."""
    location, counted = Folder(victim.path), 0
    for name in victim.files:
        file, data = victim.path / name, (victim.path / name).read_bytes()
        if name.endswith("files.json"):
            key = name.removesuffix("/files.json")
            record = parse_record((victim.path / key.removeprefix("plan/")).parent.joinpath("zarr.json").read_bytes())
            if key.startswith("plan/"):
                record = parse_record((victim.path / "zarr.json").read_bytes())
            assert record is not None
            assert files_key(str(Path(key).parent), record) == key
            for at in range(0, len(data), 5):
                file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
                assert read_files(location, key, record["files"]) is None, (name, at)
            file.write_bytes(data)
        elif len(Path(name).parts) in (1, 2, 3) and name.endswith("zarr.json"):
            assert parse_record(data) is not None
            for at in range(len(data)):
                assert parse_record(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]) is None, (name, at)
        else:
            continue
        counted += 1
    assert counted == 2 * (2 + len(victim.parts))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=json_values, key=st.sampled_from(["", "head", "parts/00000"]), listed=st.booleans())
def test_any_entry_is_another_and_the_checksums_fit(
    victim: Victim, kit: "type[Kit]", data: st.DataObject, value: Any, key: str, listed: bool
) -> None:
    """What a stranger may write: an error, or something is read; never another exception."""

    def change(record: Any) -> None:
        while True:
            keys = sorted(record) if isinstance(record, dict) else range(len(record))
            at = data.draw(st.sampled_from(keys))
            if not isinstance(record[at], dict | list) or not record[at] or data.draw(st.integers(0, 3)) == 0:
                break
            record = record[at]
        if data.draw(st.integers(0, 5)) == 0:
            del record[at]
        else:
            record[at] = value

    kit.forge(victim.path, key, *((lambda record: None, change) if listed else (change,)))
    victim.read()
    victim.verify()
    shutil.rmtree(victim.path)
    shutil.copytree(victim.sound, victim.path)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_in_the_place_of_a_file(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(victim.files))
    content = data.draw(st.binary(max_size=4096))
    (victim.path / name).write_bytes(content)
    victim.check(f"{name} replaced", *place(name))
    victim.restore(name)


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
