"""The gate of a masked layer in its state dict: a tensor, so that files which hold tensors alone keep it.

``_extra_state``, float64 ``[4]``: the gate's number, temperature, threshold, and how many tasks the layer has. The numbers are not
encoded: averaging states, or converting them to another dtype, gives a mean or a rounded temperature.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import has_values
from ..ops.gate import GATES, resolve_gate
from ..torch_private import EXTRA_STATE, is_no_extra_state

_NAMES = {number: name for name, number in GATES.items()}
_ROUNDING = 1e-3
"""The most that averaging or a conversion may change a small whole number by."""


class Settings(NamedTuple):
    """A gate as the layer's attributes give it, and the number of tasks."""

    gate: str
    temperature: float
    threshold: float
    tasks: int

    def encoded(self) -> Tensor:
        """The settings as a tensor. ValueError for an unknown gate."""
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {sorted(GATES)}, got {self.gate!r}")
        values = GATES[self.gate], float(self.temperature), float(self.threshold), self.tasks
        with torch.inference_mode(False):
            return torch.tensor(values, dtype=torch.float64, device="cpu")


def decoded(state: object) -> Settings:
    """The settings of a tensor that :meth:`Settings.encoded` made. ValueError if it is another."""
    is_dense = isinstance(state, Tensor) and state.layout == torch.strided and state.device.type != "meta"
    if not isinstance(state, Tensor) or not is_dense or state.shape != (4,) or not state.is_floating_point():
        got = (
            f"{state.dtype} {list(state.shape)}, {state.layout}, on {state.device}"
            if isinstance(state, Tensor)
            else type(state).__name__
        )
        raise ValueError(f"must be a floating-point tensor [4] (gate, temperature, threshold, tasks), got {got}")
    number, temperature, threshold, tasks = state.detach().to("cpu", torch.float64).tolist()
    if not (math.isfinite(number) and abs(number - round(number)) < _ROUNDING and round(number) in _NAMES):
        raise ValueError(f"must have one of the gates {GATES}, got {number}")
    gate = _NAMES[round(number)]
    resolve_gate(gate, temperature, threshold)
    if not (math.isfinite(tasks) and tasks >= 0):
        raise ValueError(f"must have a number of tasks of at least 0, got {tasks}")
    return Settings(gate, temperature, threshold, round(tasks))


def settings_in(
    state_dict: dict[str, Any], prefix: str, own: Settings, has_masks: bool, kind: str, errors: list[str]
) -> Settings | None:
    """Return the settings that a state has for a layer of type ``kind``; where it has none that can be, put ``own`` in.

    None: it has none. With masks, that is a state of before they were saved, and a warning says what is assumed.
    """
    key = prefix + EXTRA_STATE
    state = state_dict.get(key)
    if isinstance(state, Tensor) and not has_values(state):
        pass  # on meta, or fake: as with parameters, there is nothing to take over
    elif state is not None and not is_no_extra_state(state):
        try:
            return decoded(state)
        except ValueError as error:
            errors.append(f"{key} {error}")
    elif has_masks:
        parameter = f"temperature={own.temperature}" if own.gate == "sigmoid" else f"threshold={own.threshold}"
        warnings.warn(
            f"the state dict has masks and no gate for them, as those of older versions: the {kind} keeps its own, assuming "
            f"gate={own.gate!r}, {parameter}. Where the saved layer had another, set the attributes",
            stacklevel=2,
        )
    state_dict[key] = own.encoded()
    return None
