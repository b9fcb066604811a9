"""Errors that a user can mend. Every other exception is a bug."""

from __future__ import annotations


class UserError(Exception):
    """One sentence: what was found, what was expected, what to do.

    A command prints it and ends with exit code 2; a worker that raises it is not started again. Every other exception is a bug: a
    traceback, exit code 1, and in a worker another try. So this does not derive from ValueError, which any library may raise.
    """


class Diverged(UserError):
    """The loss or the weights are not finite, or the loss diverges."""
