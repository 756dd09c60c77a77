"""New tasks of a model whose parameters ``fully_shard`` holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..ops.shards import whole
from ..torch_private import FsdpPlace, fsdp_places
from .names import escape
from .task_dict import TaskDict
from .task_layer import TaskLayer
from .wrappers import place_shards


class Shards:
    """The places of the parameters of a model, for those of one more task.

    Args:
        model: the module that ``fully_shard`` was called on, or one around it. Its shards are put in their places.
        layers: those that get the task.
        what: cannot be done, for messages.

    Raises:
        RuntimeError: ``fully_shard`` was called on a module around ``model``; a group trains parameters of another dtype; or the
            parameters are FullyShardedDataParallel's.
    """

    def __init__(self, model: nn.Module, layers: Iterable[TaskLayer], what: str):
        place_shards(model)
        places = fsdp_places(model)
        self._found: dict[TaskDict, FsdpPlace] = {}
        self._added: list[tuple[FsdpPlace, TaskDict, str]] = []
        for layer in layers:
            for tensors, beside in layer._beside():
                held = [places.get((tensors, key)) for key in tensors._parameters]
                found = next(filter(None, [*held, places.get(beside)]), None)
                if found is not None:
                    self._found[tensors] = found
                elif not tensors._only_buffers:
                    raise RuntimeError(
                        f"{what} to a {type(layer).__name__} of a sharded model: no fully_shard in this {type(model).__name__} "
                        "holds its parameters. Give the module that fully_shard was called on (the parameters of "
                        "FullyShardedDataParallel, and ignored ones, take no new tasks)"
                    )
        self._what = what

    def check_dtypes(self, new: Iterable[tuple[TaskDict, Tensor]]) -> None:
        """RuntimeError if a group would train parameters of two dtypes."""
        for tensors, tensor in new:
            found = self._found.get(tensors)
            trained = set() if found is None else found.trained_dtypes()
            if not trained <= {tensor.dtype}:
                raise RuntimeError(
                    f"{self._what}: its masks are {tensor.dtype}, and fully_shard trains parameters of {trained} with them"
                )

    def add(self, tensors: TaskDict, name: str, tensor: Tensor) -> None:
        """Put in a task's tensor, a DTensor or a buffer."""
        place = self._found.get(tensors)
        if place is None or tensors._only_buffers:
            tensors._put(name, tensor)
            return
        tensors._put(name, whole(tensor))
        self._added.append((place, tensors, escape(name)))
        place.add(tensors, escape(name), tensors[name].detach())

    def undo(self) -> None:
        """Let the groups forget what was added."""
        for place, tensors, key in self._added:
            place.remove(tensors, key)
