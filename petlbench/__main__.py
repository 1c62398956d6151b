"""`python -m petlbench`."""

from petlbench.cli import entry

if __name__ == "__main__":
    entry()
