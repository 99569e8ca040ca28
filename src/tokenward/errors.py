"""The one exception that speaks to the user."""


class UserError(Exception):
    """A mistake in what the user gave: data, recipe, path or value.

    The message says what was got, why it cannot work and what to write instead. The command line
    prints it without a traceback and exits with status 2.
    """
