"""Sums of packed masks, from their bits: for each weight the number of masks that have it.

Bits are added sixty-four at a time: a carry-save adder takes three words of one weight ``2**k`` to one of that weight and one of
twice that, until one word of each weight is left. Source: Warren, Hacker's Delight, 2nd edition, section 5-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..files.lock import ThreadLock
from ..ops.packed.functional import unpack_mask
from ..ops.streams import current_stream

_BLOCK = 1 << 22
"""Bytes of masks that are added together: about a core's second cache."""


def count_bits(masks: Tensor, like: Tensor) -> Tensor:
    """Return ``sum over t of bit_t``, float32, of the shape of ``like``: exact below 2**24 masks.

    Args:
        masks: packed masks ``[T, ...]``, at least one.
        like: has the shape of what they mask.
    """
    total = torch.zeros(like.shape, device=masks.device)
    for start, planes in _planes(masks):
        # Eight digits fit a byte: fewer operations on floats.
        byte = torch.zeros(like.shape, dtype=torch.uint8, device=masks.device)
        for place, plane in enumerate(planes):
            byte |= unpack_mask(plane.view(masks.shape[1:]), like.shape).view(torch.uint8) << place
        total.add_(byte, alpha=2**start)
    return total


def _planes(masks: Tensor) -> list[tuple[int, list[Tensor]]]:
    """Return the digits of the sum: of the k-th one the bits that count ``2**k``; eight at a time, with the first one's k."""
    size = masks[0].numel()
    places = len(masks).bit_length()
    waiting: list[list[Tensor]] = [[] for _ in range(places)]  # by weight, words that are still to be added
    for block in masks.flatten(1).split(max(3, _BLOCK // max(1, size))):
        words = torch.nn.functional.pad(block, (0, -size % 8)) if size % 8 else block.contiguous()
        waiting[0].append(words.view(torch.int64))
        for place in range(places):
            if waiting[place]:
                carries = _add(waiting[place])
                if place + 1 < places:  # else they are zero
                    waiting[place + 1] += carries
    digits = [rows[0].view(torch.uint8)[0, :size] for rows in waiting if rows]
    return [(start, digits[start : start + 8]) for start in range(0, len(digits), 8)]


def _add(rows: list[Tensor]) -> list[Tensor]:
    """Leave one word of ``rows``, of one weight; return the words of twice that weight."""
    words = torch.cat(rows) if len(rows) > 1 else rows[0]
    carries = []
    while len(words) > 1:
        third = len(words) // 3
        if third:
            a, b, c, rest = words[:third], words[third : 2 * third], words[2 * third : 3 * third], words[3 * third :]
            either = a ^ b
            carries.append((a & b).bitwise_or_(either & c))
            either ^= c
            words = torch.cat([either, rest]) if len(rest) else either
        else:
            carries.append(words[:1] & words[1:])
            words = words[:1] ^ words[1:]
    rows[:] = [words]
    return carries


@dataclass(frozen=True)
class Summed:
    """Packed masks ``[T, ...]``, a copy of them, and their sum, float32, of the shape of what they mask."""

    bits: Tensor
    total: Tensor


class Sums:
    """Keeps sums of bits between inferences, each with the bits that it is of: it is used while those are the same, byte for byte.

    A sum is made aside and put in its place whole; several threads may share one object. A copy begins empty.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, Summed] = WeakKeyDictionary()
        self._lock = ThreadLock()

    def of(self, owner: nn.Module, masks: Sequence[Tensor], like: Tensor) -> Summed:
        """Return the sum of ``masks``, which belong to ``owner`` and mask ``like``. It must not be written to."""
        with self._lock.held():
            kept = self._kept.get(owner)
        if kept is None or not _holds(kept.bits, masks):
            bits = torch.stack([*masks])
            kept = Summed(bits, count_bits(bits, like))
            if (stream := current_stream(bits.device)) is not None:
                stream.synchronize()  # who uses it next may be on another one
            with self._lock.held():
                self._kept[owner] = kept
        return kept

    def __reduce__(self) -> tuple[type[Sums], tuple[()]]:
        return Sums, ()


def _holds(bits: Tensor, masks: Sequence[Tensor]) -> bool:
    """Compare ``bits`` with ``masks``, byte for byte."""
    first = masks[0]
    if len(bits) != len(masks) or bits.shape[1:] != first.shape or bits.device != first.device:
        return False
    rows = max(8, _BLOCK // max(1, first.numel()) // 8 * 8)  # so that every block begins at a word
    block = torch.empty_like(bits[:rows])  # one, reused: it stays in the cache
    for start in range(0, len(masks), rows):
        some = masks[start : start + rows]
        torch.stack([*some], out=block[: len(some)])
        if not _same_bytes(block[: len(some)], bits[start : start + rows]):
            return False
    return True


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    flat_a, flat_b = a.flatten(), b.flatten()
    whole = flat_a.numel() // 8 * 8  # words are compared faster than bytes
    words = (flat[:whole].view(torch.int64) for flat in (flat_a, flat_b))
    return torch.equal(*words) and torch.equal(flat_a[whole:], flat_b[whole:])
