"""Whether everything in a cache is as it was written."""
