"""Learning from what other models say."""
