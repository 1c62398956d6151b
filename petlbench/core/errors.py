"""What means "the user can mend this"."""


class UserError(Exception):
    """A mistake a user can mend. The message is one line: what, where and what to do; the CLI exits with 2."""


class Unwritable(UserError):
    """Results cannot be kept: the disk is full, or the folder is read-only. No cell's fault: the whole run ends."""
