"""A run folder as a page; no second truth."""
