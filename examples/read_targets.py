"""Print what the teacher said of an image: `python read_targets.py coco.zarr [IMAGE_ID]`."""

import sys

from kdpipe.cache import open_cache

BEST = 5


def main(path: str, image_id: int | None = None) -> None:
    cache = open_cache(path)
    image_id = int(cache.image_ids[0]) if image_id is None else image_id
    print(f"{len(cache)} images, tier {cache.spec.tier}, {cache.spec.dtype}")

    targets = cache.targets(image_id, fields=("logits", "deltas"))
    scores = targets.logits.float().softmax(dim=1)[:, :-1]  # [R, K], without background
    boxes = targets.class_boxes(cache.spec)  # [R, K, 4] (x1, y1, x2, y2), pixels of the image file
    print(f"image {image_id}: {len(boxes)} boxes")

    best, classes = scores.max(dim=1)  # [R]
    for row in best.argsort(descending=True)[:BEST].tolist():
        label = int(classes[row])
        corners = ", ".join(f"{x:.1f}" for x in boxes[row, label].tolist())
        print(f"{best[row]:.3f}  {cache.spec.class_names[label]}  ({corners})")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
