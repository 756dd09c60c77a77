"""Every raw op against its own float64 result on the CPU, for stages S1, S5 and S6."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from support.strides import RAW, Make, Sizes, laid_out, offset
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .device import Card

OPS = [name for name in RAW if name not in ("im2col", "col2im")]
"""Names of the ops. The CPU has the only im2col."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNITS = 2
"""One element may be off by so many units in the last place of the largest result, times the root of the number of additions."""

TF32_UNIT = 2.0**-11


class Rounded(Make):
    """The numbers of a :class:`Make` of ``dtype`` on the CPU, in float64."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(sizes, torch.float64)
        self._rounded = dtype

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return super().random(*shape).to(self._rounded).double()


def call(device: Card, name: str, sizes: Sizes, dtype: torch.dtype, moved: bool = False) -> list[Tensor]:
    """Calls an op; ``moved``: all its arguments begin one element after an aligned address."""
    with device.on():
        run, arguments = RAW[name](Make(sizes, dtype, device=device.kind))
        results = run(**(laid_out(arguments, offset) if moved else arguments))
        device.wait()
    return _tensors(results)


def exact(name: str, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """The same in float64, by the kernels for the CPU, which the tests hold against the specification."""
    run, arguments = RAW[name](Rounded(sizes, dtype))
    return _tensors(run(**arguments))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def share_of_tolerance(name: str, sizes: Sizes, got: list[Tensor], wanted: list[Tensor], unit: float | None = None) -> float:
    """Returns the largest error over what is allowed; more than 1 is wrong."""
    assert len(got) == len(wanted), f"{len(got)} results, expected {len(wanted)}"
    terms = max(sizes.inputs, sizes.outputs, sizes.batch * sizes.rows)
    if name.startswith("packed_superposition_gradient"):
        terms = sizes.inputs * sizes.outputs
    if "bfloat16" in name:
        unit = UNITS * torch.finfo(torch.bfloat16).eps
    return max(_share(one, other, terms, unit) for one, other in zip(got, wanted))


def _share(got: Tensor, wanted: Tensor, terms: int, unit: float | None) -> float:
    assert got.shape == wanted.shape, f"shape {list(got.shape)}, expected {list(wanted.shape)}"
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.cpu(), wanted) else float("inf")
    allowed = (unit or UNITS * torch.finfo(got.dtype).eps) * terms**0.5 * wanted.abs().max().item() + 1e-30
    share = ((got.detach().double().cpu() - wanted).abs().max() / allowed).item()
    return share if share == share else float("inf")  # a NaN is as wrong as can be


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch allocates is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
