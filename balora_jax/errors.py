"""The two ways a run ends early, each with the exit code that the command line returns for it."""


class InputError(ValueError):
    """Bad input or configuration: nothing was written, exit code 2.

    The message is one sentence a user can act on: ``where: expected what, got what. What to do.``
    """

    exit_code = 2


class RunStoppedError(RuntimeError):
    """The run had to stop (diverged, interrupted after a checkpoint): exit code 3."""

    exit_code = 3
