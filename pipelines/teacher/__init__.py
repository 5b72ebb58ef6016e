"""The teacher: who can teach, what it says of an image, live or in comparison with a cache."""
