"""Optimisers whose update of masked layers happens inside the backward."""

from .adamw import FusedMaskedAdamW as FusedMaskedAdamW
from .sgd import FusedMaskedSGD as FusedMaskedSGD

__all__ = ["FusedMaskedAdamW", "FusedMaskedSGD"]
