"""Streams that only note who waits for whom, in place of a GPU's: tensors of the CPU are on them."""

from __future__ import annotations

import torch

from metamask_ext.ops import streams


class Recorder:
    """``here`` is the name of the current stream; ``log`` gets a line for each wait."""

    def __init__(self, monkeypatch, log):
        self.here, self.log = "A", log
        monkeypatch.setattr(streams, "WITH_STREAMS", ("cuda", "cpu"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.here, device))


class Stream:
    def __init__(self, recorder, name, device):
        self.recorder, self.name, self.device, self.stream_id = recorder, name, device, ord(name)

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)

    def wait_stream(self, other):
        self.recorder.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.recorder.log.append(f"the host waits for {self.name}")
