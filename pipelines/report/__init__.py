"""What people look at: a page about trainings or about a cache, in one file."""
