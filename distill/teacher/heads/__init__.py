"""The teacher's box heads, frozen, from the weights in a cache."""
