"""Masked layers, and the tasks of a model."""

from .batch_norm import TaskBatchNorm2d
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer
from .registered import watch as _watch

_watch()

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear", "TaskBatchNorm2d"]
