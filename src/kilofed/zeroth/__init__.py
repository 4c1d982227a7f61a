"""Tuning by forward passes: two-point steps, directions from seeds, and their scalars in few bytes."""
