"""The lock under which the tasks of models are added, removed, packed and listed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock

from torch import nn

_lock = RLock()


def structure() -> RLock:
    """Return the lock, one for all models: they may share layers.

    A thread that holds it sees every layer of a model with the same tasks. Changes and lists of the tasks hold it, a running model
    does not.
    """
    return _lock


@contextmanager
def unchanged_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules back their types, parameters, buffers and children where an error, or Ctrl-C, ends a change of them midway."""
    kept = [
        (
            module,
            type(module),
            {name: (value, value.copy() if isinstance(value, dict) else None) for name, value in vars(module).items()},
        )
        for module in modules
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes in kept:
            module.__class__ = kind
            vars(module).clear()
            for name, (value, entries) in attributes.items():
                vars(module)[name] = value
                if entries is not None:
                    value.clear()
                    value.update(entries)
        raise


def _renew() -> None:
    """Give a forked process a lock of its own: the thread that may hold this one does not exist there."""
    global _lock
    _lock = RLock()


os.register_at_fork(after_in_child=_renew)
