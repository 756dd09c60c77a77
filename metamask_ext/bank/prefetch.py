"""Tasks of a folder, read by a thread in the background."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from torch import nn

from ..nn.task_layer import task_layers
from .residency import Residency


def in_background(model: nn.Module, keys: Sequence[str], residency: Residency | None) -> Future[None]:
    """Read the tasks with these keys in a thread; the future gets the first error.

    A thread of its own, and no pool: a forked process would wait for the workers of one, which are not there.
    """
    found: Future[None] = Future()
    found.set_running_or_notify_cancel()
    thread = threading.Thread(target=_read, args=(model, keys, residency, found), name="metamask-prefetch", daemon=True)
    thread.start()
    return found


def _read(model: nn.Module, keys: Sequence[str], residency: Residency | None, found: Future[None]) -> None:
    first: BaseException | None = None
    try:
        dicts = dict.fromkeys(tensors for _, layer in task_layers(model) for tensors in layer._dicts().values())
        if residency is not None:
            residency.use(keys)
        for key in keys:
            try:
                for tensors in dicts:
                    tensors._tensor(key)
            except Exception as error:  # the task waits still, and whoever uses it gets the same
                first = first or error
    except BaseException as error:
        first = first or error
    if first is None:
        found.set_result(None)
    else:
        found.set_exception(first)
