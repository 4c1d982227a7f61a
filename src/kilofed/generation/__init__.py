"""One token after the other, and tokens as text."""
