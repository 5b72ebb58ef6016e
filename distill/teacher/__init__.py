"""What the teacher says at the boxes of a student."""
