"""Meta-learning: masks, or weights, from which few gradient steps adapt to a new task."""

from .maml import MAML, Learner, TaskParameters

__all__ = ["MAML", "Learner", "TaskParameters"]
