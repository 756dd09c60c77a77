"""The tasks of a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops.checks import first_true, has_values, nan_flag
from ..ops.gate import compute_dtype
from .context import is_active
from .masked_layer import MaskedLayer
from .names import check_name, describe, escape, plain
from .ranks import check_same, of_first, placed_as, sharers
from .shards import Shards
from .structure import structure
from .task_dict import TaskDict
from .task_layer import TaskLayer, raise_no_layer, same_tasks, task_layers
from .wrappers import check_not_averaged, check_not_sharded, check_whole, is_sharded, place_shards


def masked_layers(model: nn.Module) -> list[tuple[str, MaskedLayer]]:
    """The masked layers of ``model`` with their names, each once. ValueError if there is none."""
    layers = [(name, layer) for name, layer in task_layers(model) if isinstance(layer, MaskedLayer)]
    return layers or raise_no_layer(model)


def tasks(model: nn.Module) -> list[str]:
    """The names of the model's tasks, oldest first.

    Raises:
        ValueError: ``model`` has no masked layer, or its layers have different tasks, as after a part of a state dict was loaded:
            :func:`add_task` completes those that the message names.
    """
    with structure():
        return same_tasks(task_layers(model))


def slots(model: nn.Module) -> list[str | None]:
    """The names of the model's tasks by slot: the numbers that :class:`metamask_ext.using_task` takes for each sample.

    A new task gets the next slot. The slot of a removed task holds None and is never used again, not even after a state dict was
    saved and loaded.

    Raises:
        ValueError: as :func:`tasks`.
    """
    with structure():
        tasks(model)
        return list(task_layers(model)[0][1]._task_dict()._names)


def add_task(model: nn.Module, name: str, init: str | Mapping[str, float] = "random") -> None:
    """Give every masked layer of ``model`` a mask for a new task. Masks that exist do not change.

    Where some layers have the task already, as after a part of a state dict was loaded, those that lack it get it: bits beside
    bits of the same layer, else logits.

    An optimiser of torch that was built before does not know the new parameters: add them to it
    (``metamask_ext.continual.TaskLoop`` does). ``DistributedDataParallel`` would not synchronise the new masks, and the model is
    refused while one holds it. Under ``fully_shard``, and in tensor parallelism, every process calls this at once: the masks are
    those that the first process draws, sharded as the weights are. Add the task to an ``AveragedModel`` of this model too.

    Args:
        model: a module with masked layers.
        name: the new task; any non-empty string.
        init: ``"random"``: by each layer's ``mask_init`` (for a new layer a normal distribution; for a converted one +4
            everywhere); ``"mean"``: the mean of the logits of the tasks that exist; ``"copy:<task>"``: those of that task; a
            mapping ``{task: alpha}``: logits whose gate is ``sum_t alpha_t g(M_t)``, a linear combination of known tasks from
            which an unseen one can be tuned (Blum and Law, section 2.1, "During test time"). For the sigmoid gate that sum is
            kept within sigmoid(-4) and sigmoid(4); the hard gate is on where it is above 1/2. Packed tasks may be combined too.
            Sums over tasks are in float32, or in float64 for tensors of that dtype, and rounded once.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: every layer has the task, ``init`` is unknown or names an unknown task, logits are asked of a packed task, NaN
            would come out of a mean or a combination, or ``model`` has no masked layer.
        RuntimeError: a ``DistributedDataParallel`` or FullyShardedDataParallel holds parameters of the model; ``fully_shard`` was
            called on a module around it; or the processes that share its parameters ask for different tasks.
    """
    with structure():
        _add_task(model, name, init)


def _add_task(model: nn.Module, name: str, init: str | Mapping[str, float]) -> None:
    name = check_name(name)
    layers, what = task_layers(model), f"task {name!r} cannot be added"
    groups = sharers(layer for _, layer in layers)
    if groups:
        device = next(model.parameters()).device
        if device.type == "meta":
            raise RuntimeError(f"{what}: the model is distributed and has no values yet. Call model.to_empty(device=...) first")
        check_same(f"{name!r}, init={init!r}", groups, device, what)
    known, partial = _known_for(layers, name)
    amounts, source = _resolve_init(known, init)
    check_not_averaged((layer for _, layer in layers), what)
    shards = Shards(model, [layer for _, layer in layers], what) if is_sharded(layer for _, layer in layers) else None

    def fill(layer: TaskLayer, tensors: TaskDict, out: Tensor) -> None:
        if amounts is not None:
            layer._combine(tensors, amounts, out)
        elif source is not None:
            out.copy_(_values(layer, tensors, source))
        elif out.is_floating_point():
            total = torch.zeros_like(out, dtype=compute_dtype(out.dtype))
            for task in tensors:
                total += _values(layer, tensors, task)
            out.copy_(total / len(tensors))
        else:
            out.zero_()  # a count

    computed = amounts is not None or init == "mean"
    if computed:
        refuse_nan(model, known if amounts is None else amounts, "combined")
    how = None if init == "random" else fill
    made = [(path, tensors, of_first(new, groups)) for path, layer in layers for tensors, new in layer._new_tensors(how)]
    new = [entry for entry in made if name not in entry[1]]
    if computed:
        checked = [(path, tensor) for path, _, tensor in new if tensor.is_floating_point() and has_values(tensor)]
        bad = first_true([nan_flag(tensor) for _, tensor in checked])
        if bad is not None:
            raise ValueError(f"init gives NaN for task {name!r} in layer {checked[bad][0]!r}: it combines NaN, or +inf with -inf")
    put_in(name, [(tensors, tensor) for _, tensors, tensor in new], shards)
    if name in partial:
        _pack_beside_bits([layer for _, layer in layers], name)


def draw_again(model: nn.Module, name: str) -> None:
    """Give a task the tensors that :func:`add_task` would give it now, in the place of those that are there."""
    with structure(), torch.no_grad():
        place_shards(model)
        layers = [layer for _, layer in task_layers(model)]
        groups = sharers(layers)
        for layer in layers:
            for tensors, tensor in layer._new_tensors():
                tensors[name].copy_(placed_as(of_first(tensor, groups), tensors[name]))


def put_in(name: str, new: Sequence[tuple[TaskDict, Tensor]], shards: Shards | None = None) -> None:
    """Give each TaskDict its tensor of a new task, or none of them where that is interrupted."""
    lengths = {tensors: len(tensors._names) for tensors, _ in new}
    if shards is not None:
        shards.check_dtypes(new)
    try:
        for tensors, tensor in new:
            if shards is None:
                tensors[name] = tensor
            else:
                shards.add(tensors, name, tensor)
    except BaseException:  # Ctrl-C between two layers would leave a model that no call takes
        if shards is not None:
            shards.undo()
        for tensors, length in lengths.items():
            tensors._drop(name, length)
        raise


def _pack_beside_bits(layers: Iterable[TaskLayer], name: str) -> None:
    """Pack a task's mask of a weight or bias beside bits of the other."""
    for layer in layers:
        if isinstance(layer, MaskedLayer):
            bits = layer._bits(name)
            if len(bits) < len(layer._dicts()):
                for masks, packed in bits:
                    masks[name] = packed


def _known_for(layers: Iterable[tuple[str, TaskLayer]], name: str) -> tuple[list[str], set[str]]:
    """The tasks that all of these layers have, oldest first, and those that only some have.

    ValueError if ``name`` cannot be added.
    """
    layers = list(layers)
    kept = [tensors.keys() for _, layer in layers for tensors in layer._dicts().values()]
    known, every = set(kept[0]), set(kept[0])
    for names in kept:
        if names != known:  # mostly they are the same, and many
            known &= names
            every |= names
    ordered, partial = [task for task in kept[0] if task in known], every - known
    if name in known:
        raise ValueError(f"name must be that of a new task, got {name!r}; the model has {describe(ordered)}")
    if name not in partial:
        same_tasks(layers)
    return ordered, partial


def _resolve_init(known: list[str], init: str | Mapping[str, float]) -> tuple[dict[str, float | Tensor] | None, str | None]:
    """The coefficients of a combination, or the task to copy, of those that are known; TypeError or ValueError for no ``init``."""
    if isinstance(init, Mapping):
        return check_amounts(known, init, "init"), None
    init = plain(init)
    if not isinstance(init, str):
        raise TypeError(f"init must be a string, got {type(init).__name__}")
    if init.startswith("copy:"):
        source = init[len("copy:") :]
        if source not in known:
            raise ValueError(f"init must copy one of {describe(known)}, got {init!r}")
        return None, source
    if init not in ("random", "mean"):
        raise ValueError(f"init must be 'random', 'mean', 'copy:<task>' or a mapping of tasks, got {init!r}")
    return None, None


def _values(layer: TaskLayer, tensors: TaskDict, task: str) -> Tensor:
    tensor = tensors[task]
    if isinstance(layer, MaskedLayer) and tensor.dtype == torch.uint8:
        raise ValueError(f"task {task!r} is packed, and has no logits to begin with: use init={{{task!r}: 1.0}}")
    return tensor


def check_amounts(known: list[str], amounts: Mapping[str, float | Tensor], argument: str) -> dict[str, float | Tensor]:
    """The coefficients of a combination of tasks, each a number or a tensor of one; TypeError or ValueError if they are not."""
    if not isinstance(amounts, Mapping):
        raise TypeError(f"{argument} must be a mapping from task to coefficient, got {type(amounts).__name__}")
    if not amounts:
        raise ValueError(f"{argument} must name at least one task, got an empty mapping")
    checked: dict[str, float | Tensor] = {}
    for given, amount in amounts.items():
        task = plain(given)
        if task not in known:
            raise ValueError(f"{argument} must name tasks among {describe(known)}, got {task!r}")
        if task in checked:
            raise ValueError(f"{argument} must name a task once, got {task!r} twice")
        if isinstance(amount, Tensor):
            if amount.numel() != 1 or not amount.is_floating_point():
                raise ValueError(
                    f"{argument}[{task!r}] must be one floating-point number, got {amount.dtype} of shape {list(amount.shape)}"
                )
            checked[task] = amount.reshape(())
        else:
            try:
                finite = math.isfinite(amount)
            except TypeError:
                raise TypeError(f"{argument}[{task!r}] must be a number, got {type(amount).__name__}") from None
            if not finite:
                raise ValueError(f"{argument}[{task!r}] must be finite, got {amount}")
            checked[task] = float(amount)
    tensors = {task: amount for task, amount in checked.items() if isinstance(amount, Tensor) and has_values(amount)}
    bad = first_true([amount.detach().isfinite().logical_not() for amount in tensors.values()])
    if bad is not None:
        task = list(tensors)[bad]
        raise ValueError(f"{argument}[{task!r}] must be finite, got {float(tensors[task].detach())}")
    return checked


def refuse_nan(model: nn.Module, names: Iterable[str], done: str) -> None:
    """Refuse masks that hold NaN, as those of a training that diverged: a comparison with NaN is false, so a bit would hide it.

    Where values cannot be looked at, under torch.compile and in transforms of torch.func, nothing is refused.

    Raises:
        ValueError: names the task, the layer and what cannot be ``done`` with it.
    """
    wanted, places, flags = {escape(name): name for name in names}, [], []
    for path, layer in task_layers(model):
        if not isinstance(layer, MaskedLayer):
            continue
        for kind, tensors in layer._dicts().items():
            for key, logits in list(tensors._parameters.items()):
                if key in wanted and logits is not None and has_values(logits):
                    places.append((wanted[key], kind, path))
                    flags.append(nan_flag(logits))
    bad = first_true(flags)
    if bad is not None:
        name, kind, path = places[bad]
        raise ValueError(f"task {name!r} cannot be {done}: its {kind} in layer {path!r} hold NaN")


def pack_task(model: nn.Module, name: str) -> None:
    """Replace a task's logits by bits, one for each weight: 1 where the hard gate is on; for the sigmoid gate, where ``M > 0``.

    The parameters go away; what an optimiser keeps for them stays with it. A task that is packed stays as it is.

    Raises:
        ValueError: the task is unknown, a logit of it is NaN, or ``model`` has no masked layer. Nothing has changed.
    """
    with structure():
        known, name = tasks(model), plain(name)
        if name not in known:
            raise ValueError(f"task must be one of {describe(known)}, got {name!r}")
        check_whole(model.modules(), f"task {name!r} cannot be packed")
        refuse_nan(model, [name], "packed")
        packed = [entry for _, layer in masked_layers(model) for entry in layer._bits(name)]
        try:
            for masks, bits in packed:
                masks[name] = bits
        except BaseException:
            for masks, bits in packed:
                masks[name] = bits
            raise


def remove_task(model: nn.Module, name: str) -> None:
    """Remove a task's masks from every masked layer of ``model``. Its slot stays empty.

    Raises:
        ValueError: the task is unknown, or the last one; or the layers have different tasks, as for :func:`tasks`.
        RuntimeError: the task is active in an open ``using_task`` block, or ``fully_shard`` holds the model's parameters.
    """
    with structure():
        known, name = tasks(model), plain(name)
        if name not in known:
            raise ValueError(f"task must be one of {describe(known)}, got {name!r}")
        if len(known) == 1:
            raise ValueError(f"task must not be the model's last one, got {name!r}: a masked layer needs a mask")
        layers = [layer for _, layer in task_layers(model)]
        check_not_sharded(layers, f"task {name!r} cannot be removed")
        if is_active(layers, name):
            raise RuntimeError(f"task {name!r} is active: leave its using_task block before removing it")
        try:
            for layer in layers:
                layer._remove_task(name)
        except BaseException:  # Ctrl-C between two layers: what is begun is ended
            for layer in layers:
                layer._remove_task(name)
            raise
