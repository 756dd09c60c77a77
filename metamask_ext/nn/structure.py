"""The lock under which the tasks of models are added, removed, packed and listed."""

from __future__ import annotations

import os
from threading import RLock

_lock = RLock()


def structure() -> RLock:
    """Return the lock, one for all models: they may share layers.

    Whoever holds it sees every layer of a model with the same tasks. It is held for changes of the tasks and for lists of them, not
    while a model runs.
    """
    return _lock


def _renew() -> None:
    """Give a forked process a lock of its own: the thread that may hold this one does not exist there."""
    global _lock
    _lock = RLock()


os.register_at_fork(after_in_child=_renew)
