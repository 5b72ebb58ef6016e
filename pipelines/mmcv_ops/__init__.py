"""mmcv's compiled ops by torchvision and plain torch."""
