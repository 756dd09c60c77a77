"""The base of masked layers in tensor parallelism: where a weight is distributed, its masks are, in the same way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..ops.shards import is_distributed
from ..torch_private import distributes
from .names import escape
from .pairing import Memo, NamedModules
from .ranks import check_same_tasks, groups_of, of_first, placed_as
from .task_dict import CHANGES, TaskDict
from .task_layer import TaskLayer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ParallelLayer(TaskLayer):
    """A layer whose masks follow its ``weight`` and ``bias`` when these become DTensors.

    So torch's ``parallelize_module`` with ``ColwiseParallel`` or ``RowwiseParallel`` finds a layer with the parameters of a plain
    one. The masks are those of the first process of the mesh, as its weights are.
    """

    def named_modules(self, memo: Memo | None = None, prefix: str = "", remove_duplicate: bool = True) -> NamedModules:
        if distributes(sys._getframe(1)):
            # torch would take the holders of masks for layers, too.
            return iter([(prefix, self)])
        return super().named_modules(memo, prefix, remove_duplicate)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; and under a path (``masks.a``), by which ``ColwiseParallel`` names those of children."""
        holder, _, key = name.rpartition(".")
        if holder in self._modules and key in self._dicts()[holder]._slots:
            self._dicts()[holder].register_parameter(key, param)
            return
        self._registered(name, param, partial(super().register_parameter, name, param))

    def _registered(self, name: str, param: Tensor | None, register: Callable[[], object]) -> None:
        """Call ``register``, which makes ``param`` a parameter; where that is a DTensor, distribute its masks in the same way."""
        masks = self._masks_to_follow(name) if is_distributed(param) else None
        if masks is None:
            register()
            return
        like = cast("DTensor", param)
        packed = [task for task in masks if masks._is_bits(escape(task))]
        if packed:
            raise RuntimeError(
                f"{name} of {type(self).__name__} cannot be distributed: task {packed[0]!r} is packed, and a byte has the bits of "
                "eight weights, which may be those of two processes. Distribute the model before tasks are packed, or remove them"
            )
        if name == "weight":
            check_same_tasks(self, groups_of(like), f"a {type(self).__name__} cannot be distributed")
        register()
        for key, logits in list(masks._parameters.items()):
            if logits is not None and not is_distributed(logits):
                masks._parameters[key] = nn.Parameter(placed_as(logits.detach(), like), logits.requires_grad)
        CHANGES.note()

    def _masks_to_follow(self, name: str) -> TaskDict | None:
        """The masks of a parameter; None where there are none, or where they move on their own: under fully_shard."""
        if self._is_fsdp_managed_module:
            return None
        masks: TaskDict | None = self._modules.get("masks" if name == "weight" else f"{name}_masks")
        return masks

    def _drawn_beside(self, parameter: Tensor, dtype: torch.dtype, fill: Callable[[Tensor], object]) -> Tensor:
        """New logits beside a weight or bias, in its order in memory; beside a DTensor those that the first process draws.

        They are placed as it, and under fully_shard, which shards them in its own way, whole.
        """
        if not is_distributed(parameter):
            logits = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            fill(logits)
            return logits
        logits = torch.empty(parameter.shape, dtype=dtype, device=cast("DTensor", parameter).to_local().device)
        fill(logits)
        logits = of_first(logits, groups_of(parameter))
        return logits if self._is_fsdp_managed_module else placed_as(logits, parameter)
