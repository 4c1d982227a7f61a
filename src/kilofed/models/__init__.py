"""Models: loading and adapting them, training by gradients, scoring, and cutting them in two."""
