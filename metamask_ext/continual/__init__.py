"""Learning many tasks one after another: the training loop of the proposal (Blum and Law, section 2.1), resumable after a kill."""

from ..files.errors import CheckpointError, OutputError
from ..files.metrics import read_metrics
from .config import LoopConfig
from .loop import TaskLoop

__all__ = ["CheckpointError", "LoopConfig", "OutputError", "TaskLoop", "read_metrics"]
