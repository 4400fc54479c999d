"""`python -m topd` is `topd`."""

import sys

from topd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
