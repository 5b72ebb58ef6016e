"""Which boxes the losses look at, and their features."""
