"""Arguments that no caller should give: of a case that fits, one to three are spoiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.fuzz_cases import Arguments, Case, Make, fitting
from torch import Tensor

INTEGERS = (0, 1, 2, -1, 3, 5, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-300, 1e308, 2.0**-126, 2.0**-127, 1e-45)
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn),
)
HUGE = ([2**40, 0], [2, 2**40, 0], [0, 2**40], [0, 2**62], [0, 2**63 - 1], [2**24, 0, 3], [2**31, 0, 0], [2**40, 0, 0], [0, 0])
EXPANDED = ([2**20, 4], [4, 2**20], [2**31, 0], [1, 2**22])


def _shape(make: Make) -> list[int]:
    return [make.chance.choice((0, 1, 2, 3, 4, 5, 8, 16)) for _ in range(make.chance.choice((0, 1, 1, 2, 2, 2, 3, 4, 5)))]


def _plain(make: Make) -> Tensor:
    return torch.zeros(_shape(make), dtype=make.chance.choice(DTYPES))


def _overlapping(make: Make) -> Tensor:
    """Elements that share memory with each other."""
    return torch.zeros(64).as_strided(
        [make.chance.choice((1, 2, 3, 4)) for _ in range(2)], [make.chance.choice((0, 1, 2)) for _ in range(2)]
    )


KINDS: tuple[Callable[[Make], Tensor], ...] = (
    *(_plain, _plain, _plain, _overlapping),
    lambda make: torch.zeros(_shape(make), device="meta"),
    lambda make: torch.zeros([*_shape(make), 2]).to_sparse(),
    lambda make: torch.quantize_per_tensor(torch.zeros([1, *_shape(make)]), 0.1, 0, torch.quint8),
    lambda make: torch.zeros(_shape(make), requires_grad=True),
    lambda make: torch.full(_shape(make), make.chance.choice((-1, 2**40, -(2**63), 3))),
    lambda make: torch.zeros(make.chance.choice(HUGE), dtype=make.weight),
    lambda make: torch.zeros(make.chance.choice(HUGE), dtype=torch.uint8),
    lambda make: torch.zeros([1], dtype=make.weight).expand(make.chance.choice(EXPANDED)),
)


def _spoiled_tensor(make: Make, tensor: Tensor) -> object:
    if tensor.layout != torch.strided or tensor.is_quantized:  # has been spoiled
        return tensor
    ways: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: tensor.mT if tensor.dim() == 2 else tensor,
        lambda: tensor[..., :-1] if tensor.dim() else tensor,
        lambda: tensor.to(make.chance.choice(DTYPES[:6])),
        lambda: tensor[:1].expand(tensor.shape) if tensor.dim() else tensor,
        lambda: tensor[None],
        lambda: make.chance.choice(KINDS)(make),
        lambda: make.chance.choice(KINDS)(make),
    )
    return make.chance.choice(ways)()


def _spoiled_list(make: Make, values: list[object]) -> list[object]:
    if not values:
        return [make.chance.choice(KINDS)(make)]
    if isinstance(values[0], Tensor):
        ways: tuple[Callable[[], list[object]], ...] = (
            list,
            lambda: values[:-1],
            lambda: [*values, make.chance.choice(KINDS)(make)],
            lambda: [*values[:-1], _spoiled_tensor(make, values[0])],
            lambda: [values[0]] * len(values),
        )
        return make.chance.choice(ways)()
    place = make.chance.randrange(len(values))
    if make.is_so(0.2):
        return values[:place] + values[place + 1 :]
    return [*values[:place], spoiled(make, values[place]), *values[place + 1 :]]


def spoiled(make: Make, value: object) -> object:
    if isinstance(value, Tensor):
        return _spoiled_tensor(make, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return make.chance.choice(INTEGERS)
    if isinstance(value, float):
        return make.chance.choice(NUMBERS)
    if isinstance(value, list):
        return _spoiled_list(make, value)
    if value is None or isinstance(value, torch.dtype):
        return make.chance.choice((None, torch.float32, torch.int64, torch.bfloat16, make.chance.choice(KINDS)(make)))
    return value


def _shared(make: Make, case: Case) -> Case:
    """One tensor in the place of two, or two over the same memory with an element between their begins."""
    arguments: Arguments = list(case.arguments)
    places = [place for place, one in enumerate(arguments) if isinstance(one, Tensor) and one.numel() > 1]
    if len(places) < 2:
        return case
    first, second = make.chance.sample(places, 2)
    tensor = arguments[first]
    assert isinstance(tensor, Tensor)
    if make.is_so(0.5):
        arguments[second] = tensor
    else:
        memory = make.random([tensor.numel() + 1], tensor.dtype)
        arguments[first], arguments[second] = memory[1:].view(tensor.shape), memory[:-1].view(tensor.shape)
    return Case(case.op, arguments)


def nonsense(make: Make) -> Case:
    case = fitting(make)
    if make.is_so(0.1):
        return _shared(make, case)
    arguments: Arguments = list(case.arguments)
    for _ in range(make.chance.choice((1, 1, 1, 2, 3))):
        place = make.chance.randrange(len(arguments))
        arguments[place] = spoiled(make, arguments[place])
    return Case(case.op, arguments)
