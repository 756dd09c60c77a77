"""The measurement behind ``metamask tune``: from how many rows of a batch on BLAS multiplies faster than panels on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .ops.linear import raw
from .products import DTYPES, LARGEST, PANELS, Line, Pass, Table, using_table

SHAPES = ((64, 64), (256, 256), (768, 768), (768, 3072), (3072, 768), (1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096))
"""in and out of the weights that are measured; another weight goes by the nearest of them."""
BATCHES = tuple(1 << power for power in range(6, 15))
_MOST_OPERATIONS = 2.2e11
_ROUNDS = 7


def tune(threads: Sequence[int], dtypes: Sequence[str], report: Callable[[Line, float], None]) -> Table:
    """Measure every shape, type, pass and number of threads; the process must be alone on its processors.

    Args:
        threads: numbers of threads.
        dtypes: names in :data:`metamask_ext.products.DTYPES`.
        report: gets every line, and the time of BLAS over that of panels at its number of rows.
    """
    lines = []
    for count in threads:
        with _threads(count):
            for dtype in dtypes:
                for in_features, out_features in SHAPES:
                    for pass_ in ("forward", "backward"):
                        rows, ratio = _least_rows(pass_, DTYPES[dtype], in_features, out_features)
                        lines.append(Line(pass_, dtype, count, in_features, out_features, rows))
                        report(lines[-1], ratio)
    return Table("tune", tuple(lines))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _least_rows(pass_: Pass, dtype: torch.dtype, in_features: int, out_features: int) -> tuple[int, float]:
    """The least of BATCHES at which BLAS is faster, found by halving, and the ratio there; LARGEST if it never is."""
    batches = [batch for batch in BATCHES if 2 * batch * in_features * out_features <= _MOST_OPERATIONS]
    low, high, found = 0, len(batches), {len(batches): float("nan")}
    while low < high:
        middle = (low + high) // 2
        found[middle] = _ratio(pass_, dtype, batches[middle], in_features, out_features)
        if found[middle] < 1:
            high = middle
        else:
            low = middle + 1
    return (batches[low] if low < len(batches) else LARGEST), found[low]


def _ratio(pass_: Pass, dtype: torch.dtype, batch: int, in_features: int, out_features: int) -> float:
    """The median of the time of BLAS over that of panels, in pairs taken in turns."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, grad, weight = normal(batch, in_features), normal(batch, out_features), normal(out_features, in_features)
    mask_logits = torch.randn(out_features, in_features, generator=generator).to(torch.promote_types(dtype, torch.float32))

    def work() -> None:
        if pass_ == "forward":
            raw.masked_linear(x, weight, mask_logits, None, None, 0, 1.0)
        else:
            raw.masked_linear_backward(grad, x, weight, mask_logits, None, None, 0, 1.0, (True, True, True, False, False))

    name = {value: key for key, value in DTYPES.items()}[dtype]
    ways = (Table("BLAS", (Line(pass_, name, 1, in_features, out_features, 1),)), PANELS)
    calls, ratios = 1, []
    for turn in range(_ROUNDS + 1):
        seconds = []
        for way in ways if turn % 2 else ways[::-1]:
            with using_table(way):
                start = time.perf_counter()
                for _ in range(calls):
                    work()
                seconds.append(time.perf_counter() - start)
        if turn == 0:  # warms up, and says how many calls are long enough to time
            calls = max(1, int(0.01 / max(*seconds, 1e-6)))
            continue
        blas, panels = seconds if turn % 2 else seconds[::-1]
        ratios.append(blas / panels)
    return statistics.median(ratios)
