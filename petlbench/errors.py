"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake a user can mend. The message is one line: what, where and what to do; the CLI exits with 2."""
