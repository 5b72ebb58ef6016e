"""Configs and checkpoints of mmdet, read without running them; building what they describe."""
