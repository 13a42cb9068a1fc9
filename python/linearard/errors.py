"""Errors that a user can put right."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why.

    The command line prints it on standard error and exits with status 2.
    """
