"""What a cache looks like: arrays, commit records, root."""
