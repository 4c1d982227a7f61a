"""A run from its recipe to its results, and what can be said before it and done after it."""
