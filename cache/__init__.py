"""What the teacher said, on disk."""
