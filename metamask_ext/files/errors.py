"""The errors that name a file or folder which a run cannot use."""

from __future__ import annotations


class OutputError(RuntimeError):
    """A folder or file of a run cannot be used; the message is one line and names it."""


class CheckpointError(OutputError):
    """A checkpoint is damaged, or of another run."""
