"""What do SGFI and CKD cost at the paper's size, in time and memory, and what does bounding them change?

    python tests/benchmarks/losses.py --teacher teacher.pth --student student.pth --ann-file train.json --img-dir images

Times are of one forward and backward pass, the smallest of a few. Memory is the highest that the process needed beyond
what it had before. SGFI: 1,024 RoIs on five levels of 256 channels from two images of 1333 x 800, beside a training
step of the student that has such a pyramid (Faster R-CNN R50-FPN), and beside other ways to compute it. CKD: 1,024
boxes and a queue of 81,920 representations of 256 numbers, beside the same in one piece. Without checkpoints, what the
sampling of RoIAlign changes on real features is left out; bccd.py beside this file leaves some in its output folder.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import roi_align

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on
from kdpipe.cache.views import input_size, map_boxes, view_matrix
from kdpipe.distill.losses.ckd import ckd_loss
from kdpipe.distill.losses.ckd_sliced import sliced_ckd_loss
from kdpipe.distill.losses.numeric import unit_rows
from kdpipe.distill.losses.sgfi import SGFI, sgfi_loss
from kdpipe.distill.rois.align import roi_align_assigned, roi_align_levels
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config

SIZE = (800, 1333)
STRIDES = (4, 8, 16, 32, 64)
ROIS, CHANNELS = 1024, 256
BOXES, QUEUE, DIM = 1024, 81_920, 256
FEW = 64  # RoIs: adaptive sampling of more large ones on every level takes minutes
RATIOS = (1, 2, 4)


def memory(name: str) -> int:
    """An entry of the kernel's account of this process, bytes."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name)) * 1024


def measured(run: Callable[[], object], rounds: int) -> tuple[float, int]:
    """Seconds of the fastest of some calls, and the largest memory beyond what there was before the first."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), memory("VmHWM") - before


def rois_of(count: int, size: tuple[int, int], sides: tuple[float, float]) -> Tensor:
    """RoIs of two images, their sides drawn log-uniformly from a range, Tensor[R, 5]."""
    g = torch.Generator().manual_seed(0)
    room = torch.tensor([size[1], size[0]])
    low, high = (math.log(side) for side in sides)
    extent = torch.minimum((torch.rand(count, 2, generator=g) * (high - low) + low).exp(), room)
    corner = torch.rand(count, 2, generator=g) * (room - extent)
    return torch.cat([torch.arange(count)[:, None] % 2, corner, corner + extent], dim=1)


def adaptive(pyramid: Sequence[Tensor], strides: Sequence[int], rois: Tensor) -> Tensor:
    """RoI features of every level with as many sample points as a RoI has pixels there, Tensor[R, L, C, 7, 7]."""
    levels = [roi_align(x, rois, 7, 1 / stride, 0, True) for x, stride in zip(pyramid, strides, strict=True)]
    return torch.stack(levels, dim=1)


def bounded(pyramid: Sequence[Tensor], strides: Sequence[int], rois: Tensor) -> Tensor:
    """The same with two sample points per cell and axis, as kdpipe does it."""
    return roi_align_levels(pyramid, strides, rois)


def torchvisions(pyramid: Sequence[Tensor], strides: Sequence[int], rois: Tensor) -> Tensor:
    """The same by torchvision."""
    levels = [roi_align(x, rois, 7, 1 / stride, 2, True) for x, stride in zip(pyramid, strides, strict=True)]
    return torch.stack(levels, dim=1)


def in_order(sgfi: SGFI, student: Tensor, teacher: Tensor) -> Tensor:
    """Equation 1 as kdpipe computes it: the mixture is adapted."""
    loss: Tensor = sgfi(student, teacher)[0]
    return loss


def plainly(sgfi: SGFI, student: Tensor, teacher: Tensor) -> Tensor:
    """Equation 1 in its own order: every level adapted, then compared."""
    adapted = sgfi.adapt(student.flatten(0, 1)).unflatten(0, student.shape[:2])
    return sgfi_loss(adapted, teacher, sgfi.embed, sgfi.temperature)[0]


def sgfi_at(
    sgfi: SGFI, align: Callable[..., Tensor], pyramid: Sequence[Tensor], rois: Tensor, teacher: Tensor
) -> Tensor:
    """The loss of RoIs on a student's pyramid."""
    return in_order(sgfi, align(pyramid, STRIDES, rois), teacher)


def gradients(loss: Callable[[], Tensor], learned: Sequence[Tensor]) -> object:
    """Forward and backward."""
    return torch.autograd.grad(loss(), learned)


def student_step() -> Callable[[], object]:
    """A training step of Faster R-CNN R50-FPN with two images, and ten objects in each."""
    register_all_modules(init_default_scope=True)
    config = find_config("faster-rcnn_r50_fpn_1x_coco").model
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001, momentum=0.9)
    boxes = rois_of(20, SIZE, (32, 500))
    samples, images = [], []
    for index in range(2):
        info = {"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0), "img_id": index}
        sample = DetDataSample(metainfo=info)
        sample.gt_instances = InstanceData(bboxes=boxes[index::2, 1:], labels=torch.arange(10))
        samples.append(sample)
        images.append(torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8))

    def step() -> None:
        data = model.data_preprocessor({"inputs": list(images), "data_samples": samples}, True)
        loss, _ = model.parse_losses(model.loss(data["inputs"], data["data_samples"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def row(name: str, seconds: float, peak: int, of: float) -> None:
    click.echo(f"| {name} | {seconds:.2f} | {seconds / of:.2f} | {peak / 2**20:.0f} |")


def sgfi_table(rounds: int) -> None:
    click.echo("| SGFI, 1,024 RoIs | s | x student's step | memory, MiB |\n|---|---|---|---|")
    step = student_step()
    step()  # what is made at the first time only
    of, peak = measured(step, rounds)
    row("Faster R-CNN R50-FPN: its own step", of, peak, of)
    pyramid = [torch.randn(2, CHANNELS, -(-800 // stride), 1344 // stride, requires_grad=True) for stride in STRIDES]
    sgfi = SGFI(CHANNELS, CHANNELS)
    learned = [*pyramid, *sgfi.parameters()]
    ways = {"": bounded, ", RoIAlign of torchvision": torchvisions, ", adaptive sampling": adaptive}
    for kind, sides in (("sides 16 to 800", (16, 800)), ("sides 400 to 1333", (400, 1333))):
        for count in (ROIS, FEW):
            rois, teacher = rois_of(count, SIZE, sides), torch.randn(count, CHANNELS, 7, 7)
            for way, align in ways.items() if count == FEW else [*ways.items()][:2]:
                loss = partial(sgfi_at, sgfi, align, pyramid, rois, teacher)
                row(f"{count} RoIs, {kind}{way}", *measured(partial(gradients, loss, learned), rounds), of)
    student, teacher = torch.randn(ROIS, len(STRIDES), CHANNELS, 7, 7), torch.randn(ROIS, CHANNELS, 7, 7)
    for order, at_rois in (("", in_order), (", every level adapted first", plainly)):
        run = partial(gradients, partial(at_rois, sgfi, student, teacher), [*sgfi.parameters()])
        row(f"{ROIS} RoIs, without RoIAlign{order}", *measured(run, rounds), of)


def ckd_table(rounds: int) -> None:
    student, keys = (torch.randn(count, DIM, requires_grad=True) for count in (BOXES, BOXES + QUEUE))
    click.echo(
        f"\n| CKD, N = {BOXES:,}, K = {QUEUE:,}, d = {DIM} | s | x in one piece | memory, MiB |\n|---|---|---|---|"
    )

    def in_slices() -> Tensor:
        return sliced_ckd_loss(unit_rows(student), unit_rows(keys), None, 0.07)[0]

    ways: list[Callable[[], Tensor]] = [in_slices, partial(ckd_loss, student, keys)]
    losses = [loss().item() for loss in ways]
    timed = [measured(partial(gradients, loss, [student, keys]), rounds) for loss in ways]
    row("kdpipe, in slices", *timed[0], timed[1][0])
    row("in one piece", *timed[1], timed[1][0])
    click.echo(f"\nThe losses: {losses[0]:.6f} and {losses[1]:.6f}.")


@torch.no_grad()
def sampling_table(teacher_ckpt: Path, student_ckpt: Path, ann_file: Path, img_dir: Path, images: int) -> None:
    """How far the number of sample points moves SGFI and its gradients, on what trained detectors see."""
    data = load_coco(ann_file, img_dir, images)
    detectors = []
    for ckpt in (teacher_ckpt, student_ckpt):
        checkpoint = load_checkpoint(ckpt)
        cfg = teacher_config(checkpoint, None)
        detectors.append(load_teacher(checkpoint, cfg, proposals=100, device=torch.device("cpu")))
    teacher, student = detectors
    scale = teacher.pixels.own_scale()
    extractor = teacher.model.roi_head.bbox_roi_extractor
    inputs = extractor.num_inputs
    sgfi = SGFI(student.model.roi_head.bbox_roi_extractor.out_channels, extractor.out_channels)
    strides = [stride[0] for stride in student.model.rpn_head.prior_generator.strides]
    samples: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}
    for info in data.images:
        image = read_image(img_dir / info.file_name, (info.height, info.width))
        size = input_size((info.height, info.width), scale)
        teacher_pyramid, student_pyramid = (x.pyramid(image, scale, False)[0] for x in (teacher, student))
        truth = map_boxes(
            torch.from_numpy(data.gt_boxes(info.image_id)), view_matrix((info.height, info.width), size, False)
        )
        objects = torch.cat([torch.zeros(len(truth), 1), truth], dim=1)
        large = rois_of(32, size, (size[0] / 2, size[1]))
        large[:, 0] = 0
        for kind, rois in (("objects", objects), ("large", large)):
            expected = roi_align_assigned(teacher_pyramid[:inputs], strides[:inputs], rois, extractor.finest_scale)
            for ratio in (0, *RATIOS):
                with torch.enable_grad():
                    levels = [level.detach().requires_grad_() for level in student_pyramid]
                    at = roi_align_levels(levels, strides, rois, 7, ratio) if ratio else adaptive(levels, strides, rois)
                    loss = sgfi(at, expected).loss
                    grads = torch.autograd.grad(loss, [*levels, *sgfi.parameters()])
                pyramid, learned = (torch.cat([x.flatten() for x in part]) for part in (grads[:5], grads[5:]))
                samples.setdefault((kind, ratio), []).append((loss.detach(), pyramid, learned))
    click.echo("\n| RoIs | points per cell | SGFI | moved | gradient at the pyramid moved | of SGFI's parameters |")
    click.echo("|---|---|---|---|---|---|")
    for kind in ("objects", "large"):
        exact = [torch.cat([x.flatten() for x in part]) for part in zip(*samples[kind, 0], strict=True)]
        for ratio in (0, *RATIOS):
            these = [torch.cat([x.flatten() for x in part]) for part in zip(*samples[kind, ratio], strict=True)]
            off = [float((a.mean() - b.mean()) / b.mean()) for a, b in zip(these[:1], exact[:1], strict=True)]
            off += [float((a - b).norm() / b.norm()) for a, b in zip(these[1:], exact[1:], strict=True)]
            cells = " | ".join(f"{100 * value:.2f} %" for value in off)
            points = f"{ratio} x {ratio}" if ratio else "adaptive"
            click.echo(f"| {kind} | {points} | {float(these[0].mean()):.4f} | {cells} |")


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), help="Checkpoint of a trained two-stage detector.")
@click.option("--student", type=click.Path(path_type=Path), help="Checkpoint of another one, with as many levels.")
@click.option("--ann-file", type=click.Path(path_type=Path), help="COCO JSON of photographs for these.")
@click.option("--img-dir", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=16, show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
@click.option("--only", type=click.Choice(["sgfi", "ckd", "sampling"]), help="One table instead of all.")
def main(
    teacher: Path | None,
    student: Path | None,
    ann_file: Path | None,
    img_dir: Path | None,
    images: int,
    rounds: int,
    only: str | None,
) -> None:
    """Print the tables."""
    torch.manual_seed(0)
    if only in (None, "sgfi"):
        sgfi_table(rounds)
    if only in (None, "ckd"):
        ckd_table(rounds)
    if only in (None, "sampling") and teacher and student and ann_file and img_dir:
        sampling_table(teacher, student, ann_file, img_dir, images)


if __name__ == "__main__":
    main()
