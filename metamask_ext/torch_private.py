"""Every private symbol of torch that metamask_ext uses, each with its reason and what breaks without it.

tests/test_torch_private.py pins each one: a torch upgrade that changes a symbol fails there, with its name. What a subclass of
``torch.nn.Module`` or ``torch.optim.Optimizer`` overrides or reads of its base (``_parameters``, ``_apply``,
``_load_from_state_dict``) is not listed: torch documents it for subclasses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType, FunctionType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._compile import _disable_dynamo
from torch._functorch.predispatch import lazy_load_decompositions
from torch.amp.grad_scaler import GradScaler
from torch.autograd import Function, forward_ad
from torch.fx import Proxy, Tracer, _symbolic_trace
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim import optimizer as _optimizer
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

R = TypeVar("R")

disable_dynamo = _disable_dynamo
"""``torch.compiler.disable`` without importing Dynamo, which takes seconds and is not needed by who never compiles."""


def uncompiled_call(module: torch.nn.Module) -> Callable[..., Any]:
    """The call of the module where it is not compiled, hooks included."""
    call: Callable[..., Any] = module._call_impl
    return call


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any]) -> None:
    """Let ``call`` run when the module is called, as ``Module.compile`` does; copies and pickles go without it."""
    module._compiled_call_impl = call


def is_untraceable(error: Exception) -> bool:
    """True for Dynamo's refusal of what it cannot put into one graph, an error that the traced code raises too."""
    errors = sys.modules.get("torch._dynamo.exc")
    return errors is not None and isinstance(error, errors.Unsupported)


current_graph_task = torch._C._current_graph_task_id
"""The id of the backward that runs in this thread, -1 outside. Without it a recomputation could not be told from a forward."""

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
"""True if autocast is on for any device: one call in place of four, where a small layer takes microseconds."""

_functorch_level = _functorch.maybe_current_level


without_torch_function = torch._C.DisableTorchFunctionSubclass
"""A context in which tensor subclasses are plain tensors, as their ``__torch_function__`` needs it to call the function itself."""


T = TypeVar("T", bound=Tensor)


def tensor_without_memory(kind: type[T], like: Tensor) -> T:
    """A tensor of a subclass that has the shape, strides, dtype and device of ``like``, and no values.

    Without it, torch's functions that ask no subclass would read values that are of no task.
    """
    make: Callable[..., T] = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]  # no stub
    return make(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad)


def in_transform() -> bool:
    """True if a torch.func transform or a forward-mode AD level is active.

    A Function of the form ``forward(ctx, ...)`` fails inside the first and has no jvp for the second: plain torch must run.
    """
    return _functorch_level() is not None or forward_ad._current_level >= 0


is_made_of_tensors = is_traceable_wrapper_subclass
"""True for a tensor of a subclass that is made of other tensors, as DTensor: torch compiles the ops on those. A raw op has no rule
for the subclass."""

in_dispatch_mode = torch._C._len_torch_dispatch_stack
"""The number of ``TorchDispatchMode`` that are active. The tensors of export, make_fx and FakeTensorMode can be of no subclass of
ours: without it none of the three would run a layer that gives such."""


def bare_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without its handling of torch.func, where that is not active: 10 % less time on small layers."""
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]  # mypy wants an instance, not the class
    return apply


def set_node_default(function: type[Function], name: str, value: object) -> None:
    """Give every autograd node of ``function`` an attribute.

    It is set on the class of the nodes: set in every forward, it would cost a small layer time.
    """
    setattr(function._backward_cls, name, value)


def function_of(node: object) -> type[Function] | None:
    """The Function whose node this is; None for any other node of a graph."""
    return getattr(type(node), "_forward_cls", None)


fx_trace = _symbolic_trace
"""The module of torch.fx's tracer. Every forward reads its ``_is_fx_tracing_flag``, True while a trace runs: a call would take ten
times as long."""


def symbolic_tracer() -> Tracer | None:
    """The tracer of the symbolic trace that runs this code; None without one, and inside make_fx, which runs it on tensors.

    Only the frame of its ``trace`` knows the tracer. Dynamo, once it is imported, has a frame of its own around that.
    """
    if not fx_trace.is_fx_symbolic_tracing():
        return None
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code.co_name == "trace" and isinstance(frame.f_locals.get("self"), Tracer)):
        frame = frame.f_back
    tracer: Tracer | None = None if frame is None else frame.f_locals["self"]
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return None if proxies is not None and isinstance(tracer, proxies.PythonKeyTracer) else tracer


def traced_call(module: torch.nn.Module, *inputs: Any, **options: Any) -> Tensor | None:
    """A call of ``module`` in the graph of torch.fx that is being traced, as one of torch's own layers has; None without a trace.

    The tracer looks at the package of a module's class to tell layers from what it traces into.
    """
    tracer = symbolic_tracer()
    return (
        None if tracer is None else _as_tensor(tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, options))
    )


def traced_attribute(module: torch.nn.Module, name: str) -> Tensor | None:
    """A read of an attribute in the graph of torch.fx that is being traced, done anew in every run; None without a trace."""
    tracer = symbolic_tracer()
    if tracer is None:
        return None
    owner = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return _as_tensor(tracer.create_proxy("call_function", getattr, (owner, name), {}))


def traced_function(function: Callable[..., object], arguments: dict[str, Any]) -> Tensor | None:
    """A call of ``function`` in the graph of torch.fx that is being traced; None where no argument is a part of one."""
    proxy = next((value for value in tree_leaves(arguments) if isinstance(value, Proxy)), None)
    return None if proxy is None else _as_tensor(proxy.tracer.create_proxy("call_function", function, (), dict(arguments)))


def _as_tensor(proxy: Proxy) -> Tensor:
    """A proxy, by the type of what it stands for."""
    return cast(Tensor, proxy)


BatchNorm = _BatchNorm
"""The base of torch's batch norms. Without it each of them, and each subclass of a user, would have to be listed."""

InstanceNorm = _InstanceNorm
"""The base of torch's instance norms, as :data:`BatchNorm`."""

foreach_add_ = torch._foreach_add_
"""``add_`` of many tensors by one call, as torch's optimisers use it: one launch on a GPU, not one a task."""

foreach_copy_ = torch._foreach_copy_
"""``copy_`` of many tensors by one call."""

PyTree = _pytree.PyTree
"""A tensor, or tensors in tuples, lists and dicts: the trees that torch.vmap takes. torch has no public functions for them."""

tree_flatten = _pytree.tree_flatten
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_unflatten = _pytree.tree_unflatten


def is_batched(*tensors: Tensor | None) -> bool:
    """True if a vmap runs over one of them: torch.func's, or that of autograd's ``is_grads_batched``."""
    return any(
        tensor is not None and (_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))
        for tensor in tensors
    )


def is_legacy_batched(*tensors: Tensor | None) -> bool:
    """True if autograd runs this backward for a batch of gradients at once (``is_grads_batched``): only plain torch can."""
    return any(tensor is not None and _functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def concrete(tensor: Tensor) -> Tensor | None:
    """The tensor below the wrappers of ``torch.func.grad``, whose values can be read; None where a vmap hides them."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    if _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
        return None
    return tensor


def vmap(function: Callable[..., R], arguments: list[Tensor]) -> R | Tensor:
    """``torch.vmap(function, randomness="different")(*arguments)`` without the 28 microseconds of its wrapper.

    A result that is no tensor comes back as it is.
    """
    size = len(arguments[0])
    level = _functorch._vmap_increment_nesting(size, "different")
    try:
        result = function(*(_functorch._add_batch_dim(argument, 0, level) for argument in arguments))
        return _functorch._remove_batch_dim(result, level, size, 0) if isinstance(result, Tensor) else result
    finally:
        _functorch._vmap_decrement_nesting()


load_vmap_decompositions = lazy_load_decompositions
"""The step of ``torch.vmap`` before its first call, once a process: ops without a batching rule are then decomposed."""


def has_gradient_hooks(tensor: Tensor) -> bool:
    """True if a hook waits for the gradient of this leaf: an update inside the backward would pass it by."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def has_global_step_hooks() -> bool:
    """True if a hook watches the steps of all optimisers: only a call of ``step`` tells it of one."""
    return bool(_optimizer._global_optimizer_pre_hooks or _optimizer._global_optimizer_post_hooks)


class CheckpointFrame(Protocol):
    """torch.utils.checkpoint's record of a region that is being run."""

    recompute_fn: Callable[..., object]
    """The function that the backward will call."""


_autograd = torch._C._autograd
_top_saved_tensors_hooks = _autograd._top_saved_tensors_default_hooks


def enclosing_checkpoints() -> list[CheckpointFrame]:
    """The frames of the non-reentrant activation checkpoints around this forward, innermost first.

    torch shows only the top of its stack of hooks: they are taken off one by one and put back. Where torch's record is not found, a
    recomputation has no context and is refused.
    """
    if not _top_saved_tensors_hooks(True) or not _autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # no stub
        return []
    taken = []
    try:
        while hooks := _top_saved_tensors_hooks(True):
            _autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
    finally:
        for hooks in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(*hooks)
    frames = (_checkpoint_frame(pack_hook) for pack_hook, _ in taken)
    return [frame for frame in frames if frame is not None]


def saving_hook() -> object:
    """The innermost hook on tensors that are saved for the backward; None without one. A checkpoint has one of its own."""
    hooks = _top_saved_tensors_hooks(True)
    return hooks[0] if hooks else None


def _checkpoint_frame(pack_hook: object) -> CheckpointFrame | None:
    """torch.utils.checkpoint's record, found through its pack hook; None for any other hook."""
    if isinstance(pack_hook, FunctionType) and pack_hook.__closure__:
        for name, cell in zip(pack_hook.__code__.co_freevars, pack_hook.__closure__):
            if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
                frame: CheckpointFrame = cell.cell_contents
                return frame
    return None


def is_fsdp_managed(module: torch.nn.Module) -> bool:
    """True if fully_shard, or FullyShardedDataParallel, holds the parameters of this module.

    Both mark every module below them for Dynamo. A module does not know otherwise: its parameters are DTensors or plain tensors by
    turns. ``FSDPModule`` marks only the module that fully_shard was called on.
    """
    return bool(module.__dict__.get("_is_fsdp_managed_module", False)) or is_fsdp_root(module)


def is_fsdp_root(module: torch.nn.Module) -> bool:
    """True if fully_shard was called on this module. torch.distributed.fsdp, slow to import, is not imported for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_fake(tensor: Tensor) -> bool:
    """True if a tensor has a shape and no values, as under FakeTensorMode, which is slow to import and not imported for it."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(tensor, fake.FakeTensor)


def saved_factor(product: Any) -> Tensor | None:
    """The second factor that a node of a product saved: the one way to see a loss scale. None if there is none any more."""
    try:
        factor = product._saved_other
    except RuntimeError:  # freed by an earlier backward
        return None
    return factor if isinstance(factor, Tensor) else None


def has_unpack_hook(product: Any) -> bool:
    """True if that factor lies behind a hook on saved tensors, which reading it would call."""
    return product._raw_saved_other.unpack_hook is not None


def members_of_caller(frame: FrameType | None, *walk: str) -> Callable[[torch.nn.Module], Iterable[tuple[str, object]]] | None:
    """The function by which torch reads a module's parameters, or buffers, in the walk that ``frame`` serves; None: another walk.

    ``walk`` names the functions between ``frame`` and torch's. ``Module.named_parameters`` and ``named_buffers`` share
    ``_named_members``. Without it, no pairs are checked.
    """
    while frame is not None and frame.f_code is not torch.nn.Module._named_members.__code__:
        if frame.f_code.co_name not in walk:
            return None
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("get_members_fn")


def is_one_storage(a: Tensor, b: Tensor) -> bool:
    """True if two tensors lie in one storage, where there is no memory whose addresses would tell (fake and meta tensors) too."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def loss_scale_of(scaler: GradScaler) -> Tensor | None:
    """The tensor by which the scaler multiplies a loss; None before the first one."""
    scale: Tensor | None = scaler._scale
    return scale


EXTRA_STATE = _EXTRA_STATE_KEY_SUFFIX
"""The name of a module's extra state in a state dict."""


def is_no_extra_state(value: object) -> bool:
    """True for what torch.distributed.checkpoint puts in the place of extra state that the given state lacks."""
    return f"{type(value).__module__}.{type(value).__qualname__}" == "torch.distributed.checkpoint.state_dict._EXTRA_STATE"


def loads_strictly(frame: FrameType | None) -> bool:
    """The ``strict`` of the ``load_state_dict`` around ``frame``, which modules are not told; True outside one."""
    while frame is not None and frame.f_code is not torch.nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return True if frame is None else bool(frame.f_locals["strict"])


_WRAPPED = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}


def wrapped_attribute(module: torch.nn.Module) -> str | None:
    """The attribute in which one of torch's wrappers holds the module that it wraps; None for any other module.

    By the names of its classes: importing the wrappers takes seconds, and two of them are private.
    """
    return next(filter(None, (_WRAPPED.get(f"{base.__module__}.{base.__qualname__}") for base in type(module).__mro__)), None)


class RebuildingHook(NamedTuple):
    """One of torch's hooks that compute a tensor of a module before each forward."""

    hook: object
    compute: Callable[[], Tensor]
    """Gives the tensor of now; nothing changes."""
    sources: tuple[str, ...]
    """The names of the parameters and buffers that it is computed of."""

    def made(self, hook: object) -> bool:
        """True for the hook, and for those that torch registered for its state dict with it."""
        hook = getattr(hook, "hook", hook)
        return hook is self.hook or getattr(hook, "fn", None) is self.hook


def is_of_parametrization(hook: object) -> bool:
    """True for the hook that lets a module with ``parametrizations.weight_norm`` load states of the old one."""
    return getattr(getattr(hook, "hook", hook), "__module__", "") == "torch.nn.utils.parametrizations"


def rebuilding_hook(module: torch.nn.Module, name: str) -> RebuildingHook | None:
    """The hook by which torch.nn.utils.prune, weight_norm or spectral_norm computes the tensor ``name``; None if there is none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return RebuildingHook(hook, partial(hook.apply_mask, module), (f"{name}_orig", f"{name}_mask"))
        if isinstance(hook, WeightNorm) and hook.name == name:
            return RebuildingHook(hook, partial(hook.compute_weight, module), (f"{name}_g", f"{name}_v"))
        if isinstance(hook, SpectralNorm) and hook.name == name:
            compute = partial(hook.compute_weight, module, do_power_iteration=False)
            return RebuildingHook(hook, compute, (f"{name}_orig", f"{name}_u", f"{name}_v"))
    return None


_REPARAMETRISE = frozenset(
    inspect.unwrap(function).__code__  # some are deprecated, by a decorator
    for function in (BasePruningMethod.apply, WeightNorm.apply, register_parametrization)
)
_SYNCHRONISE = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__code__


def reparametrises(frame: FrameType) -> bool:
    """True if the frame is that of a tool which puts other parameters in the place of the one that it reads."""
    return frame.f_code in _REPARAMETRISE


def synchronises(frame: FrameType) -> bool:
    """True if the frame is that of ``SyncBatchNorm.convert_sync_batchnorm``."""
    return frame.f_code is _SYNCHRONISE
