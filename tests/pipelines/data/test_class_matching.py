"""Classes of a data set are those of a model by name, whatever the order and the number of its categories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData, load_coco

NAMES = ("ant", "traffic light", "cat", "dog", "elk")


def data_of(
    folder: Path, names: Sequence[str], used: Sequence[str], supercategories: Sequence[str] = ()
) -> DetectionData:
    """An image with a box of each class that is used, in places that tell which class it is."""
    categories: list[dict[str, Any]] = [{"id": 3 * number, "name": name} for number, name in enumerate(names)]
    for category, group in zip(categories, supercategories, strict=False):
        category["supercategory"] = group
    boxes = [
        {"image_id": 1, "category_id": 3 * names.index(name), "bbox": [10 * NAMES.index(_known(name)), 0, 10, 10]}
        for name in used
    ]
    image = {"id": 1, "file_name": "a.jpg", "width": 99, "height": 99}
    (folder / "a.json").write_text(json.dumps({"images": [image], "annotations": boxes, "categories": categories}))
    return load_coco(folder / "a.json", folder)


def _known(name: str) -> str:
    return name.lower().replace("_", " ") if name.lower().replace("_", " ") in NAMES else NAMES[0]


@settings(max_examples=50)
@given(here=st.permutations(NAMES), model=st.permutations(NAMES), few=st.integers(1, 5), many=st.booleans())
def test_labels_are_those_of_the_model(
    tmp_path_factory: pytest.TempPathFactory, here: list[str], model: list[str], few: int, many: bool
) -> None:
    folder = tmp_path_factory.mktemp("classes")
    here, model = (here, model[:few]) if many else (here[:few], model)
    data = data_of(folder, here, here)
    ids = dict(zip(data.class_names, data.category_ids, strict=True))
    matched = match_classes(data, model, "the teacher")
    assert matched.class_names == tuple(model)
    assert len(set(matched.category_ids)) == len(model)
    assert all(each == ids[name] for name, each in zip(model, matched.category_ids, strict=True) if name in ids)
    boxes, labels = matched.gt_boxes(1), matched.gt_labels(1)
    assert [NAMES[int(x) // 10] for x in boxes[:, 0]] == [model[label] for label in labels]
    assert {model[label] for label in labels} == set(here) & set(model)
    assert matched.images[0].num_gt == len(labels)
    num_removed = len(here) - len(labels)
    assert [kind.count for kind in matched.absent] == [num_removed] * (num_removed > 0)
    assert bool(matched.notes) == (here != model)
    again = match_classes(data, matched.class_names, "the cache")
    assert again.digest() == matched.digest()
    copied = json.loads(matched.copied_to(folder / "b.json").write_copy().read_text())
    assert [entry["name"] for entry in copied["categories"]] == model
    names_of_ids = {entry["id"]: entry["name"] for entry in copied["categories"]}
    assert [names_of_ids[entry["category_id"]] for entry in copied["annotations"]] == [
        NAMES[int(entry["bbox"][0]) // 10] for entry in copied["annotations"]
    ]


def test_spelling_does_not_count(tmp_path: Path) -> None:
    data = data_of(tmp_path, ["Cat", "Traffic_light"], ["Cat", "Traffic_light"])
    assert match_classes(data, ["cat", "traffic light"], "the teacher") is data
    matched = match_classes(data, ["traffic light", "cat"], "the teacher")
    assert matched.class_names == ("Traffic_light", "Cat")
    assert matched.notes == (
        "classes are matched by name with those of the teacher (put in its order: Traffic_light, Cat)",
    )


def test_a_category_that_only_groups_others_is_dropped(tmp_path: Path) -> None:
    names, groups = ["animals", "cat", "dog"], ["none", "animals", "animals"]
    matched = match_classes(data_of(tmp_path, names, names[1:], groups), ["cat", "dog", "ant"], "the teacher")
    assert matched.class_names == ("cat", "dog", "ant")
    np.testing.assert_array_equal(matched.gt_labels(1), [0, 1])
    assert "dropped, since it only groups others: animals" in matched.notes[0]
    assert "not in the file: ant" in matched.notes[0]
    with pytest.raises(KdpipeError, match="are not those of the teacher"):  # somebody used it
        match_classes(data_of(tmp_path, names, names, groups), ["cat", "dog", "ant"], "the teacher")


@pytest.mark.parametrize(
    ("here", "model", "message"),
    [
        (["cat", "dog"], ["cat", "elk"], r"not those of the teacher: found 2 \(cat, dog\), expected 2 \(cat, elk\)"),
        (["cat"], ["ant", "elk"], r"found 1 \(cat\), expected 2 \(ant, elk\)"),
        (["cat", "Cat"], ["cat"], r"found 2 \(cat, Cat\)"),
        (["cat"], ["cat", "cat"], r"expected 2 \(cat, cat\)"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, here: list[str], model: list[str], message: str) -> None:
    with pytest.raises(KdpipeError, match=message):
        match_classes(data_of(tmp_path, here, here[:1]), model, "the teacher")


def test_annotations_of_other_classes_only(tmp_path: Path) -> None:
    data = data_of(tmp_path, ["cat", "dog"], ["dog"])
    with pytest.raises(KdpipeError, match=r"no usable annotation of the classes of the teacher \(cat\)"):
        match_classes(data, ["cat"], "the teacher")


def test_a_group_with_the_name_of_its_only_class_is_dropped(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "cat"}]
    image = {"id": 1, "file_name": "a.jpg", "width": 99, "height": 99}
    box: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    content = {"images": [image], "annotations": [box], "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = load_coco(tmp_path / "a.json", tmp_path)
    assert (data.class_names, data.category_ids) == (("cat",), (1,))
    assert data.notes == ("category 0 (cat) has no annotation and only groups others: it is dropped",)
    content["annotations"] = [box, {**box, "category_id": 0}]  # somebody used it
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(KdpipeError, match="category name 'cat' occurs more than once"):
        load_coco(tmp_path / "a.json", tmp_path)
