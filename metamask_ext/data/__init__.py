"""Task distributions and data sets."""

from .characters import Characters, glyphs, load_characters
from .digits import Digits, load_digits
from .few_shot import few_shot_tasks
from .image_tasks import ColoredImages, PermutedImages, RotatedImages
from .linear import LinearTasks, linear_tasks
from .sine import SineTasks, sine_tasks
from .sinusoid import SinusoidTasks, sine_of_linear_tasks, sinusoid_tasks

__all__ = [
    "Characters",
    "ColoredImages",
    "Digits",
    "LinearTasks",
    "PermutedImages",
    "RotatedImages",
    "SineTasks",
    "SinusoidTasks",
    "few_shot_tasks",
    "glyphs",
    "linear_tasks",
    "load_characters",
    "load_digits",
    "sine_of_linear_tasks",
    "sine_tasks",
    "sinusoid_tasks",
]
