"""Learning many tasks one after another: the training loop of the proposal (Blum and Law, section 2.1), resumable after a kill."""

from .files import CheckpointError, OutputError
from .loop import TaskLoop

__all__ = ["CheckpointError", "OutputError", "TaskLoop"]
