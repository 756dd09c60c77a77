"""Timing on a GPU: here by what stands in for one, and on one where there is one. No time is asserted."""

from __future__ import annotations

import pytest
import torch
from metamask_ext.bench import cuda_timing
from metamask_ext.bench.cuda_timing import Cpu, Gpu, Synchronises, copies, time_all
from support.gpu import needs_gpu


class Counter(Cpu):
    """A device on which every call takes 100 ns; it notes what it has called and captured."""

    l2_bytes = 1000

    def __init__(self, waits=""):
        self.called, self.captured, self.waits = [], [], waits

    def work(self, name):
        return lambda: self.called.append(name)

    def calls_of(self, run):
        before = len(self.called)
        run()
        return self.called[before:]

    def capture(self, run):
        if (names := self.calls_of(run))[0] == self.waits:
            raise Synchronises("it waits")
        self.captured.append(names)
        return run

    def nanoseconds(self, run):
        return 100 * len(self.calls_of(run))


@pytest.mark.parametrize(("moved", "number"), [(1, 4000), (999, 5), (1000, 4), (1001, 4), (1334, 3), (4000, 2), (10**9, 2)])
def test_the_copies_are_past_the_cache_and_never_one_alone(moved, number):
    assert copies(moved, Counter()) == number


@pytest.mark.parametrize("moved", [0, -1])
def test_a_case_that_moves_nothing_is_refused(moved):
    with pytest.raises(ValueError, match=f"moved must be a positive number of bytes, got {moved}"):
        copies(moved, Counter())


def test_each_copy_is_used_in_turn_and_the_times_are_those_of_one_unit():
    device = Counter()
    names = [f"ours {index}" for index in range(4)]
    timings = time_all({"ours": [device.work(name) for name in names]}, 1000, device)
    assert device.captured == [4 * names]  # 16 caches a replay
    assert set(timings["ours"].times) == {100} and timings["ours"].how == cuda_timing.GRAPH
    assert cuda_timing.MIN_ROUNDS <= len(timings["ours"].times) <= cuda_timing.MAX_ROUNDS


def test_rounds_are_interleaved_and_each_contender_follows_each():
    device = Counter()
    works = {name: [device.work(name)] * 2 for name in ("a", "b", "c")}
    time_all(works, 10**6, device)
    rounds = device.called[3 * 2 * 2 + 3 * 3 * 2 :: 2]
    assert rounds[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_what_waits_for_the_device_is_timed_by_events_and_says_so():
    device = Counter(waits="loop")
    works = {name: [device.work(name)] * 4 for name in ("ours", "loop")}
    timings = time_all(works, 1000, device)
    assert timings["ours"].how == "graph" and timings["loop"].how == "events: it waits"
    assert len(timings["loop"].times) == len(timings["ours"].times)


def test_too_few_copies_are_refused_before_anything_runs():
    device = Counter()
    with pytest.raises(ValueError, match="works must have 4 copies of each contender, past the L2 cache; dense has fewer"):
        time_all({"ours": [device.work("ours")] * 4, "dense": [device.work("dense")] * 3}, 1000, device)
    assert device.called == []


def test_results_of_the_copies_lie_apart_while_they_are_timed():
    """Else the same memory is written again and again, which the cache holds."""
    seen = []

    def work():
        result = torch.empty(1000)
        seen.append(result.data_ptr())
        return (result,)

    time_all({"ours": [work, work, work]}, 10**9, Cpu())
    turns = zip(seen[::3], seen[1::3], seen[2::3])
    assert all(len(set(pointers)) == 3 for pointers in turns)


def test_another_error_of_the_work_is_raised():
    def work():
        raise RuntimeError("wrong shape")

    with pytest.raises(RuntimeError, match="wrong shape"):
        time_all({"ours": [work, work]}, 10**9, Cpu())


@needs_gpu
def test_on_a_gpu_a_graph_is_replayed_and_what_waits_is_found():
    device = Gpu()
    assert device.l2_bytes > 0 and device.name == torch.cuda.get_device_name()
    xs = [torch.ones(1 << 20, device="cuda") for _ in range(copies(1 << 23, device))]
    works = {"copy": [x.clone for x in xs], "waits": [lambda x=x: x[0].item() for x in xs]}
    with device.running():
        timings = time_all(works, 1 << 23, device)
    assert timings["copy"].how == "graph" and all(time > 0 for time in timings["copy"].times)
    assert timings["waits"].how.startswith("events: ")
    assert torch.cuda.get_sync_debug_mode() == 0


@needs_gpu
def test_a_captured_step_steps_at_every_replay():
    device = Gpu()
    x = torch.zeros(1, device="cuda")
    with device.running():
        run = device.capture(lambda: x.add_(1))
        before = x.item()
        assert device.nanoseconds(run) > 0 and device.nanoseconds(run) > 0
    torch.cuda.synchronize()
    assert x.item() == before + 2
