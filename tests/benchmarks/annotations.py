"""Reading a COCO JSON of COCO's size, and writing its copy, against json.loads alone in the same run.

    python tests/benchmarks/annotations.py [--annotations 900000] [--images 120000] [--masks]

Each in a process of its own, in turns; prints seconds of the processor, ratios and the most memory that a process held.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = ("import", "json.loads", "load_coco", "write_copy")


def write_file(path: Path, images: int, annotations: int, masks: bool) -> None:
    """A file of drawn boxes, with a polygon of 40 numbers each where masks are asked for."""
    rng = random.Random(0)
    content = {
        "images": [
            {
                "id": i,
                "file_name": f"{i:012d}.jpg",
                "width": 640,
                "height": 480,
                "license": 1,
                "flickr_url": f"http://{i}",
            }
            for i in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": k,
                "image_id": 1 + k * 7919 % images,
                "category_id": 1 + k % 80,
                "bbox": [rng.random() * 500, k % 400, 20.25, 30],
                "area": 600.5,
                "iscrowd": 0,
                **({"segmentation": [[round(rng.random() * 500, 2) for _ in range(40)]]} if masks else {}),
            }
            for k in range(1, annotations + 1)
        ],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(1, 81)],
    }
    path.write_text(json.dumps(content))


def run_step(step: str, path: Path) -> None:
    """Prints the seconds of a step, and this process's memory at its end."""
    from kdpipe.pipelines.data.datasets import load_coco

    start = time.process_time()
    if step == "json.loads":
        json.loads(path.read_bytes())
    elif step != "import":
        data = load_coco(path, path.parent)
        if step == "write_copy":
            data = data.copied_to(path.with_name("copy.json"))
            start = time.process_time()
            data.write_copy()
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent process held
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(seconds, int(peak.split()[1]) >> 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120_000)
    parser.add_argument("--annotations", type=int, default=900_000)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(args.step[0], Path(args.step[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.json"
        write_file(path, args.images, args.annotations, args.masks)
        print(f"{args.annotations:,} annotations, {args.images:,} images, {path.stat().st_size >> 20} MiB")
        seconds: dict[str, list[float]] = {step: [] for step in STEPS}
        memory: dict[str, int] = {}
        for _ in range(args.rounds):
            for step in STEPS:
                command = [sys.executable, __file__, "--step", step, str(path)]
                words = (
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
                )
                seconds[step].append(float(words[0]))
                memory[step] = max(memory.get(step, 0), int(words[1]))
    reference = statistics.median(seconds["json.loads"])
    for step in STEPS:
        median = statistics.median(seconds[step])
        print(f"{step:12} {median:7.2f} s  {median / reference:5.2f} x json.loads  {memory[step]:6} MiB at most")


if __name__ == "__main__":
    main()
