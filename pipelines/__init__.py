"""The commands, and all that is mmdet's."""

from kdpipe.pipelines.openmmlab import install_bridge

install_bridge()
