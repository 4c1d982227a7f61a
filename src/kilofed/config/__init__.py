"""What a run is asked to be: a recipe as frozen dataclasses, and how plain values become one."""
