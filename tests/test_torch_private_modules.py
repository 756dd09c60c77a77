"""torch's private symbols in its modules, states and hooks: each one that metamask_ext uses does what is needed of it."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys

import pytest
import torch
from support.pins import pins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode


@pins(
    "torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX",
    "the settings of a masked layer in a state dict are warned of, and refused, by it",
)
def test_extra_state_key_suffix():
    class Layer(torch.nn.Module):
        def get_extra_state(self):
            return torch.ones(1)

    assert list(Layer().state_dict()) == [torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX]


@pins("torch.nn.Module.load_state_dict.strict", "a state without a task of the model is refused if the load is strict")
def test_load_state_dict_has_a_local_variable_strict():
    from metamask_ext.torch_private import loads_strictly

    seen = []

    class Layer(torch.nn.Module):
        def _load_from_state_dict(self, *arguments):
            seen.append(loads_strictly(sys._getframe()))

    for strict in (True, False):
        torch.nn.Sequential(Layer()).load_state_dict({}, strict=strict)
    assert seen == [True, False]
    assert loads_strictly(sys._getframe())


@pins("torch.distributed.checkpoint.state_dict._EXTRA_STATE", "it stands in states for extra state that they lack")
def test_extra_state_placeholder():
    from torch.distributed.checkpoint import state_dict

    from metamask_ext.torch_private import is_no_extra_state

    assert is_no_extra_state(state_dict._EXTRA_STATE()) and not is_no_extra_state(torch.ones(4))


@pins("torch._dynamo.eval_frame.OptimizedModule._orig_mod", "names of layers have no prefix of torch.compile's")
@pins("torch.distributed.fsdp.FullyShardedDataParallel._fsdp_wrapped_module", "names of layers have no prefix of a wrapper")
@pins("ActivationWrapper._checkpoint_wrapped_module", "names of layers have no prefix of a wrapper")
def test_wrapped_attributes():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, checkpoint_wrapper, offload_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    from metamask_ext.torch_private import _WRAPPED, wrapped_attribute

    def layer():
        return torch.nn.Linear(2, 2)

    made = [
        torch.compile(layer()),
        DataParallel(layer()),
        AveragedModel(layer()),
        checkpoint_wrapper(layer()),
        offload_wrapper(layer()),
    ]
    for wrapper in made:
        assert isinstance(getattr(wrapper, wrapped_attribute(wrapper)), torch.nn.Linear)
        assert [name for name, _ in wrapper.named_children()] == [wrapped_attribute(wrapper)]
    fsdp = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    assert wrapped_attribute(fsdp) == torch.distributed.fsdp.fully_sharded_data_parallel.FSDP_WRAPPED_MODULE
    known = {type(made[0]), DataParallel, AveragedModel, ActivationWrapper, DistributedDataParallel, FullyShardedDataParallel}
    assert {f"{kind.__module__}.{kind.__qualname__}" for kind in known} == _WRAPPED.keys()
    assert wrapped_attribute(layer()) is None


REBUILDS = "merge bakes in what a hook computes of these, and leaves them behind"


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pins("torch.nn.Module._forward_pre_hooks", REBUILDS)
@pins("torch.nn.utils.prune.BasePruningMethod._tensor_name", REBUILDS)
@pins("torch.nn.utils.prune._orig", REBUILDS)
@pins("torch.nn.utils.prune._mask", REBUILDS)
@pins("torch.nn.utils.weight_norm._g", REBUILDS)
@pins("torch.nn.utils.weight_norm._v", REBUILDS)
@pins("torch.nn.utils.spectral_norm._u", REBUILDS)
def test_hooks_that_rebuild_a_tensor():
    from torch.nn.utils import prune, spectral_norm, weight_norm

    from metamask_ext.torch_private import is_of_parametrization, rebuilding_hook

    def pruned(layer):
        return prune.l1_unstructured(layer, "weight", 0.5)

    for tool in (pruned, weight_norm, spectral_norm):
        layer = tool(torch.nn.Linear(4, 3)).eval()
        layer(torch.ones(1, 4))
        hook = rebuilding_hook(layer, "weight")
        assert torch.equal(hook.compute(), layer.weight) and rebuilding_hook(layer, "bias") is None
        added = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]} - {"bias"}
        assert set(hook.sources) == added
        kept = [*layer._forward_pre_hooks.values(), *layer._state_dict_hooks.values(), *layer._load_state_dict_pre_hooks.values()]
        assert kept and all(hook.made(each) for each in kept)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    assert all(is_of_parametrization(hook) for hook in layer._load_state_dict_pre_hooks.values())


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pins("torch.nn.utils.prune.BasePruningMethod.apply", "weights that depend on the task are not taken for parameters")
def test_tools_that_reparametrise():
    from torch.nn.utils import parametrize, prune, weight_norm

    from metamask_ext.torch_private import reparametrises, synchronises

    seen = []

    class Layer(torch.nn.BatchNorm1d):
        def __getattr__(self, name):
            if name == "weight":
                seen.append((reparametrises(sys._getframe(1)), synchronises(sys._getframe(1))))
            return super().__getattr__(name)

    for tool in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrize.register_parametrization(layer, "weight", torch.nn.Identity()),
        lambda layer: weight_norm(layer, dim=0),
    ):
        seen.clear()
        with contextlib.suppress(IndexError):  # a norm of a vector
            tool(Layer(4))
        assert (True, False) in seen
    seen.clear()
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(Layer(4))
    assert (False, True) in seen


@pins("torch.Tensor._make_wrapper_subclass", "a weight of which there are several has a shape and no values")
def test_make_wrapper_subclass():
    from metamask_ext.torch_private import tensor_without_memory

    class Refusing(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise RuntimeError("refused")

    made = tensor_without_memory(Refusing, torch.ones(2, 3, dtype=torch.float64).t())
    assert (made.shape, made.stride(), made.dtype) == ((3, 2), (1, 3), torch.float64)
    with pytest.raises(RuntimeError, match="refused"):
        torch.tensor(made)


@pins("torch.UntypedStorage._cdata", "an update in place is refused where two of its arguments lie in one storage")
def test_storage_cdata():
    from metamask_ext.torch_private import is_one_storage

    for device in ("cpu", "meta"):
        tensor = torch.empty(4, device=device)
        assert is_one_storage(tensor, tensor[1:]) and is_one_storage(tensor.detach(), tensor.view(2, 2))
        assert not is_one_storage(tensor, torch.empty(4, device=device))


@pins("torch._subclasses.fake_tensor", "no check looks at the numbers of fake tensors, which have none")
def test_fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from metamask_ext.torch_private import is_fake

    with FakeTensorMode():
        assert is_fake(torch.ones(2))
    assert not is_fake(torch.ones(2)) and not is_fake(torch.ones(2, device="meta"))


@pins("torch._C._len_torch_dispatch_stack", "it is not 0 while export, make_fx or a fake mode runs the model")
def test_len_torch_dispatch_stack():
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(torch._C._len_torch_dispatch_stack())
            return x + 1

    assert torch._C._len_torch_dispatch_stack() == 0
    with FakeTensorMode():
        Noting()(torch.ones(2))
    make_fx(Noting())(torch.ones(2))
    torch.export.export(Noting(), (torch.ones(2),), strict=False)
    with FlopCounterMode(display=False):
        Noting()(torch.ones(2))
    assert len(seen) >= 4 and all(seen)
    assert torch._C._len_torch_dispatch_stack() == 0


@pins("torch.nn.Module._call_impl", "it is what a compiled call runs")
def test_call_impl():
    module = torch.nn.Linear(2, 1)
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.ones(1, 2)
    assert torch.equal(module._call_impl(x), module.forward(x) + 1)


@pins("torch.nn.Module._compiled_call_impl", "it runs when a compiled module is called, and is not copied")
def test_compiled_call_impl():
    module = torch.nn.Linear(2, 1)
    module._compiled_call_impl = lambda x: "compiled"
    assert module(torch.ones(1, 2)) == "compiled"
    assert copy.deepcopy(module)._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(module))._compiled_call_impl is None


@pins("torch._dynamo.exc.Unsupported", "it tells Dynamo's refusal to trace from other errors")
def test_unsupported():
    from torch._dynamo.exc import Unsupported

    def refuse(x):
        raise ValueError("of the traced code")

    try:
        torch.compile(refuse, backend="eager", fullgraph=True)(torch.ones(1))
    except Unsupported:
        return
    raise AssertionError("an error of the traced code came as another one")
