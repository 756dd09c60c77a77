"""torch's private symbols: each one that metamask_ext uses does what is needed of it, and none is used outside torch_private.py.

metamask_ext is imported in the tests only: where a symbol is gone, its import fails, and these tests still say which.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch
from support.paths import ROOT
from support.pins import pinned, pins
from torch.autograd import Function, forward_ad
from torch.utils.checkpoint import checkpoint


class Double(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def leaf() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


def functorch():
    return torch._C._functorch


@pins("torch._compile._disable_dynamo", "it keeps torch.compile out of a function without importing Dynamo")
def test_disable_dynamo():
    from torch._compile import _disable_dynamo

    function = _disable_dynamo(lambda x: x + 1)
    assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
    compiled = torch.compile(lambda x: function(x) if torch.compiler.is_compiling() else function(x) * 1, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


@pins("torch._C._current_graph_task_id", "it tells a recomputation inside a backward from a forward")
def test_current_graph_task_id():
    seen = []
    x = leaf()
    y = x * 2
    y.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    y.sum().backward()
    assert len(seen) == 1 and seen[0] >= 0
    assert torch._C._current_graph_task_id() == -1


@pins("torch.optim.optimizer._global_optimizer_pre_hooks", "a step that has nothing to do is left out where nobody watches it")
@pins("torch.optim.optimizer._global_optimizer_post_hooks", "a step that has nothing to do is left out where nobody watches it")
def test_global_step_hooks():
    from torch.optim import optimizer

    for register, hooks in (
        (optimizer.register_optimizer_step_pre_hook, optimizer._global_optimizer_pre_hooks),
        (optimizer.register_optimizer_step_post_hook, optimizer._global_optimizer_post_hooks),
    ):
        before = len(hooks)
        handle = register(lambda *_: None)
        assert len(hooks) == before + 1
        handle.remove()
        assert len(hooks) == before


@pins("torch._C._is_any_autocast_enabled", "one call finds whether autocast is on for any device")
def test_is_any_autocast_enabled():
    assert not torch._C._is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch._C._is_any_autocast_enabled()


@pins("torch.utils._python_dispatch.is_traceable_wrapper_subclass", "for tensors made of others no raw op has a rule")
def test_is_traceable_wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    x = torch.ones(2)
    assert not is_traceable_wrapper_subclass(x) and not is_traceable_wrapper_subclass(torch.nn.Parameter(x))
    assert is_traceable_wrapper_subclass(TwoTensor(x, x))


@pins("torch._C._functorch.maybe_current_level", "it is None outside of all torch.func transforms")
def test_maybe_current_level():
    seen = []

    def note(x):
        seen.append(functorch().maybe_current_level())
        return x.sum()

    note(torch.ones(2))
    torch.func.grad(note)(torch.ones(2))
    torch.func.vmap(note)(torch.ones(2, 2))
    assert seen[0] is None and seen[1] is not None and seen[2] is not None


@pins("torch.autograd.forward_ad._current_level", "it is negative outside of forward-mode AD")
def test_forward_ad_current_level():
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


@pins(
    "torch._C._FunctionBase.apply", "Function.apply without the handling of torch.func, which costs a small layer 10 % of its time"
)
def test_bare_apply():
    x = leaf()
    y = super(Function, Double).apply(x)
    assert y.grad_fn is not None and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


@pins("torch.autograd.Function._backward_cls", "an attribute set on the class of the nodes is a default for every node")
def test_backward_cls():
    Double._backward_cls.metamask_test_default = 7
    node = Double.apply(leaf()).grad_fn
    assert isinstance(node, Double._backward_cls) and node.metamask_test_default == 7
    node.metamask_test_default = 8
    assert Double.apply(leaf()).grad_fn.metamask_test_default == 7


@pins("torch.autograd.function.BackwardCFunction._forward_cls", "it leads from a node of a graph to its Function")
def test_forward_cls():
    assert type(Double.apply(leaf()).grad_fn)._forward_cls is Double
    assert getattr(type((leaf() * 2).grad_fn), "_forward_cls", None) is None


@pins("torch._C._functorch.is_batchedtensor", "it finds the tensors of torch.func.vmap")
def test_is_batchedtensor():
    seen = []
    torch.func.vmap(lambda x: seen.append(functorch().is_batchedtensor(x)) or x)(torch.ones(2, 3))
    assert seen == [True] and not functorch().is_batchedtensor(torch.ones(2))


@pins("torch._C._functorch.is_legacy_batchedtensor", "it finds the gradients of a backward with is_grads_batched")
def test_is_legacy_batchedtensor():
    seen = []

    class Noting(Double):
        @staticmethod
        def backward(ctx, grad):
            seen.append(functorch().is_legacy_batchedtensor(grad))
            return 2 * grad

    x = leaf()
    torch.autograd.grad(Noting.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert seen == [True] and not functorch().is_legacy_batchedtensor(torch.ones(2))


@pins("torch._C._functorch.is_gradtrackingtensor", "it finds the wrappers of torch.func.grad")
def test_is_gradtrackingtensor():
    seen = []
    torch.func.grad(lambda x: seen.append(functorch().is_gradtrackingtensor(x)) or x.sum())(torch.ones(2))
    assert seen == [True] and not functorch().is_gradtrackingtensor(torch.ones(2))


@pins("torch._C._functorch.get_unwrapped", "it gives the tensor below a wrapper of torch.func.grad, whose values can be read")
def test_get_unwrapped():
    seen = []
    torch.func.grad(lambda x: seen.append(functorch().get_unwrapped(x)) or x.sum())(torch.full((2,), 5.0))
    assert not functorch().is_functorch_wrapped_tensor(seen[0]) and seen[0].tolist() == [5.0, 5.0]


@pins("torch._C._functorch.is_functorch_wrapped_tensor", "it finds tensors whose values a transform hides")
def test_is_functorch_wrapped_tensor():
    seen = []
    torch.func.vmap(lambda x: seen.append(functorch().is_functorch_wrapped_tensor(x)) or x)(torch.ones(2, 3))
    torch.func.grad(lambda x: seen.append(functorch().is_functorch_wrapped_tensor(x)) or x.sum())(torch.ones(2))
    assert seen == [True, True] and not functorch().is_functorch_wrapped_tensor(torch.ones(2))


def vmapped(function, argument):
    """``torch.vmap(function, randomness="different")(argument)`` by the four private functions below."""
    _functorch = functorch()
    level = _functorch._vmap_increment_nesting(len(argument), "different")
    try:
        return _functorch._remove_batch_dim(function(_functorch._add_batch_dim(argument, 0, level)), level, len(argument), 0)
    finally:
        _functorch._vmap_decrement_nesting()


@pins("torch._C._functorch._vmap_increment_nesting", "it opens a vmap without the 28 microseconds of torch.vmap's wrapper")
def test_vmap_increment_nesting():
    random = vmapped(lambda x: x * 0 + torch.rand(()), torch.ones(2, 3))
    assert random[0, 0] != random[1, 0], "each element of the batch draws its own random numbers"


@pins("torch._C._functorch._vmap_decrement_nesting", "it closes a vmap that was opened so")
def test_vmap_decrement_nesting():
    before = functorch().maybe_current_level()
    vmapped(torch.sin, torch.ones(2, 3))
    assert functorch().maybe_current_level() == before


@pins("torch._C._functorch._add_batch_dim", "it makes a tensor one of a vmap")
def test_add_batch_dim():
    seen = []
    vmapped(lambda x: seen.append(x.shape) or x, torch.ones(2, 3))
    assert seen == [(3,)]


@pins("torch._C._functorch._remove_batch_dim", "it takes a result out of a vmap")
def test_remove_batch_dim():
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(vmapped(torch.sum, x), torch.vmap(torch.sum)(x))


@pins(
    "torch._functorch.predispatch.lazy_load_decompositions",
    "it prepares ops without a batching rule, as torch.vmap does before its first call",
)
def test_lazy_load_decompositions():
    from torch._functorch.predispatch import lazy_load_decompositions

    lazy_load_decompositions()
    lazy_load_decompositions()


@pins("torch.Tensor._backward_hooks", "it holds the hooks that wait for a leaf's gradient")
def test_backward_hooks():
    x = leaf()
    assert not x._backward_hooks
    handle = x.register_hook(lambda grad: None)
    assert x._backward_hooks
    handle.remove()
    assert not x._backward_hooks


@pins("torch.Tensor._post_accumulate_grad_hooks", "it holds the hooks that run after a leaf's gradient was added")
def test_post_accumulate_grad_hooks():
    x = leaf()
    assert not x._post_accumulate_grad_hooks
    handle = x.register_post_accumulate_grad_hook(lambda parameter: None)
    assert x._post_accumulate_grad_hooks
    handle.remove()
    assert not x._post_accumulate_grad_hooks


def hooks():
    return torch._C._autograd


def pack(tensor):
    return tensor


@pins("torch._C._autograd._top_saved_tensors_default_hooks", "it shows the innermost activation checkpoint around a forward")
def test_top_saved_tensors_default_hooks():
    assert not hooks()._top_saved_tensors_default_hooks(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert hooks()._top_saved_tensors_default_hooks(True)[0] is pack


@pins("torch._C._autograd._saved_tensors_hooks_is_enabled", "the stack of hooks is touched only where torch allows hooks")
def test_saved_tensors_hooks_is_enabled():
    assert hooks()._saved_tensors_hooks_is_enabled()
    with torch.autograd.graph.disable_saved_tensors_hooks("off"):
        assert not hooks()._saved_tensors_hooks_is_enabled()


@pins("torch._C._autograd._pop_saved_tensors_default_hooks", "it takes a checkpoint off the stack, to see the one around it")
def test_pop_saved_tensors_default_hooks():
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        hooks()._pop_saved_tensors_default_hooks()
        assert not hooks()._top_saved_tensors_default_hooks(True)
        hooks()._push_saved_tensors_default_hooks(pack, pack)


@pins("torch._C._autograd._push_saved_tensors_default_hooks", "it puts a checkpoint back on the stack")
def test_push_saved_tensors_default_hooks():
    hooks()._push_saved_tensors_default_hooks(pack, pack)
    assert hooks()._top_saved_tensors_default_hooks(True)[0] is pack
    hooks()._pop_saved_tensors_default_hooks()
    assert not hooks()._top_saved_tensors_default_hooks(True)


@pins(
    "torch.utils.checkpoint's variable frame, with recompute_fn",
    "it leads from a checkpoint's hook to the function that the backward calls",
)
def test_checkpoint_frame():
    from metamask_ext.torch_private import enclosing_checkpoints

    seen = []

    def region(x):
        seen.append(enclosing_checkpoints())
        return x.sin()

    outer = checkpoint(lambda x: checkpoint(region, x, use_reentrant=False), leaf(), use_reentrant=False)
    assert len(seen[0]) == 2 and all(callable(frame.recompute_fn) for frame in seen[0])
    outer.sum().backward()
    assert not enclosing_checkpoints()


@pins("torch.utils._pytree", "it flattens what a user's loss takes and returns, as torch.func does")
def test_pytree():
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

    tree = {"a": [1, (2, 3)], "b": None}
    leaves, spec = tree_flatten(tree)
    assert leaves == tree_leaves(tree) == [1, 2, 3, None]
    assert tree_unflatten(leaves, spec) == tree and tree_map(lambda leaf: leaf, tree) == tree


@pins("torch._foreach_add_", "one launch adds to the counters of all tasks' batch norms")
def test_foreach_add():
    tensors = [torch.zeros(2), torch.ones(3)]
    torch._foreach_add_(tensors, 1)
    assert [tensor.tolist() for tensor in tensors] == [[1.0] * 2, [2.0] * 3]


@pins("torch._foreach_copy_", "one launch writes the statistics of all tasks' batch norms")
def test_foreach_copy():
    tensors = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(tensors, [torch.ones(2), torch.ones(3)])
    assert [tensor.tolist() for tensor in tensors] == [[1.0] * 2, [1.0] * 3]


@pins("torch.fx._symbolic_trace._is_fx_tracing_flag", "masked layers are leaves of torch.fx's graphs")
def test_fx_trace():
    import torch._dynamo  # wraps the tracer
    from torch.fx import _symbolic_trace

    from metamask_ext.torch_private import symbolic_tracer

    seen = []

    def look(x):
        seen.append((_symbolic_trace._is_fx_tracing_flag, type(symbolic_tracer())))
        return x + 1

    torch.fx.symbolic_trace(look)
    torch.fx.experimental.proxy_tensor.make_fx(look)(torch.ones(2))
    look(torch.ones(2))
    assert seen == [(True, torch.fx.Tracer), (True, type(None)), (False, type(None))]


@pins("torch.nn.modules.batchnorm._BatchNorm", "batch norms of every dimension are found by it")
def test_batch_norm_base():
    base = torch.nn.modules.batchnorm._BatchNorm
    assert all(issubclass(getattr(torch.nn, name), base) for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"))


@pins("torch.nn.modules.instancenorm._InstanceNorm", "instance norms of every dimension are found by it")
def test_instance_norm_base():
    base = torch.nn.modules.instancenorm._InstanceNorm
    assert all(issubclass(getattr(torch.nn, f"InstanceNorm{dimensions}d"), base) for dimensions in (1, 2, 3))


@pins("torch._dynamo.exc.TorchDynamoException", "the benchmark suite tells a failed compilation from other errors")
def test_dynamo_exception():
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    assert issubclass(BackendCompilerFailed, TorchDynamoException)


@pins("torch.nn.Module._is_fsdp_managed_module", "it marks the modules whose parameters fully_shard, or FSDP1, took over")
def test_is_fsdp_managed_module():
    from tempfile import TemporaryDirectory

    from metamask_ext.torch_private import is_fsdp_managed, is_fsdp_root

    folder = TemporaryDirectory()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder.name}/rendezvous", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        assert not is_fsdp_managed(model) and not is_fsdp_managed(model[0])
        torch.distributed.fsdp.fully_shard(model)
        assert model[0]._is_fsdp_managed_module is True
        assert is_fsdp_managed(model[0]) and is_fsdp_managed(model) and is_fsdp_root(model) and not is_fsdp_root(model[0])
    finally:
        torch.distributed.destroy_process_group()
        folder.cleanup()


@pins("torch.Tensor.grad_fn._saved_other", "it holds the factor by which a GradScaler scales a loss")
def test_saved_other():
    scale = torch.ones(())
    product = (leaf().sum() * scale).grad_fn
    assert product._saved_other is scale


@pins("torch.Tensor.grad_fn._raw_saved_other", "it tells whether the factor lies behind a hook on saved tensors")
def test_raw_saved_other():
    scale = torch.ones(())
    assert (leaf().sum() * scale).grad_fn._raw_saved_other.unpack_hook is None
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert (leaf().sum() * scale).grad_fn._raw_saved_other.unpack_hook is pack


@pins("torch.amp.GradScaler._scale", "it is the tensor that a loss is multiplied by, to be compared with a factor")
def test_scale():
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler.scale(leaf().sum())).grad_fn._saved_other is scaler._scale


@pins("torch.nn.Module._named_members", "it walks the modules for parameters() and buffers(), with the function get_members_fn")
def test_named_members():

    from metamask_ext.torch_private import members_of_caller

    class Noted(torch.nn.Linear):
        found = None

        def named_modules(self, *arguments, **options):
            Noted.found = members_of_caller(sys._getframe(), "named_modules")
            yield from super().named_modules(*arguments, **options)

    module = torch.nn.Sequential(Noted(2, 2))
    list(module.parameters())
    assert [name for name, _ in Noted.found(module[0])] == ["weight", "bias"]
    list(module.buffers())
    assert not list(Noted.found(module[0]))
    list(module.modules())
    assert Noted.found is None


# --- Which symbols there are, and where.

PRIVATE = re.compile(r"_(?!_)\w*[a-z]\w*")
TENSORS, MODULES = (set(dir(kind)) for kind in (torch.Tensor, torch.nn.Module))
"""Attributes of tensors, and of modules: those are hooks for subclasses, as _load_from_state_dict."""


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as its parts; of another expression only the attributes behind it, after an empty part."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def private_uses(path: Path) -> list[tuple[int, str]]:
    """Private symbols of torch in a file: imported, reached from a module of torch, or an attribute of a tensor."""
    tree, found = ast.parse(path.read_text()), []
    of_torch = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    if any(map(PRIVATE.fullmatch, alias.name.split("."))):
                        found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                of_torch.add(alias.asname or alias.name)
                if any(map(PRIVATE.fullmatch, [*node.module.split("."), alias.name])) or node.module == "torch._C":
                    found.append((node.lineno, f"{node.module}.{alias.name}"))
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *rest = dotted(node)
            private = {part for part in rest if PRIVATE.fullmatch(part)} - MODULES
            from_torch = first in of_torch and (bool(private) or first == "_functorch" or "_C" in rest)
            if from_torch or (first not in ("self", "cls") and TENSORS & private):
                found.append((node.lineno, ".".join([first, *rest])))
    return sorted(set(found))


# The benchmark suite alone needs it; a test above pins it too.
IN_BENCH = ("torch._dynamo.exc.TorchDynamoException",)


def test_private_symbols_are_used_in_one_file_only():
    found = []
    for path in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "metamask_ext").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        if name == "metamask_ext/torch_private.py" or name.startswith("metamask_ext/bench/"):
            continue
        allowed = IN_BENCH if name.startswith("bench/") else ()
        found += [f"{name}:{line}: {symbol}" for line, symbol in private_uses(path) if symbol not in allowed]
    assert not found, "private symbols of torch belong into metamask_ext/torch_private.py:\n" + "\n".join(found)


def test_every_symbol_is_pinned():
    """torch_private.py uses none that no test here knows."""
    tree = ast.parse((ROOT / "metamask_ext/torch_private.py").read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            PRIVATE.fullmatch(node.attr) or dotted(node.value)[-1] in ("_functorch", "_autograd")
        ):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and re.search(r"\._", node.module or ""):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            used.add(node.value)
    modules = {"_functorch", "_autograd", "_C"}
    assert used - modules <= pinned(), f"no test pins {sorted(used - modules - pinned())}"
    assert {"_disable_dynamo", "maybe_current_level", "_forward_cls", "lazy_load_decompositions"} <= used, "the scan finds uses"
