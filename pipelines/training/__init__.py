"""From a config to a trained detector, on mmengine's runner."""
