"""Task distributions and data for the experiments."""

from .characters import Characters, glyphs, load_characters
from .digits import Digits, load_digits
from .few_shot import few_shot_tasks
from .image_tasks import PermutedImages, RotatedImages
from .linear import LinearTasks, linear_tasks
from .sine import SineTasks, sine_tasks

__all__ = [
    "Characters",
    "Digits",
    "LinearTasks",
    "PermutedImages",
    "RotatedImages",
    "SineTasks",
    "few_shot_tasks",
    "glyphs",
    "linear_tasks",
    "load_characters",
    "load_digits",
    "sine_tasks",
]
