"""The commands, and all that is mmdet's."""
