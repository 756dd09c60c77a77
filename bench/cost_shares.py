"""Splits the time of a masked layer into the shares of memory, gate and products.

The times are the suite cpu's. The rates are measured here, in this process, on the ops themselves: the gate and the products in
one thread and in cache, as the difference between two sizes divided by what the larger one has more (a call's own time
cancels); reading in two threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from metamask_ext.files.atomic import write_atomic
from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.weight import raw as weight_raw

from . import results_json
from .problem import METAMASK
from .report import between_marks
from .results_json import Results

ROUNDS = 300
SIGMOID = 0, 1.0


class Rates(NamedTuple):
    """``theta`` and ``gradients``: seconds a weight, one thread; ``flops``: operations a second, one thread; ``cache`` and
    ``memory``: bytes a second that two threads read from the third-level cache and from beyond it."""

    theta: float
    gradients: float
    flops: float
    cache: float
    memory: float


def _slopes(make: Callable[[int], Callable[[], object]], small: int, large: int) -> float:
    """Measures the seconds a unit between two sizes, by medians of interleaved calls."""
    calls = [make(small), make(large)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return (statistics.median(times[1]) - statistics.median(times[0])) / (large - small)


def measure() -> Rates:
    torch.manual_seed(0)
    wide = 512  # W, M and theta of the largest below fill half of a megabyte

    def theta(rows: int) -> Callable[[], object]:
        w, m = torch.randn(2, rows, wide)
        return lambda: weight_raw.masked_weight(w, m, *SIGMOID)

    def gradients(rows: int) -> Callable[[], object]:
        g, w, m = torch.randn(3, rows, wide)
        return lambda: weight_raw.masked_weight_backward(g, w, m, *SIGMOID, (True, True))

    def product(batch: int) -> Callable[[], object]:
        x, (w, m) = torch.randn(batch, wide), torch.randn(2, 64, wide)
        return lambda: linear_raw.masked_linear(x, w, m, None, None, *SIGMOID)

    def read(mebibytes: int) -> Callable[[], object]:
        x = torch.zeros(mebibytes << 18)
        return x.sum

    torch.set_num_threads(1)
    one = _slopes(theta, 16, 64) / wide, _slopes(gradients, 16, 48) / wide, 2 * 64 * wide / _slopes(product, 32, 160)
    torch.set_num_threads(2)
    return Rates(*one, 2**20 / _slopes(read, 8, 16), 2**20 / _slopes(read, 256, 512))


def cost_shares(
    rates: Rates, measure: str, batch: int, width: int, seconds: float, cache_bytes: int
) -> tuple[int, float, float, float]:
    """Returns the arrays of the weight's size that are moved, and the shares of memory, gate and products in ``seconds``."""
    weights = width * width
    forward = measure.endswith("forward")
    arrays = 2 if forward else 6
    # W, M and, backward, what is written. In training both passes read W and M.
    held = (2 if forward else 4) * 4 * weights
    bandwidth = rates.cache if held <= cache_bytes else rates.memory
    gate = rates.theta if forward else rates.theta + rates.gradients
    products = 1 if forward else 3
    return (
        arrays,
        arrays * 4 * weights / bandwidth / seconds,
        gate * weights / 2 / seconds,
        products * 2 * batch * weights / (2 * rates.flops) / seconds,
    )


def table(results: Results, rates: Rates, cache_bytes: int) -> str:
    head = ["measure", "batch x width", "arrays of the weight's size moved", "memory", "gate", "products", "the rest"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        name = row["measure"].removeprefix("masked_linear-")
        if row["allocator"] != "tuned" or row["status"] != "measured" or not row["measure"].startswith("masked_linear-"):
            continue
        batch, width = map(int, row["shape"].split("x"))
        if width < 1024:
            continue
        seconds = row["contenders"][METAMASK]["median"] / 1e9
        arrays, *shares = cost_shares(rates, row["measure"], batch, width, seconds, cache_bytes)
        cells = [f"{share:.0%}" for share in (*shares, 1 - shares[1] - shares[2])]
        text.append("| " + " | ".join([name, row["shape"], str(arrays), *cells]) + " |")
    text += [
        "",
        f"The rates: the gate {rates.theta * 1e9:.2f} ns a weight for theta and {rates.gradients * 1e9:.2f} ns for both gradients, "
        f"products {rates.flops / 1e9:.0f} GFLOP/s (one thread, in cache); two threads read {rates.cache / 1e9:.0f} GB/s from the "
        f"third-level cache and {rates.memory / 1e9:.0f} GB/s beyond it.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metamask_ext.bench.cost_shares", description=__doc__)
    parser.add_argument("results", type=Path, help="a results.json of the suite cpu, of this machine")
    parser.add_argument("--cache", type=int, default=32, metavar="MIB", help="the third-level cache of two cores")
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="Markdown file whose marked table, bench:cpu:cost-shares, is replaced"
    )
    given = parser.parse_args()
    text = table(results_json.read(given.results), measure(), given.cache << 20)
    print(text)
    if given.update:
        updated = between_marks(given.update.read_text(), "bench:cpu:cost-shares", text, given.update.name)
        write_atomic(given.update, updated.encode())


if __name__ == "__main__":
    main()
