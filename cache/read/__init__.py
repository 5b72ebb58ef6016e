"""From a cache to targets."""
