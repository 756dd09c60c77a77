"""Streams of a GPU, on which work runs in order: what is written on one is read on another only after a wait."""

from __future__ import annotations

import torch
from torch import Tensor

WITH_STREAMS = ("cuda",)
"""Types of devices that have streams."""


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns the stream that new work on ``device`` runs on; None: it has no streams."""
    return torch.cuda.current_stream(device) if device.type in WITH_STREAMS else None


class Streams:
    """The streams on which some work was put, by whatever thread; autograd runs a node on the stream of its forward."""

    def __init__(self) -> None:
        self._used: set[torch.cuda.Stream] = set()

    def note(self, tensor: Tensor) -> None:
        """Remembers the stream on which ``tensor`` is about to be written."""
        stream = current_stream(tensor.device)
        if stream is not None:
            self._used.add(stream)

    def wait(self) -> None:
        """Lets the current streams wait for all that is on the noted ones by now. The host does not wait."""
        for stream in self._used:
            here = current_stream(stream.device)
            if here is not None and here != stream:
                here.wait_stream(stream)
