"""Split learning: client and server halves of a model, activations on the wire, reconstruction attacks."""
