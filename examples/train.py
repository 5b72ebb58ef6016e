"""Train the config distil.py."""

import kdpipe.pipelines  # noqa: F401  first: mmcv's ops, in the loader workers too
from mmengine.config import Config
from mmengine.runner import Runner

if __name__ == "__main__":
    cfg = Config.fromfile("distil.py")
    cfg.work_dir = "work_dirs/distil"
    Runner.from_cfg(cfg).train()
