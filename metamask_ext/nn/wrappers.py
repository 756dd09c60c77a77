"""Finds what synchronises a model's parameters between processes: DistributedDataParallel, replicate, fully_shard.

Both fix their parameters when they are made. ``DistributedDataParallel`` says nothing to the model that it holds: a hook on the
registration of modules, which torch calls in its constructor, keeps a weak reference to each one that lives.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..torch_private import is_fsdp_managed, is_fsdp_root


class _Wrappers:
    """The wrappers that live, each with the parameters that it averages once they are known."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[DistributedDataParallel, frozenset[Tensor] | None] = WeakKeyDictionary()
        self._missed = distributed()

    def saw(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        # Dynamo cannot look at a module that is half made, as compiled autograd makes one; it makes no wrapper.
        if not torch.compiler.is_dynamo_compiling() and isinstance(module, DistributedDataParallel):
            self._known[module] = None

    def may_have_missed(self) -> None:
        """Search once more: a wrapper may have been copied or unpickled, or be older than this module."""
        self._missed = self._missed or distributed()

    def living(self) -> list[tuple[DistributedDataParallel, frozenset[Tensor]]]:
        """The wrappers, each with its parameters."""
        if self._missed:
            self._missed = False
            for found in [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]:
                self._known.setdefault(found, None)
        return [(wrapper, self._averaged_by(wrapper)) for wrapper in list(self._known.keys())] if self._known else []

    def _averaged_by(self, wrapper: DistributedDataParallel) -> frozenset[Tensor]:
        found = self._known.get(wrapper)
        if found is None:
            found = self._known[wrapper] = frozenset(wrapper.parameters())
        return found


def distributed() -> bool:
    """True if this process is one of several that torch.distributed joins, or could be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_WRAPPERS = _Wrappers()
register_module_module_registration_hook(_WRAPPERS.saw)
averagers = _WRAPPERS.living
may_have_missed = _WRAPPERS.may_have_missed


def averaged_parameters() -> list[frozenset[Tensor]]:
    """The parameters that each DistributedDataParallel averages."""
    return [averaged for _, averaged in averagers()]


def is_averaged(parameters: Iterable[Tensor]) -> bool:
    """True if a DistributedDataParallel that lives averages the gradient of one of these."""
    own = set(parameters)
    return any(not own.isdisjoint(averaged) for averaged in averaged_parameters())


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """True if fully_shard, or FullyShardedDataParallel, holds parameters of these modules."""
    return any(is_fsdp_managed(module) for module in modules)


def place_shards(model: nn.Module) -> None:
    """Put the sharded parameters of ``model`` back in their places, where a forward left the gathered ones.

    RuntimeError if there are others: FullyShardedDataParallel's, those of a fully_shard call on a module around ``model``.
    """
    for module in model.modules():
        if is_fsdp_root(module):
            reshard: Callable[[], None] = getattr(module, "reshard")  # noqa: B009  # torch.nn.Module declares every attribute a tensor
            reshard()
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and is_fsdp_managed(model.get_submodule(name.rpartition(".")[0])):
            raise RuntimeError(
                f"parameter {name!r} belongs to a sharded model and is not sharded itself: give the module that fully_shard was "
                "called on (FullyShardedDataParallel and ignored parameters are not supported)"
            )


def check_may_grow(modules: Iterable[nn.Module], what: str) -> None:
    """RuntimeError if masks that these modules got now would not be synchronised between processes."""
    modules = list(modules)
    check_not_sharded(modules, what)
    check_not_averaged(modules, what)


def check_not_averaged(modules: Iterable[nn.Module], what: str) -> None:
    """RuntimeError if a DistributedDataParallel that lives averages the gradients of parameters of these modules."""
    own = [parameter for module in modules for parameter in module.parameters()]
    if is_averaged(own):
        gc.collect()  # a wrapper that was let go of may wait for it
        if is_averaged(own):
            raise RuntimeError(
                f"{what} after the model was wrapped: a DistributedDataParallel averages the gradients of the parameters that it "
                "was made with, and the new masks would differ between processes. Add tasks first, and wrap then: "
                "model = wrapped.module, delete the wrapper, add_task(model, ...), "
                "DistributedDataParallel(model, find_unused_parameters=True)"
            )


def check_entry(holder: nn.Module, parameter: Tensor | None, what: str) -> None:
    """RuntimeError if a tensor of a task cannot be put beside the parameters of ``holder``; None: it is no parameter."""
    check_not_sharded([holder], what)
    if parameter is not None and any(
        parameter not in averaged and not averaged.isdisjoint(holder.parameters()) for averaged in averaged_parameters()
    ):
        check_may_grow([holder], what)


def check_not_sharded(modules: Iterable[nn.Module], what: str) -> None:
    """RuntimeError if fully_shard holds parameters of these modules."""
    if is_sharded(modules):
        raise RuntimeError(
            f"{what} after the model was sharded: fully_shard holds the parameters that it was called with. Remove, pack and "
            "load tasks first, and call fully_shard then (metamask_ext.add_task works afterwards, too)"
        )


def check_whole(modules: Iterable[nn.Module], what: str) -> None:
    """RuntimeError if this process has but shards of parameters of these modules."""
    modules = list(modules)
    check_not_sharded(modules, what)
    if any(hasattr(parameter, "device_mesh") for module in modules for parameter in module._parameters.values()):
        raise RuntimeError(
            f"{what} while parameters are DTensors, of which a process has a shard. Load the model's state into one that is not "
            "distributed first: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True))"
        )


def check_one_dtype(layer: nn.Module, weight: torch.dtype, masks: torch.dtype) -> None:
    """RuntimeError if fully_shard, which marks every module below it, trains parameters of several dtypes of ``layer``.

    torch itself fails an assertion then, in the first forward.
    """
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad and hasattr(parameter, "device_mesh")]
    if len({parameter.dtype for parameter in trained}) > 1:
        raise RuntimeError(
            f"fully_shard trains parameters of one dtype, and this {type(layer).__name__} has a weight of {weight} and masks of "
            f"{masks}. Build the model anew (parts of this one are sharded): in float32, with "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16) for the forward; or with frozen weights; or with "
            "mask_dtype=torch.bfloat16"
        )
