"""Layers that share one weight between tasks and own one mask for each task."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..reference import DTYPES, resolve_gate
from .active import active_key, check_only_key, describe
from .names import check_name, escape, unescape

MaskInit = str | float | Callable[[Tensor], Any]
DEFAULT_TASK = "default"


class TaskMasks(nn.ParameterDict):
    """A ParameterDict from task name to mask logits, whose parameter keys are the escaped names."""

    def _key_to_attr(self, key: str) -> str:
        return escape(key)

    def extra_repr(self) -> str:
        return f"{len(self)} tasks: {describe(self)}"


class MaskedLayer(nn.Module):
    """What masked layers have in common: a mask for each task, in ``masks`` and, with a bias, in ``bias_masks``.

    Both are ParameterDicts by task name, one tensor per task: a task's gradient and optimiser state exist only when it was used.
    While a layer has one task, that one is active; with several, :func:`metamask_ext.using_task` says which.

    A state dict with no mask of this layer (that of the plain torch layer) leaves the masks as they are; one that has some but not
    all of them is an error under ``strict``; tasks that the layer lacks are created.
    """

    plain_type: type[nn.Module]
    """What :func:`metamask_ext.merge` makes of the layer."""
    weight: Any  # what torch's layers declare differs from what they hold
    bias: Any
    masks: TaskMasks
    bias_masks: TaskMasks | None

    def _init_masked(
        self, gate: str, temperature: float, threshold: float, mask_init: MaskInit, tasks: list[str] | None = None
    ) -> None:
        """Make a torch layer into a masked one: its attributes and the masks of ``tasks``."""
        resolve_gate(gate, temperature, threshold)
        weight, bias = self._shared()
        if weight.dtype not in DTYPES:
            raise TypeError(f"weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
        self.gate, self.temperature, self.threshold, self.mask_init = gate, temperature, threshold, mask_init
        _check_mask_init(mask_init)
        self.masks = TaskMasks().train(self.training)
        self.bias_masks = None if bias is None else TaskMasks().train(self.training)
        for task in [DEFAULT_TASK] if tasks is None else tasks:
            self._new_task(task)

    def _groups(self) -> list[tuple[Tensor, TaskMasks]]:
        """The weight and the bias with their masks."""
        weight, bias = self._shared()
        groups = [(weight, self.masks)]
        if bias is not None and self.bias_masks is not None:
            groups.append((bias, self.bias_masks))
        return groups

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that all tasks share."""
        return self.weight, self.bias

    def _new_masks(self, init: Callable[[TaskMasks, Tensor], Any] | None = None) -> list[tuple[TaskMasks, nn.Parameter]]:
        """Logits for one more task, and where they belong: made first for all layers of a model, in case one fails."""
        new = []
        for parameter, masks in self._groups():
            logits = torch.empty_like(parameter, requires_grad=False)
            with torch.no_grad():
                if init is None:
                    self._init_logits(logits)
                else:
                    init(masks, logits)
            new.append((masks, nn.Parameter(logits)))
        return new

    def _new_task(self, task: str) -> None:
        check_name(task)
        for masks, logits in self._new_masks():
            masks[task] = logits

    def _remove_task(self, task: str) -> None:
        for _, masks in self._groups():
            if task in masks:  # layers may share their masks
                del masks[task]

    def _init_logits(self, logits: Tensor) -> None:
        if self.mask_init == "normal":
            nn.init.normal_(logits)
        elif callable(self.mask_init):
            self.mask_init(logits)
        else:
            nn.init.constant_(logits, float(self.mask_init))

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch's layer does, and every task's mask by ``mask_init``."""
        super().reset_parameters()  # type: ignore[misc]
        if "masks" in self._modules:  # torch's constructor calls this before there are any
            self._reset_masks()

    def _reset_masks(self) -> None:
        with torch.no_grad():
            for _, masks in self._groups():
                for logits in masks.values():
                    self._init_logits(logits)

    def _task_key(self, task: str) -> str:
        key = escape(task)
        if key not in self.masks._parameters:
            raise ValueError(f"task must be one of {describe(self.masks)}, got {task!r}")
        return key

    def _active(self) -> tuple[Tensor, Tensor | None]:
        """The active task's mask of the weight and of the bias."""
        masks = self._modules["masks"]._parameters  # type: ignore[union-attr]
        if len(masks) == 1:
            (key,) = masks
            if not torch.compiler.is_dynamo_compiling():
                check_only_key(self, key)
        elif torch.compiler.is_dynamo_compiling():
            return _active_in_eager(self)
        else:
            key = active_key(self)
        bias_masks = self._modules.get("bias_masks")
        return masks[key], None if bias_masks is None else bias_masks._parameters[key]  # type: ignore[return-value]

    @property
    def mask_logits(self) -> Tensor:
        """The active task's mask logits ``M``, of the shape of ``weight``."""
        return self._active()[0]

    @property
    def bias_mask_logits(self) -> Tensor | None:
        """The active task's logits of the bias, ``M_b``; None without a bias."""
        return self._active()[1]

    def _gate(self) -> dict[str, Any]:
        return {"gate": self.gate, "temperature": self.temperature, "threshold": self.threshold}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._mask_repr()}"

    def _mask_repr(self) -> str:
        parameter = f"temperature={self.temperature}" if self.gate == "sigmoid" else f"threshold={self.threshold}"
        return f"gate={self.gate}, {parameter}, tasks={len(self.masks)}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        saved: dict[str, None] = {}
        given = False
        for name in ("masks", "bias_masks"):
            for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                given = True
                task = unescape(key[len(prefix) + len(name) + 1 :])
                if task:
                    saved[task] = None
                    # A torch with other attributes may have escaped another first character.
                    now = f"{prefix}{name}.{escape(task)}"
                    if now not in state_dict:
                        state_dict[now] = state_dict.pop(key)
        if not given:
            # Children are loaded next, from the same dictionary: they find what they have.
            for name, masks in (("masks", self.masks), ("bias_masks", self.bias_masks)):
                for key, logits in ({} if masks is None else masks._parameters).items():
                    state_dict[f"{prefix}{name}.{key}"] = logits
        for task in saved:
            if task not in self.masks:
                self._new_task(task)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


@torch._disable_dynamo  # torch.compiler.disable would import all of Dynamo here
def _active_in_eager(layer: MaskedLayer) -> tuple[Tensor, Tensor | None]:
    """For torch.compile, which cannot read a context variable: one graph break, and the masks are inputs of what follows."""
    return layer._active()


class MaskedLinear(MaskedLayer, nn.Linear):
    """``y = x @ (W * g(M)).T + b * g(M_b)``: a :class:`torch.nn.Linear` with a mask for each task.

    Source: Blum and Law, EE5239 proposal, eq. 3 and section 3.1 (the bias is masked too). The gates are those of
    :func:`metamask_ext.masked_weight`.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        gate: ``"sigmoid"`` or ``"hard"``.
        temperature: of the sigmoid gate, in logits, greater than 0; an attribute that may be changed (annealing).
        threshold: of the hard gate, in logits; an attribute likewise.
        mask_init: how a new task's logits begin: ``"normal"`` (mean 0, standard deviation 1; the proposal's "randomly
            initialize"), a number for all of them, or a function that fills a tensor in place.

    Shapes: input ``[..., in_features]``, output ``[..., out_features]``, ``weight`` and each of ``masks``
    ``[out_features, in_features]``, ``bias`` and each of ``bias_masks`` ``[out_features]``. The layer begins with one task,
    ``"default"``.

    Raises:
        ValueError: an unknown gate, a temperature that is not positive, an unknown ``mask_init``.
        RuntimeError: called with several tasks and none active.
    """

    plain_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_masked(gate, temperature, threshold, mask_init)

    def forward(self, input: Tensor) -> Tensor:
        mask_logits, bias_mask_logits = self._active()
        weight, bias = self._shared()
        return functional.masked_linear(
            input,
            weight,
            mask_logits,
            bias,
            bias_mask_logits,
            gate=self.gate,
            temperature=self.temperature,
            threshold=self.threshold,
        )


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``y = conv2d(x, W * g(M)) + b * g(M_b)``: a :class:`torch.nn.Conv2d` with a mask for each task.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as for
            :class:`torch.nn.Conv2d`.
        gate, temperature, threshold, mask_init: as for :class:`MaskedLinear`.

    Shapes: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; ``weight`` and each of ``masks`` ``[C_out, C_in / groups, kH, kW]``,
    ``bias`` and each of ``bias_masks`` ``[C_out]``.
    """

    plain_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        threshold: float = 0.0,
        mask_init: MaskInit = "normal",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_masked(gate, temperature, threshold, mask_init)

    def forward(self, input: Tensor) -> Tensor:
        mask_logits, bias_mask_logits = self._active()
        weight, bias = self._shared()
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry: Any = self.stride, padding, self.dilation, self.groups
        return functional.masked_conv2d(
            input,
            weight,
            mask_logits,
            bias,
            bias_mask_logits,
            *geometry,
            gate=self.gate,
            temperature=self.temperature,
            threshold=self.threshold,
        )


class _ReadThrough:
    """For a layer whose parameters other code reads past forward: there ``weight`` and ``bias`` are the masked ones.

    The parameters themselves, in ``state_dict``, ``parameters()`` and optimisers, are the shared ones as everywhere; torch's own
    methods (``reset_parameters``) work on those too. Code that fills ``layer.weight`` from outside would fill a temporary.
    """

    _parameters: dict[str, nn.Parameter | None]
    plain_type: Any

    def _as_plain(self) -> Any:
        return SimpleNamespace(**{**self.__dict__, **self._parameters})

    def extra_repr(self) -> str:
        return f"{self.plain_type.extra_repr(self._as_plain())}, {self._mask_repr()}"  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        self.plain_type.reset_parameters(self._as_plain())
        self._reset_masks()  # type: ignore[attr-defined]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # torch asks hasattr(self, name), which computes the masked weight, or raises when no task is active.
        if name in ("weight", "bias") and (param is None or isinstance(param, nn.Parameter)):
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)  # type: ignore[misc]

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        return cast(Tensor, self._parameters["weight"]), self._parameters["bias"]

    @property
    def weight(self) -> Any:
        return functional.masked_weight(self._shared()[0], self._active()[0], **self._gate())  # type: ignore[attr-defined]

    @property
    def bias(self) -> Any:
        bias, logits = self._shared()[1], self._active()[1]  # type: ignore[attr-defined]
        return None if bias is None else functional.masked_weight(bias, logits, **self._gate())  # type: ignore[attr-defined]


class ReadThroughLinear(_ReadThrough, MaskedLinear):  # type: ignore[misc, override]
    """A MaskedLinear inside a module that reads its ``weight`` (``MultiheadAttention``'s ``out_proj``)."""


class ReadThroughConv2d(_ReadThrough, MaskedConv2d):  # type: ignore[misc, override]
    """A MaskedConv2d inside a module that reads its ``weight``."""


def _check_mask_init(mask_init: MaskInit) -> None:
    if not (mask_init == "normal" or callable(mask_init)):
        try:
            float(mask_init)
        except (TypeError, ValueError):
            raise ValueError(f"mask_init must be 'normal', a number or a function, got {mask_init!r}") from None
