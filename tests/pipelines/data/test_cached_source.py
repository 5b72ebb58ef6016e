"""What a cache records of its data set, which anybody may have written."""

from types import SimpleNamespace
from typing import Any

import pytest

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.find import cached_source
from kdpipe.pipelines.data.options import DataOptions

SOUND = {"limit": None, "val": None, "ann_file": "a.json", "img_dir": "images"}


@pytest.mark.parametrize(
    "data", [None, 5, "text", [], {}, {**SOUND, "val": 5}, {**SOUND, "val": ["x"]}, {**SOUND, "ann_file": 5}]
)
def test_a_record_of_another_kind(data: Any) -> None:
    cache: Any = SimpleNamespace(metadata={"data": data}, location="x.zarr")
    with pytest.raises(KdpipeError, match="does not record which data set"):
        cached_source(cache, DataOptions())
    with pytest.raises(KdpipeError, match="is not there, which"):
        cached_source(SimpleNamespace(metadata={"data": SOUND}, location="x"), DataOptions())  # type: ignore[arg-type]
