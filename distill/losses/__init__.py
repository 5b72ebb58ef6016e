"""One file per loss, its equation in the docstring."""
