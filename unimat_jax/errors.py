"""UserError: a problem that the user can fix. Programs print it as one line and exit with 2 (see `cli.run_program`)."""


class UserError(ValueError):
    """The message names the field or file, the value, and the remedy."""
