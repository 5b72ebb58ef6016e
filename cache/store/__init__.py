"""Where a cache lies: a folder with locks and renames."""
