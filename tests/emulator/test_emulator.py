"""The emulator itself: it catches kernels with a bug planted in them, and blames no correct one (planted.cu)."""

from __future__ import annotations

import re

import pytest
import torch
from support.emulator import BUILDS, FORWARD, RANDOM_WARPS, Emulator

pytestmark = pytest.mark.emulated

# Kernels and bugs, by their numbers in planted.h
TWICE, ROW_SUM, PRODUCT, PIPELINE, TF32_TILE, BFLOAT16_TILE, FLOAT16_TILE, LAST_BLOCK = range(8)
BUGS = (
    "none",
    "tail off by one",
    "misaligned",
    "uninitialised sum",
    "return before a shuffle",
    "wrong lane",
    "past a shared array",
    "divergent barrier",
    "no barrier before a read",
    "blocks write one word",
    "uninitialised accumulator",
    "column beyond the end",
    "no barrier before a write",
    "no wait for cp.async",
    "no barrier after the wait for cp.async",
    "no barrier in a pipeline",
    "ticket not atomic",
    "no barrier before a ticket",
    "no fence before a ticket",
    "no fence after a ticket",
    "no barrier after a ticket",
)
SCHEDULES = {"forward": FORWARD, "random warps": RANDOM_WARPS}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    return Emulator(request.param)


class DeviceArray:
    """A tensor's values in memory that the emulator guards; without values, memory that nothing has written."""

    def __init__(self, emulator, shape, values=None):
        self.emulator, self.shape = emulator, shape
        count = torch.Size(shape).numel()
        self.address = emulator.allocate(4 * count, values is not None)
        # Shares the memory
        self.values = torch.frombuffer((emulator.floats * count).from_address(self.address), dtype=torch.float32).view(shape)
        if values is not None:
            self.values.copy_(values)

    def __del__(self):
        self.emulator.release(self.address)


def reference(kernel, a, b):
    if kernel == TWICE:
        return 2 * a
    if kernel == ROW_SUM:
        return a.sum(1)
    if kernel in (PIPELINE, LAST_BLOCK):
        return a.sum(0)
    return a @ b


def run(emulator, kernel, m, n, k, bug="none", schedule=FORWARD, seed=1):
    """Returns what the emulator said (None: nothing), and the kernel's result beside the right one."""
    shapes = {TWICE: ((n,), (1,), (n,)), ROW_SUM: ((m, n), (1,), (m,)), PIPELINE: ((k, 128), (1,), (128,))}
    shapes[LAST_BLOCK] = (m, 128), (m + 1, 128), (128,)
    a_shape, b_shape, out_shape = shapes.get(kernel, ((m, k), (k, n), (m, n)))
    # Small integers: exact in every type, whatever the order of the sums
    a, b = (torch.randint(-8, 9, shape).float() for shape in (a_shape, b_shape))
    if kernel == LAST_BLOCK and bug != "none":
        b.zero_()  # the planted tickets count from 0, the correct one from any number
    arrays = [DeviceArray(emulator, out_shape), DeviceArray(emulator, a_shape, a), DeviceArray(emulator, b_shape, b)]
    emulator.set(schedule, seed)
    said = emulator.run_planted(BUGS.index(bug), kernel, *(array.address for array in arrays), m, n, k)
    return said and said.decode(), arrays[0].values.clone(), reference(kernel, a, b)


CORRECT = [
    *((TWICE, 1, n, 1) for n in (1, 3, 4, 5, 255, 1024, 4099)),
    *((ROW_SUM, m, n, 1) for m, n in ((1, 1), (3, 31), (5, 256), (2, 1000))),
    *((PRODUCT, m, n, k) for m, n, k in ((1, 1, 1), (16, 16, 16), (17, 15, 33), (33, 40, 7))),
    *((PIPELINE, 1, 1, k) for k in (1, 2, 3, 8)),
    *((LAST_BLOCK, m, 1, 1) for m in (1, 2, 9)),
    (TF32_TILE, 16, 8, 8),
    (BFLOAT16_TILE, 16, 8, 16),
    (FLOAT16_TILE, 16, 8, 16),
]


@each_schedule
@pytest.mark.parametrize("case", CORRECT, ids=str)
def test_a_correct_kernel_is_right_and_not_blamed(build, case, schedule):
    for seed in range(3):
        said, got, expected = run(build, *case, schedule=schedule, seed=seed)
        assert said is None
        assert torch.equal(got, expected)


# Of each bug: the kernel with a size at which it acts, and what the check build says; None: nothing, but the result is wrong
PLANTED = {
    "tail off by one": (TWICE, 1, 1023, 1, "out of bounds"),
    "misaligned": (TWICE, 1, 1024, 1, "misaligned"),
    "uninitialised sum": (ROW_SUM, 3, 100, 1, None),
    "return before a shuffle": (ROW_SUM, 1, 20, 1, r"names lanes that have returned|names it"),
    "wrong lane": (ROW_SUM, 3, 100, 1, None),
    "past a shared array": (ROW_SUM, 3, 100, 1, "beyond a shared array|beyond a local array|out of bounds"),
    "divergent barrier": (ROW_SUM, 3, 100, 1, "divergent barrier"),
    "no barrier before a read": (ROW_SUM, 3, 100, 1, "uninitialised value|race"),
    "blocks write one word": (ROW_SUM, 3, 100, 1, "race with a write by another block"),
    "uninitialised accumulator": (PRODUCT, 17, 15, 33, None),
    "column beyond the end": (PRODUCT, 17, 15, 32, "out of bounds"),
    "no barrier before a write": (PRODUCT, 16, 16, 32, "race with a (read|write)"),
    "no wait for cp.async": (PIPELINE, 1, 1, 3, "has not been waited for"),
    "no barrier after the wait for cp.async": (PIPELINE, 1, 1, 3, "uninitialised value|has not been waited for|race"),
    "no barrier in a pipeline": (PIPELINE, 1, 1, 3, "race with a read|has not been waited for"),
    "ticket not atomic": (LAST_BLOCK, 3, 1, 1, "race with a write by another block"),
    "no barrier before a ticket": (LAST_BLOCK, 3, 1, 1, "race with a write by another block"),
    "no fence before a ticket": (LAST_BLOCK, 3, 1, 1, "race with a write by another block"),
    "no fence after a ticket": (LAST_BLOCK, 3, 1, 1, "race with a write by another block"),
    "no barrier after a ticket": (LAST_BLOCK, 3, 1, 1, "uninitialised value|race"),
}


def test_every_bug_is_planted():
    assert tuple(PLANTED) == BUGS[1:] and len(PLANTED) == 20


@each_schedule
@pytest.mark.parametrize("bug", PLANTED)
def test_the_check_build_catches_every_planted_bug(emulator, bug, schedule):
    *case, wanted = PLANTED[bug]
    said, got, expected = run(emulator, *case, bug=bug, schedule=schedule)
    if wanted is None:
        assert said is None and not torch.equal(got, expected)
    else:
        assert said is not None, "not caught"
        assert re.search(wanted, said), said


def test_a_message_names_thread_block_and_kernel(emulator):
    said, *_ = run(emulator, TWICE, 1, 1023, 1, bug="tail off by one")
    assert re.search(r"thread 3,0,0 of block 0,0,0: out of bounds.*4092 bytes.*twice_kernel", said), said


def test_the_same_seed_gives_the_same_order(emulator):
    first, other = (
        run(emulator, PRODUCT, 40, 40, 40, bug="no barrier before a write", schedule=RANDOM_WARPS, seed=5) for _ in range(2)
    )
    assert first[0] == other[0]
