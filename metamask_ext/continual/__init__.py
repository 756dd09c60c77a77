"""Learning many tasks one after another: the training loop of the proposal (Blum and Law, section 2.1), resumable after a kill, and
elastic weight consolidation of what the tasks share."""

from ..files.errors import CheckpointError, OutputError
from ..files.metrics import read_metrics
from .config import LoopConfig
from .ewc import EWC, fisher_diagonal
from .loop import TaskLoop

__all__ = ["EWC", "CheckpointError", "LoopConfig", "OutputError", "TaskLoop", "fisher_diagonal", "read_metrics"]
