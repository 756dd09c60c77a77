"""Masked layers, and the tasks of a model."""

from .batch_norm import TaskBatchNorm2d
from .by_task import split_by_task
from .convolutions import MaskedConv1d, MaskedConv3d, MaskedConvTranspose1d, MaskedConvTranspose2d, MaskedConvTranspose3d
from .embedding import MaskedEmbedding
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedEmbedding",
    "MaskedLayer",
    "MaskedLinear",
    "TaskBatchNorm2d",
    "split_by_task",
]
