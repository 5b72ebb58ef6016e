"""Writes the weights of the teacher's RPN and RoI head."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from zarr.storage import LocalStore, MemoryStore

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.head import HEAD, is_parameter_name, parameter_layout
from kdpipe.cache.format.record import is_whole, read_head_record, write_record
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.store.location import Location
from kdpipe.cache.write.arrays import write_array


def write_head(location: Location, state: Mapping[str, Tensor], root: str, codec: str) -> None:
    """Store the weights; does nothing where they are stored already.

    Args:
        location: of the cache.
        state: by parameter name. Floating point becomes float32.
        root: digest of the cache's root.
        codec: of the cache.

    Raises:
        CacheError: a name cannot be stored, or writing failed.
    """
    for name in state:
        if not is_parameter_name(name):
            raise CacheError(f"The parameter name {name!r} cannot be the name of an array.")
    with location.explained("Writing the head"):
        if is_head_whole(location, root):
            return
        with location.staging(HEAD) as folder:
            files = WrittenFiles(LocalStore(folder / "new"))
            parameters = _write_parameters(files, state, codec)
            write_record(folder, {"parameters": parameters, "root": root}, files.files)
            while not location.publish(folder, HEAD):
                if is_head_whole(location, root):
                    return
                location.discard(HEAD)


def head_bytes(state: Mapping[str, Tensor], codec: str) -> int:
    """Bytes on disk of the weights, as `write_head` would store them."""
    files = WrittenFiles(MemoryStore())
    _write_parameters(files, state, codec)
    return sum(size for size, _ in files.files.values())


def _write_parameters(files: WrittenFiles, state: Mapping[str, Tensor], codec: str) -> dict[str, Any]:
    """Write an array per parameter; shape and type of each."""
    parameters: dict[str, Any] = {}
    for name in sorted(state):
        values = state[name].detach()
        values = (values.float() if values.is_floating_point() else values).cpu().contiguous()
        parameters[name] = {"shape": list(values.shape), "dtype": str(values.numpy().dtype)}
        layout, rows = parameter_layout(parameters[name], codec)
        write_array(files, name, layout, values.numpy().reshape(rows, *layout.row_shape))
    return parameters


def is_head_whole(location: Location, root: str) -> bool:
    """Whether the head of this cache is stored, and its files are there in their sizes."""
    record = read_head_record(location)
    return record is not None and record["root"] == root and is_whole(location, HEAD, record)
