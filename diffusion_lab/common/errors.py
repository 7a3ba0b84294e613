"""Errors that are the user's to mend: the command line prints their one sentence and no trace."""


class UserError(ValueError):
    """Something asked for is wrong; the message says what, and what to write instead."""


class TrainingStopped(Exception):
    """Training cannot go on, on no rank; the message says why. Whoever trains adds what to do."""
