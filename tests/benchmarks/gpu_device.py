"""The device that gpu.py measures on."""

import gc

import torch


class Device:
    """A GPU, or the CPU.

    Args:
        name: `cuda` or `cpu`.
    """

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"

    def describe(self) -> dict[str, object]:
        """Card and versions."""
        import mmdet
        import torchvision

        return {
            "card": torch.cuda.get_device_name(self.torch) if self.is_gpu else "no GPU",
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "CUDA": torch.version.cuda if self.is_gpu else "none",
            "cuDNN": torch.backends.cudnn.version() if self.is_gpu else "none",
            "mmdet": mmdet.__version__,
        }

    def wait(self) -> None:
        """Until it has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def watch_memory(self) -> int:
        """Forget the peak of its memory; bytes that are taken now."""
        self.free()
        if not self.is_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak(self, before: int) -> float | str:
        """GiB that were taken at most beyond what `watch_memory` gave."""
        return (torch.cuda.max_memory_allocated() - before) / 2**30 if self.is_gpu else "-"
