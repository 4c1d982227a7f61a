"""`python -m kilofed` is the command `kilofed`."""

import sys

from kilofed.cli import main

if __name__ == "__main__":
    sys.exit(main())
