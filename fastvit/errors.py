"""The errors fastvit raises on purpose: one line that says what was wrong and what to do.

Only where keys or checks are to be listed do lines follow, one for each.
"""


class FastvitError(Exception):
    """Base of every error below, so that a program (the command line, say) can catch them all."""


class BackendUnavailable(FastvitError, RuntimeError):
    """A backend was asked for by name and cannot run here. The message is the reason."""


class ExtensionNotBuilt(FastvitError, ImportError):
    """A compiled part of fastvit is absent from this installation."""


class ExtensionMismatch(FastvitError, ImportError):
    """A compiled part is present but was built for something else. The message says for what."""


class CheckpointError(FastvitError, ValueError):
    """A checkpoint cannot be read, or does not fit the model. The message names file and size."""


class ParityError(FastvitError, AssertionError):
    """Numbers left the budget of the parity contract. The message lists the worst rows."""
