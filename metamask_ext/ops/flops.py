"""The floating-point operations of the ops, for :class:`torch.utils.flop_counter.FlopCounterMode`.

They are counted as torch counts a plain layer's: two for each multiplication of a product, none for what is done element by element
(gates, masks, biases, steps). So a masked layer has the number of the plain one, in the forward and in the backward.

torch's counter is a module of its own, which imports Triton where that is installed. The formulas are registered when somebody
imports it: for all others, importing metamask_ext takes no longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Arguments = dict[str, Any]
"""The arguments of an op by their names in its schema."""


def _nothing(arguments: Arguments) -> int:
    return 0


def _product(arguments: Arguments) -> int:
    """``[..., in]`` with ``[out, in]``; of several groups too, where each output meets ``in`` columns of ``groups * in``."""
    return 2 * int(prod(arguments["input"].shape[:-1])) * int(arguments["weight"].numel())


def _gradients(arguments: Arguments) -> int:
    """A product for the input's gradient, and one for those of the parameters.

    torch counts a convolution's gradient of the weight as one of all channels, whatever its groups; so it is here.
    """
    of_input, *of_matrices = arguments["output_mask"][: 3 if "masks" in arguments or "mask_logits" in arguments else 2]
    return _product(arguments) * (of_input + any(of_matrices) * arguments.get("groups", 1))


def _second_gradients(arguments: Arguments) -> int:
    """The products that the backward of a plain linear layer's backward takes, for the cotangents that there are."""
    of_input = arguments["cotangent_input"] is not None
    of_matrices = arguments["cotangent_weight"] is not None or any(one is not None for one in arguments["cotangent_masks"])
    to_grad, to_input, to_weight, to_masks = arguments["output_mask"][:4]
    products = to_grad * (of_input + of_matrices) + to_input * of_matrices + (to_weight or to_masks) * of_input
    return _product(arguments) * products


def _superposition_gradient(arguments: Arguments) -> int:
    """``dy.T @ x`` of each sample, and its product with the bits of all tasks."""
    weight, packed = arguments["weight"], arguments["packed"]
    tasks = packed[0].shape[0] if len(packed) == 1 and packed[0].dim() == 3 else len(packed)
    return _product(arguments) + 2 * arguments["input"].shape[0] * int(weight.numel()) * tasks


FORMULAS: dict[str, Callable[[Arguments], int]] = {
    **dict.fromkeys(
        ("masked_weight", "masked_weight_backward", "masked_weight_backward_sgd_", "masked_weight_backward_adamw_"), _nothing
    ),
    "masked_weight_double_backward": _nothing,
    **dict.fromkeys(("masked_weight_list", "masked_weight_list_backward", "masked_weight_list_double_backward"), _nothing),
    **dict.fromkeys(("pack_mask", "unpack_mask", "im2col", "col2im"), _nothing),
    **dict.fromkeys(("masked_linear", "task_masked_linear", "packed_masked_linear"), _product),
    **dict.fromkeys(("masked_linear_backward", "masked_linear_backward_sgd_", "masked_linear_backward_adamw_"), _gradients),
    **dict.fromkeys(("task_masked_linear_backward", "packed_masked_linear_backward"), _gradients),
    "task_masked_linear_double_backward": _second_gradients,
    "packed_superposition_gradient": _superposition_gradient,
}
"""By op."""


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.metamask, name)
        counter.register_flop_formula(op, get_raw=True)(_by_name(op.default._schema.arguments, formula))


def _by_name(schema: Sequence[Any], formula: Callable[[Arguments], int]) -> Callable[..., int]:
    """The formula as torch calls it: with the arguments as they were given, and the result."""
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    names = [argument.name for argument in schema]

    def count(*given: object, out_val: object = None, **named: object) -> int:
        return formula({**defaults, **dict(zip(names, given)), **named})

    return count


class _Finder(MetaPathFinder):
    """Waits for the import of torch's counter. A mere look for it, as find_spec's, changes nothing."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


def register() -> None:
    """Give torch's counter the formulas, now or when it is imported."""
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        _register(counter)
    else:
        sys.meta_path.insert(0, _Finder())
