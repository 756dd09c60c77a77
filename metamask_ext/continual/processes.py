"""The processes of a training loop: this one alone, or those that Lightning Fabric has started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ops.shards import is_distributed
from ..torch_private import tree_map
from .config import Batch, LoopConfig, TaskData

R = TypeVar("R")

_WHOLE_MODEL = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "XLAFSDPStrategy")
"""Strategies of Fabric that flatten parameters, or set up a model with all its optimisers at once; the loop has one a task."""


class Processes:
    """One process, with the model where it is."""

    is_first = True
    settings: Mapping[str, object] = {}
    """For a checkpoint to agree on."""

    def check(self, config: LoopConfig, tasks: Mapping[str, TaskData]) -> None:
        """Raise TypeError or ValueError, with nothing changed, unless these processes can train these tasks."""

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return ``model``, in place, or in a wrapper: to be called."""
        return model

    def stepping(self, optimizer: Optimizer) -> Optimizer:
        """Return what takes the steps of ``optimizer``."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def part(self, batch: Batch) -> Batch:
        """Return this process's samples of a pair of all."""
        return batch

    def moved(self, batch: Batch) -> Batch:
        """Return a batch where the model is."""
        return batch

    def mean(self, loss: float) -> float:
        return loss

    def first(self, function: Callable[[], R]) -> R:
        """Call a function in the first process; return its result, or raise its exception, in all."""
        return function()

    def check_same(self, drawn: int) -> None:
        """Raise RuntimeError, in all processes, unless all have drawn this number."""

    def gathered(self, state: R) -> R:
        """Return a state with whole tensors in the place of shards."""
        return state

    def sharded(self, state: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict with shards where those of ``like`` are."""
        return state

    def sharded_optimizer(self, state: dict[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """Return an optimiser's state with shards where those of its parameters are."""
        return state


class FabricProcesses(Processes):
    """The processes of a ``lightning.fabric.Fabric`` that was launched.

    Args:
        fabric: of one device, with ``DDPStrategy``, or with ``ModelParallelStrategy`` whose function calls ``fully_shard``.
    """

    def __init__(self, fabric: Any):
        for name in ("setup_module", "setup_optimizers", "backward", "broadcast", "to_device", "all_reduce", "strategy"):
            if not hasattr(fabric, name):
                raise TypeError(f"fabric must be a lightning.fabric.Fabric, got {type(fabric).__name__}")
        strategy = fabric.strategy
        kinds = {base.__name__ for base in type(strategy).__mro__}
        if taken := kinds.intersection(_WHOLE_MODEL):
            raise ValueError(
                f"fabric must have one device, DDPStrategy or ModelParallelStrategy, got {sorted(taken)[0]}: each task has an "
                "optimiser, of parameters that stay what they are. To shard: ModelParallelStrategy(parallelize_fn) that calls "
                "torch.distributed.fsdp.fully_shard"
            )
        if getattr(strategy.precision, "scaler", None) is not None:
            raise ValueError(
                "fabric must have a precision without loss scaling (32-true, bf16-mixed, …): a round has two optimisers"
            )
        self._fabric, self._strategy = fabric, strategy
        sampled: Mapping[str, int] = getattr(strategy, "distributed_sampler_kwargs", None) or {}
        self._parts, self._part = sampled.get("num_replicas", 1), sampled.get("rank", 0)
        self.is_first = fabric.global_rank == 0
        precision = getattr(strategy.precision, "precision", None)
        self.settings = {"fabric": f"{type(strategy).__name__} of {fabric.world_size} processes in {precision}"}

    def check(self, config: LoopConfig, tasks: Mapping[str, TaskData]) -> None:
        kinds = {base.__name__ for base in type(self._strategy).__mro__}
        options = getattr(self._strategy, "_ddp_kwargs", {})
        if "DDPStrategy" in kinds and config.per_task_masks and len(tasks) > 1 and not options.get("find_unused_parameters"):
            raise ValueError(
                "fabric's strategy must be DDPStrategy(find_unused_parameters=True): a round uses the masks of one task, and "
                "without it the others' would be waited for"
            )
        for name, data in tasks.items():
            if not callable(data):
                count = len(data[0]) if config.batch_size is None else config.batch_size
                if count % self._parts:
                    what = f"the samples of task {name!r}" if config.batch_size is None else "batch_size"
                    raise ValueError(f"{what} must be a multiple of the {self._parts} processes that share them, got {count}")

    def wrapped(self, model: nn.Module) -> nn.Module:
        wrapped: nn.Module = self._fabric.setup_module(model)
        return wrapped

    def stepping(self, optimizer: Optimizer) -> Optimizer:
        stepping: Optimizer = self._fabric.setup_optimizers(optimizer)
        return stepping

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def part(self, batch: Batch) -> Batch:
        if self._parts == 1:
            return batch
        x, y = batch
        count = len(x) // self._parts
        own = slice(self._part * count, (self._part + 1) * count)
        return x[own], y[own]

    def moved(self, batch: Batch) -> Batch:
        moved: Batch = self._fabric.to_device(batch)
        return moved

    def mean(self, loss: float) -> float:
        return float(self._fabric.all_reduce(torch.tensor(loss, dtype=torch.float64, device=self._fabric.device), reduce_op="mean"))

    def first(self, function: Callable[[], R]) -> R:
        if self._fabric.world_size == 1:
            return function()
        result: tuple[R | None, Exception | None] = None, None
        if self.is_first:
            try:
                result = function(), None
            except Exception as error:
                self._fabric.broadcast((None, error))
                raise
        found, failure = self._fabric.broadcast(result)
        if failure is not None:
            raise failure
        given: R = found
        return given

    def check_same(self, drawn: int) -> None:
        if self._fabric.world_size > 1 and len(set(self._fabric.all_gather(torch.tensor(drawn)).tolist())) > 1:
            raise RuntimeError(
                "the processes have drawn different random numbers: a function that gives a task's data must draw as many from its "
                "generator in each process"
            )

    def gathered(self, state: R) -> R:
        gathered: R = tree_map(lambda leaf: leaf.full_tensor() if is_distributed(leaf) else leaf, state)
        return gathered

    def sharded(self, state: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _as(value, like.get(key)) for key, value in state.items()}

    def sharded_optimizer(self, state: dict[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        own = list(parameters)
        entries = {index: {key: _as(value, own[index]) for key, value in kept.items()} for index, kept in state["state"].items()}
        return {**state, "state": entries}


def _as(value: Any, like: Any) -> Any:
    """Return a tensor as shards, where ``like`` is of its shape and has them."""
    if not is_distributed(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def processes_of(fabric: Any) -> Processes:
    """Return this process alone where ``fabric`` is None."""
    return Processes() if fabric is None else FabricProcesses(fabric)
