"""Task distributions and data for the experiments."""

from .digits import Digits, load_digits
from .image_tasks import PermutedImages, RotatedImages
from .linear import LinearTasks, linear_tasks
from .sine import SineTasks, sine_tasks

__all__ = [
    "Digits",
    "LinearTasks",
    "PermutedImages",
    "RotatedImages",
    "SineTasks",
    "linear_tasks",
    "load_digits",
    "sine_tasks",
]
