"""The command ``metamask``."""

from .app import main

__all__ = ["main"]
