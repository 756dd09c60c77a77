"""Banks of tasks: one model's shared weights, and the masks of thousands of tasks."""

from .index import BankError, BankNotFoundError
from .store import Store, save

__all__ = ["BankError", "BankNotFoundError", "Store", "save"]
