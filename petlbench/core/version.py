"""The version. Setup.cfg, the command line and records read it from here."""

__version__ = "0.1.0"
