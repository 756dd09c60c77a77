"""The adapters that PEFT puts beside a model's layers: which modules they are, and which they leave alone.

PEFT need not be installed. Its layers name what they have added in ``adapter_layer_names``, and keep the layer of the model as
``base_layer`` (or ``original_module``, beside a copy of their own). Prompt encoders lie beside the whole model.
"""

from __future__ import annotations

from torch import nn

BASE_LAYERS = ("base_layer", "original_module")
"""The attributes in which PEFT's layers hold that of the model."""

_OF_MODEL = ("prompt_encoder", "internal_xlora_classifier")
"""The attributes of PEFT's models in which they hold modules of adapters. Models of others have such too (SAM)."""


def holds_base(module: nn.Module) -> bool:
    """True for a layer of PEFT around one of the model: it may read, and write, the weight of that one."""
    return bool(_adapters_of(module))


def adapters_in(model: nn.Module) -> set[nn.Module]:
    """The modules in ``model`` that are reached by way of an adapter only, as ``lora_A``: they are no part of the base model."""
    base: set[nn.Module] = set()
    todo = [model]
    while todo:
        module = todo.pop()
        if module not in base:
            base.add(module)
            adapters = _adapters_of(module)
            if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
                adapters = (*adapters, *_OF_MODEL)
            todo += [child for name, child in module._modules.items() if child is not None and name not in adapters]
    return {module for module in model.modules() if module not in base}


def _adapters_of(module: nn.Module) -> tuple[str, ...]:
    # Not hasattr: PEFT's layers look into the layer that they hold.
    names = module.__dict__.get("adapter_layer_names", getattr(type(module), "adapter_layer_names", ()))
    return names if isinstance(names, tuple) else ()
