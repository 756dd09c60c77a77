"""From a masked model to the plain torch model of one task."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..torch_private import RebuildingHook, is_of_parametrization, rebuilding_hook
from .by_task import plain_again
from .masked_layer import MaskedLayer
from .per_task import PerTask, plain_copy
from .task_layer import TaskLayer, task_keys, task_layers
from .tasks import refuse_nan

Model = TypeVar("Model", bound=nn.Module)

_OURS = {
    *("gate", "temperature", "threshold", "mask_init", "mask_dtype", "plain_type", "bias_masks", "_masked_names", "has_tokens"),
    *("_parameters", "_modules"),
}
_HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def merge(model: Model, task: str) -> Model:
    """A copy of ``model`` as a plain torch model of one task: ``weight = W * g(M_task)`` baked in, no masks, for export.

    Layers that share a weight and its mask still share it in the copy; layers that share a weight but not a mask get one each.

    The copy keeps hooks. Where a hook or a parametrization of torch computes a masked layer's ``W`` (``prune``, ``weight_norm``,
    ``spectral_norm``, ``parametrize``), the copy has the current value instead, without the hook and its tensors.

    Args:
        model: a module with masked layers; it is not changed.
        task: the task to keep.

    Raises:
        TypeError: ``task`` is no string.
        ValueError: the task is unknown, its logits hold NaN, or ``model`` has no masked layer; a masked layer's weight is computed
            by a hook that is not torch's, or another tensor of a layer with tasks by a parametrization.
    """
    layers = task_layers(model)
    task_keys(layers, task)
    refuse_nan(model, [task], "merged")
    with torch.inference_mode(False), torch.no_grad():
        return _merged(model, layers, task)


def _merged(model: Model, layers: list[tuple[str, TaskLayer]], task: str) -> Model:
    plains: dict[TaskLayer, nn.Module] = {layer: layer.plain_type.__new__(layer.plain_type) for _, layer in layers}
    memo: dict[int, object] = {id(layer): plain for layer, plain in plains.items()}
    for module in model.modules():
        # What a hook computed in the last forward; torch copies no tensors with a graph.
        memo |= {
            id(kept): kept.detach().clone() for kept in module.__dict__.values() if isinstance(kept, Tensor) and not kept.is_leaf
        }
    baked: dict[tuple[object, ...], tuple[nn.Parameter, Tensor]] = {}
    for path, layer in layers:
        if isinstance(layer, MaskedLayer):
            _fill_plain(plains[layer], path, layer, task, memo, baked)
        elif isinstance(layer, PerTask):
            _check_parametrized(path, layer, ())
            plain_copy(layer, task, plains[layer], memo)
    merged = copy.deepcopy(model, memo)
    plain_again(merged)
    return merged


class _Source(NamedTuple):
    """The tensor that a layer's masks apply to, with its ``requires_grad`` and the hook that computes it, if one does."""

    tensor: Tensor
    requires_grad: bool
    hook: RebuildingHook | None = None


def _source(path: str, layer: MaskedLayer, name: str, held: Tensor) -> _Source:
    if name in layer._parameters:
        return _Source(held, held.requires_grad)
    if is_parametrized(layer, name):
        of_weight = layer.get_submodule(f"parametrizations.{name}")
        return _Source(held, any(parameter.requires_grad for parameter in of_weight.parameters()))
    hook = rebuilding_hook(layer, name)
    if hook is not None:
        kept = {**layer._parameters, **layer._buffers}
        tensors = [kept.get(of) for of in hook.sources]
        if all(tensor is not None for tensor in tensors):
            return _Source(hook.compute(), any(tensor is not None and tensor.requires_grad for tensor in tensors), hook)
    elif not layer._forward_pre_hooks:
        return _Source(held, held.requires_grad)
    raise ValueError(
        f"{name} of layer {path or 'the model'!r} is no parameter: hooks compute it that merge does not know. Make it one "
        "first, as torch.nn.utils.prune.remove and remove_weight_norm do"
    )


def _fill_plain(
    plain: nn.Module,
    path: str,
    layer: MaskedLayer,
    task: str,
    memo: dict[int, object],
    baked: dict[tuple[object, ...], tuple[nn.Parameter, Tensor]],
) -> None:
    _check_parametrized(path, layer, layer._masked_names)
    groups = layer._named_groups()
    found = {name: _source(path, layer, name, shared) for name, (shared, _) in groups.items()}
    hooks = [source.hook for source in found.values() if source.hook is not None]
    gone = {*found, *(name for hook in hooks for name in hook.sources)}
    state = {key: value for key, value in layer.__dict__.items() if key not in _OURS and key not in gone}
    state["_buffers"] = {key: value for key, value in layer._buffers.items() if key not in gone}
    for kind in _HOOKS:
        state[kind] = OrderedDict(
            (key, value)
            for key, value in state[kind].items()
            if not is_of_parametrization(value) and not any(hook.made(value) for hook in hooks)
        )
    others = {key: value for key, value in layer._parameters.items() if key not in gone}
    children = {key: value for key, value in layer._modules.items() if key not in (*layer._kinds(), "parametrizations")}
    plain.__dict__.update(copy.deepcopy(state, memo))
    moved = not layer._parameters.keys() >= set(layer._masked_names)  # a tool has taken one away: the first ones, in torch's layers
    order = [*(layer._masked_names if moved else ()), *(name for name in layer._parameters if name in found or name not in gone)]
    plain.__dict__["_parameters"] = {**dict.fromkeys(order), **copy.deepcopy(others, memo)}
    plain.__dict__["_modules"] = copy.deepcopy(children, memo)
    key = layer._task_key(task)
    for (name, source), (_, masks) in zip(found.items(), groups.values(), strict=True):
        same = (id(source.tensor), id(masks[task]), *layer._gate().values())
        if same not in baked:
            theta = layer._theta_of(source.tensor, masks, key)
            # The source stays alive with it: another would get its id.
            baked[same] = nn.Parameter(theta, requires_grad=source.requires_grad), source.tensor
        plain._parameters[name] = baked[same][0]


def _check_parametrized(path: str, layer: TaskLayer, baked: tuple[str, ...]) -> None:
    """Refuse parametrizations of tensors that are not baked in: the plain class knows nothing of them."""
    if is_parametrized(layer):
        others = sorted(name for name in layer.get_submodule("parametrizations")._modules if name not in baked)
        if others:
            raise ValueError(
                f"{others[0]} of layer {path or 'the model'!r} is parametrized, and merge would lose that: call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
