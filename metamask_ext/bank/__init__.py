"""Banks of tasks: one model's shared weights, and the masks of thousands of tasks."""

from .bank import MaskBank
from .index import BankError, BankNotFoundError
from .store import Store
from .writer import save

__all__ = ["BankError", "BankNotFoundError", "MaskBank", "Store", "save"]
