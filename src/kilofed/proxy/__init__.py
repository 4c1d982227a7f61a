"""Steering a large model by the difference of two small ones."""
