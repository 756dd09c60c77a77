"""Learning many tasks one after another: the training loop of the proposal (Blum and Law, section 2.1), resumable after a kill."""

from ..files.checkpoint import CheckpointError, OutputError, read_metrics
from .loop import TaskLoop

__all__ = ["CheckpointError", "OutputError", "TaskLoop", "read_metrics"]
