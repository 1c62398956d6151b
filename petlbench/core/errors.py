"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what, where and what to do. The CLI exits with 2."""


class Unwritable(UserError):
    """Results cannot be written: the disk is full or the folder is read-only. No cell caused it, so the run ends."""
