"""Sums of packed masks, from their bits: for each weight the number of masks that have it.

Bits are added sixty-four at a time: a carry-save adder takes three words of one weight ``2**k`` to one of that weight and one of
twice that, until one word of each weight is left. Source: Warren, Hacker's Delight, 2nd edition, section 5-2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.packed.functional import unpack_mask

_BLOCK = 1 << 25
"""Bytes of masks that are copied together."""


def count_bits(masks: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum over t of bit_t``, of the shape of ``like``, exact up to 2**24 masks in float32.

    Args:
        masks: packed masks of one shape on one device, at least one.
        like: has the shape of what they mask.
        dtype: of the sum, float32 or float64.
    """
    total = torch.zeros(like.shape, dtype=dtype, device=masks[0].device)
    for place, plane in enumerate(_planes(masks)):
        total.add_(unpack_mask(plane.view(masks[0].shape), like.shape), alpha=2**place)
    return total


def _planes(masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the digits of the sum: of the k-th one the bits that count ``2**k``."""
    size = masks[0].numel()
    step = max(3, _BLOCK // max(1, size))
    waiting: list[list[Tensor]] = [[]]  # by weight, words that are still to be added
    for start in range(0, len(masks), step):
        block = torch.stack([mask.reshape(-1) for mask in masks[start : start + step]])
        words = torch.nn.functional.pad(block, (0, -size % 8)).view(torch.int64) if size % 8 else block.view(torch.int64)
        waiting[0].append(words)
        for place in range(len(waiting)):
            _add(waiting, place)
    place = 0
    while place < len(waiting):
        _add(waiting, place)
        place += 1
    return [rows[0].view(torch.uint8)[0, :size] for rows in waiting]


def _add(waiting: list[list[Tensor]], place: int) -> None:
    """Leave one word of the weight ``2**place``; the carries wait at the next."""
    words = torch.cat(waiting[place]) if len(waiting[place]) > 1 else waiting[place][0]
    carries = []
    while len(words) > 1:
        third = len(words) // 3
        if third:
            a, b, c, rest = words[:third], words[third : 2 * third], words[2 * third : 3 * third], words[3 * third :]
            either = a ^ b
            carries.append((a & b).bitwise_or_(either & c))
            words = torch.cat([either.bitwise_xor_(c), rest])
        else:
            carries.append(words[:1] & words[1:])
            words = words[:1] ^ words[1:]
    waiting[place] = [words]
    if carries:
        if place + 1 == len(waiting):
            waiting.append([])
        waiting[place + 1] += carries
