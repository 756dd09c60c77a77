"""Masked layers, and the tasks of a model."""

from .layers import MaskedConv2d, MaskedLayer, MaskedLinear

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear"]
