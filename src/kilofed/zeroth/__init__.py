"""Zeroth-order optimisation: two-point steps, seed pools of directions, and the codec for their scalars."""
