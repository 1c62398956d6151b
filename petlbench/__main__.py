"""`python -m petlbench`."""

import sys

from petlbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
