"""`python -m petlbench`."""

from petlbench.commands.main import entry

if __name__ == "__main__":
    entry()
