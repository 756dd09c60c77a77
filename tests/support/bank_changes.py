"""Ways to change a tensor of a model, most of which torch's version counters do not show, and models to change."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch
from torch import Tensor, nn

from metamask_ext import MaskBank
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d


def net(gate: str = "hard") -> nn.Sequential:
    """A convolution, statistics per task and a layer of bits with padding in their last byte."""
    return nn.Sequential(
        MaskedConv2d(1, 3, 3, gate=gate), TaskBatchNorm2d(3), nn.ReLU(), nn.Flatten(), MaskedLinear(3 * 4 * 4, 5, gate=gate)
    )


INPUT = (1, 6, 6)


def new_bank(tasks: str = "abc", packed: str = "ab", gate: str = "hard") -> MaskBank:
    bank = MaskBank(net(gate).eval())
    for task in tasks:
        bank.add_task(task)
    bank.remove_task("default")
    for task in packed:
        bank.pack(task)
    return bank


def other(tensor: Tensor) -> Tensor:
    """A tensor with another value at every place, and no bit in a row's padding that was not there."""
    return tensor.flip(0) ^ 1 if tensor.dtype == torch.uint8 else tensor + 1


def _in_place(module: nn.Module, key: str, tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(other(tensor))


def _by_data(module: nn.Module, key: str, tensor: Tensor) -> None:
    tensor.data.copy_(other(tensor.detach()))


def _by_numpy(module: nn.Module, key: str, tensor: Tensor) -> None:
    tensor.detach().numpy()[...] = other(tensor.detach()).numpy()


def _one_element(module: nn.Module, key: str, tensor: Tensor) -> None:
    flat = tensor.detach().view(-1)
    flat[-1] = other(flat)[-1] if flat.dtype != torch.uint8 else flat[-1] ^ 1


def _by_storage(module: nn.Module, key: str, tensor: Tensor) -> None:
    again = torch.empty(0, dtype=tensor.dtype).set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    again.copy_(other(tensor.detach()))


def _in_a_thread(module: nn.Module, key: str, tensor: Tensor) -> None:
    thread = Thread(target=_by_data, args=(module, key, tensor))
    thread.start()
    thread.join()


def _loaded(module: nn.Module, key: str, tensor: Tensor, assign: bool = False) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state[key] = other(state[key])
    module.load_state_dict(state, assign=assign)


def _assigned(module: nn.Module, key: str, tensor: Tensor) -> None:
    _loaded(module, key, tensor, assign=True)


def _under_inference_mode(module: nn.Module, key: str, tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.copy_(other(tensor))


CHANGES: dict[str, Callable[[nn.Module, str, Tensor], None]] = {
    change.__name__.strip("_"): change
    for change in (
        *(_in_place, _by_data, _by_numpy, _one_element, _by_storage),
        *(_in_a_thread, _loaded, _assigned, _under_inference_mode),
    )
}
"""By name, functions of a model, the state_dict key of a tensor, and the tensor."""


def tensor_of(model: nn.Module, key: str) -> Tensor:
    """The tensor itself, fetched if it was still in a file."""
    return model.state_dict(keep_vars=True)[key]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_values(got: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
