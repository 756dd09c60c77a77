"""Task distributions and data for the experiments."""

from .digits import Digits, load_digits
from .linear import LinearTasks, linear_tasks

__all__ = ["Digits", "LinearTasks", "linear_tasks", "load_digits"]
