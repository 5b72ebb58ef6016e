"""Names of image files as annotations give them, and as they are on disk."""

__all__ = ["IMAGE_SUFFIXES"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
