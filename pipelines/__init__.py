"""The commands, and all that is mmdet's."""

from kdpipe.pipelines.mmcv_ops.bridge import install_bridge

install_bridge()
