"""The version, in one place: setup.cfg, the command line and records read it here."""

__version__ = "0.1.0"
