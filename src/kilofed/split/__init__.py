"""Split learning: a model in two parts, and what crosses the cut."""
