"""Times work on a GPU: by its own events, as replays of a CUDA graph, over more copies of the inputs than its L2 cache holds.

    device = Gpu()
    with device.running():
        works = {"metamask": [...], "dense": [...]}  # each: the same work on ``copies(moved, device)`` copies of its inputs
        timings = time_all(works, moved, device)

``moved`` is the number of bytes that one unit of the work must move. :class:`Cpu` stands in where there is no GPU: a clock in place
of events, a call in place of a replay.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

Run = Callable[[], object]

PAST_CACHE = 4
"""All copies of a case's inputs together, in L2 caches. What moves fewer bytes than metamask (dense) must be past it too."""

CACHES_A_REPLAY = 16
"""One replay moves so many L2 caches: the writes that still lie in the cache when it ends are then few of all."""

MIN_READ = 1 << 28
"""Bytes read before a replay, for longer than the host takes to launch it: no wait for the host is timed."""

WARMUP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 15, 101
TARGET_SECONDS = 0.5
"""The time that the rounds of a case should take, within the limits of their number."""

GRAPH = "graph"


class Synchronises(Exception):
    """The work waits for the device, which no graph can hold; the message is torch's."""


class Timing(NamedTuple):
    """``times``: nanoseconds of a unit of work, by round. ``how``: ``"graph"``, or ``"events: "`` and why there is no graph."""

    times: list[int]
    how: str


class Device(Protocol):
    """A device that can time work."""

    @property
    def name(self) -> str: ...

    @property
    def l2_bytes(self) -> int: ...

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Inside, work is called, captured and timed."""

    def capture(self, run: Run) -> Run:
        """Returns what repeats ``run``, which has been called before.

        Raises:
            Synchronises: it cannot be captured.
        """

    def nanoseconds(self, run: Run) -> int:
        """Calls ``run`` and returns the device's time from its begin to its end. What ran before has left the cache."""


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.name: str = properties.name
        self.l2_bytes: int = properties.L2_cache_size
        self._stream = torch.cuda.Stream()
        self._far = torch.zeros(max(PAST_CACHE * self.l2_bytes, MIN_READ) // 4, device="cuda")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        # Autograd's nodes remember the stream on which they were made: all of it is on the one that captures.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, run: Run) -> Run:
        before = torch.cuda.get_sync_debug_mode()
        # A capture that fails leaves the allocator unusable: what waits is found before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            raise Synchronises(str(error).splitlines()[0]) from None
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return graph.replay

    def nanoseconds(self, run: Run) -> int:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: lines that must be written back would be, in the time of what follows.
        self._far.sum()
        start.record()
        run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return round(milliseconds * 1e6)


class Cpu:
    """Stands in for a GPU: runs all of the same code, and its times say nothing of one."""

    name = "cpu"
    l2_bytes = 1 << 14

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, run: Run) -> Run:
        return run

    def nanoseconds(self, run: Run) -> int:
        start = time.perf_counter_ns()
        run()
        return time.perf_counter_ns() - start


def copies(moved: int, device: Device) -> int:
    """Returns how many copies of its inputs a case needs that moves ``moved`` bytes, so that none is in the cache when it is used.

    Raises:
        ValueError: ``moved`` is not positive.
    """
    if moved <= 0:
        raise ValueError(f"moved must be a positive number of bytes, got {moved!r}")
    return max(2, -(-PAST_CACHE * device.l2_bytes // moved))


def time_all(works: Mapping[str, Sequence[Run]], moved: int, device: Device) -> dict[str, Timing]:
    """Times some contenders, in interleaved rounds.

    Args:
        works: by contender, the same unit of work on each of the :func:`copies` of its inputs. All must be right: nothing is
            checked here.
        moved: the bytes that one unit must move.
        device: has been entered (``device.running()``).

    Raises:
        ValueError: a contender has too few copies of its inputs.
    """
    needed = copies(moved, device)
    if few := [name for name, its in works.items() if len(its) < needed]:
        raise ValueError(f"works must have {needed} copies of each contender, past the L2 cache; {', '.join(few)} has fewer")
    units: dict[str, tuple[Run, int, str]] = {}
    for name, its in works.items():
        turns = max(1, -(-CACHES_A_REPLAY * device.l2_bytes // (moved * len(its))))
        run = _in_turn(its, turns)
        run()  # compiles, and allocates
        try:
            units[name] = device.capture(run), turns * len(its), GRAPH
        except Synchronises as error:
            units[name] = run, turns * len(its), f"events: {error}"

    names = list(units)
    took = min(sum(device.nanoseconds(run) for run, _, _ in units.values()) for _ in range(WARMUP_ROUNDS))
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(TARGET_SECONDS * 1e9 / max(took, 1))))
    times: dict[str, list[int]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            run, calls, _ = units[name]
            times[name].append(round(device.nanoseconds(run) / calls))
    return {name: Timing(times[name], units[name][2]) for name in names}


def _in_turn(works: Sequence[Run], turns: int) -> Run:
    """Makes one call of all copies, ``turns`` times over."""

    def run() -> None:
        # Kept until the copy's next turn: else all copies would write their results to the same memory, which the cache holds.
        results: list[object] = [None] * len(works)
        for _ in range(turns):
            for index, work in enumerate(works):
                results[index] = work()

    return run
