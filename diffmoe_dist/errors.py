"""The one kind of error a user is meant to read, and the exit codes."""

from __future__ import annotations

USER_ERROR_EXIT_CODE = 2
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again
HANG_EXIT_CODE = 124  # as of timeout(1)


class UserError(Exception):
    """A mistake the user can fix. The message is one line: the setting, its value, the remedy."""
