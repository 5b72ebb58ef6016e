"""Time and memory of the RoIs of dense students at 1333 x 800: drawn among their boxes, and paired with cached ones.

python tests/benchmarks/dense_rois.py [--rounds 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

STUDENTS = {"RetinaNet": "retinanet_r18_fpn_1x_coco", "FCOS": "fcos_r50-caffe_fpn_gn-head_1x_coco"}
SIZE, IMAGES, OBJECTS, CACHED = (800, 1333), 2, 20, 512


def measure(name: str, what: str, rounds: int) -> None:
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on
    from kdpipe.distill.students.dense import DenseStudent
    from kdpipe.distill.students.dense_forward import DenseForward
    from kdpipe.pipelines.detectors.configs import find_config

    register_all_modules(init_default_scope=True)
    config = find_config(STUDENTS[name]).model
    config.backbone.init_cfg = None
    student = DenseStudent(MODELS.build(config).train())
    torch.manual_seed(0)

    def boxes(count: int) -> torch.Tensor:
        """Anywhere in the image, of 16 to 512 pixels."""
        sides = 16 * 2 ** (5 * torch.rand(count, 1) + torch.rand(count, 2) - 0.5)
        corner = torch.rand(count, 2) * (torch.tensor(SIZE[::-1]) - sides).clamp(min=0)
        return torch.cat([corner, corner + sides], dim=1).clamp(max=SIZE[1])

    forward = DenseForward(student)
    for stride in student.strides:
        h, w = -(-SIZE[0] // stride), -(-1344 // stride)
        shape = (IMAGES, student.num_anchors * 4, h, w)
        far = 0.2 * torch.randn(shape)
        # distances of about two strides for FCOS, small deltas for RetinaNet
        forward.regression.append(far if student.num_anchors > 1 else 2 * stride * far.exp())
        forward.scores.append(torch.randn(IMAGES, student.num_anchors * student.num_classes, h, w))
        forward.classification.append(torch.randn(IMAGES, *student.embedding_dims, h, w))
    forward.metas = [{"img_shape": SIZE}] * IMAGES
    forward.ground_truth = [(boxes(OBJECTS), torch.zeros(OBJECTS, dtype=torch.int64)) for _ in range(IMAGES)]
    rois = torch.cat([torch.arange(IMAGES).repeat_interleave(CACHED)[:, None], boxes(IMAGES * CACHED)], dim=1)

    def step() -> int:
        if what == "pair":
            return int(forward.outputs_at(rois)[0].sum())
        return len(forward.sampled()[0])

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = step()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    number = len(student.boxes(forward.regression, 0, SIZE))
    line = f"{name:10} {number:8,} boxes per image, {what}: {statistics.median(seconds):.3f} s"
    print(
        f"{line} ({min(seconds):.3f} to {max(seconds):.3f}), memory grew by {grown:.0f} MiB, {count} RoIs", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, help="one measurement, in this process")
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], options.one[1], options.rounds)
    else:
        for name in STUDENTS:
            for what in ("draw", "pair"):
                subprocess.run([sys.executable, __file__, "--rounds", str(options.rounds), "--one", name, what])
