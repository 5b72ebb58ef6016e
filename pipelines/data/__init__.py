"""Data sets: annotations, images, and what is wrong with them."""
