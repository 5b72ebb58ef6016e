"""From what the teacher says to committed parts."""
