"""The contract between a method and everything else: two sides, two verbs, bytes counted in one place."""
