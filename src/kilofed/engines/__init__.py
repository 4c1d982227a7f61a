"""Engines move bytes between the server and numbered clients; one file each."""
