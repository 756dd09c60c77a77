"""The floors of the suite ``grid``: what a masked and a dense linear layer must take at the least, and the ratio of the two.

For a batch B and a weight of n = inputs * outputs elements, e bytes each, the bytes that must be moved are

=============  ===========================================  ================================================
measure        masked                                       dense
=============  ===========================================  ================================================
forward        e (2 n + B (inputs + outputs))               e (n + B (inputs + outputs))
backward       e (6 n + B (3 inputs + 2 outputs))           e (3 n + B (3 inputs + 2 outputs))
fused-step     e (6 n + B (3 inputs + 2 outputs))           e (6 n + B (3 inputs + 2 outputs))
=============  ===========================================  ================================================

The masked forward reads W and M. With its backward it reads both twice and writes dW and dM; the fused step writes W and M
instead. The dense backward reads W twice and writes dW; ``torch.optim.SGD`` then reads dW and W and writes W. Of the batch, x is
read in both passes, y written, dy read, and dx written.

The operations are 2 B n of a forward, and 6 B n with its backward, masked or dense: the gate is not counted.

The floor is the larger of bytes / bandwidth and operations / peak. The bandwidth is that of a copy of the weight, measured in the
same run, or of a larger weight's where that is faster (a small copy's time is that of the call); the peak is the fastest
dense product of the run. So neither floor includes what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .grid import COPY, DTYPES, MODES, measure_name, sizes_of
from .results_json import Results, Row

Key = tuple[str, str, str]
"""Measure, shape and allocator."""

_WEIGHTS = {"forward": (2, 1), "backward": (6, 3), "fused-step": (6, 6)}
"""Arrays of the weight's size that are moved: masked, dense."""


def operations(mode: str, batch: int, inputs: int, outputs: int) -> int:
    """Counts the multiplications and additions of the products."""
    return (2 if mode == "forward" else 6) * batch * inputs * outputs


def moved(mode: str, batch: int, inputs: int, outputs: int, element: int, masked: bool) -> int:
    """Counts the bytes that are moved at the least."""
    activations = inputs + outputs if mode == "forward" else 3 * inputs + 2 * outputs
    return element * (_WEIGHTS[mode][0 if masked else 1] * inputs * outputs + batch * activations)


def ratio(mode: str, sizes: tuple[int, int, int], element: int, bandwidth: float, peak: float) -> float:
    """Returns the floor of a masked layer as a multiple of a dense layer's.

    Args:
        sizes: batch, inputs and outputs.
        element: bytes of one number.
        bandwidth, peak: bytes and operations a second.
    """
    of_products = operations(mode, *sizes) / peak
    masked, dense = (max(of_products, moved(mode, *sizes, element, kind) / bandwidth) for kind in (True, False))
    return masked / dense


def ratios(results: Results) -> dict[Key, float]:
    """Returns the ratio of the floors at each point of a grid whose rates were measured."""
    found: dict[Key, float] = {}
    for dtype in DTYPES:
        modes = {measure_name(mode, dtype): mode for mode in MODES}
        rows = [row for row in results["rows"] if row["measure"] in modes and row["status"] == "measured"]
        copies = [row for row in results["rows"] if row["measure"] == measure_name("copy", dtype) and "quantities" in row]
        if not copies or not (peak := _peak(rows, modes)):
            continue
        bandwidth = _bandwidth(copies)
        for row in rows:
            batch, inputs, outputs = sizes_of(row["shape"])
            if rate := bandwidth(inputs * outputs):
                key = row["measure"], row["shape"], row["allocator"]
                found[key] = ratio(modes[row["measure"]], (batch, inputs, outputs), dtype.itemsize, rate, peak)
    return found


def _peak(rows: Iterable[Row], modes: dict[str, str]) -> float:
    """Returns the operations a second of the fastest dense product; 0 if there is none."""
    rates = [
        operations(modes[row["measure"]], *sizes_of(row["shape"])) / (row["contenders"]["dense"]["median"] / 1e9) for row in rows
    ]
    return max(rates, default=0.0)


def _bandwidth(copies: Iterable[Row]) -> Callable[[int], float]:
    """Returns the bytes a second by a weight's elements; 0 for one larger than all that were copied."""
    rates = []
    for row in copies:
        inputs, outputs = map(int, row["shape"].split("x"))
        rates.append((inputs * outputs, row["quantities"][COPY] * 1e9))
    return lambda elements: max((rate for size, rate in rates if size >= elements), default=0.0)
