"""The one error type for mistakes a user can make and mend; cli.run prints it as one line, without a traceback."""


class UserError(Exception):
    """Something outside this code is wrong: a flag, a file, a shape.

    The message says what was found, what was expected and what to do, and names file, row and key where there are any.
    """
