"""Imported by the fork server before it forks loader workers: everything a worker needs, and nothing that is stateful."""

import mmdet.datasets.transforms
import mmdet.engine
import mmdet.evaluation
import torch

import kdpipe.pipelines.seeding
import kdpipe.pipelines.transforms

__all__: list[str] = []
