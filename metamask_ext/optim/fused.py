"""The common part of the optimisers whose update of masked layers happens inside the backward."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from metamask_ext.loss_scale import is_scaled
from metamask_ext.nn.masked_layer import MaskedLayer
from metamask_ext.nn.names import escape
from metamask_ext.nn.paths import plain_path
from metamask_ext.nn.task_dict import CHANGES, TaskDict
from metamask_ext.nn.tasks import tasks
from metamask_ext.nn.wrappers import averaged_parameters, is_sharded, place_shards
from metamask_ext.ops.streams import Streams
from metamask_ext.ops.weight.autograd import State, Steps
from metamask_ext.ops.weight.raw import Rule
from metamask_ext.torch_private import has_global_step_hooks, has_gradient_hooks

from .graph import Node, walk
from .use import MaskUse


class FusedOptimizer(torch.optim.Optimizer):
    """An optimiser of torch, its next base class, that takes its step inside the backward where it can.

    A subclass says which step: its rule, what it keeps of a parameter, its numbers, and where only torch's step will do. Its own
    ``__init__`` gives torch's the groups of :meth:`_groups_of`, and then calls :meth:`_begin`.
    """

    model: nn.Module
    _rule: Rule
    _no_step: tuple[float, ...]
    """Numbers in the place of those of a parameter that takes no step in the backward."""
    _options: tuple[str, ...]
    """Options that a group of a state dict has if it is of this kind of optimiser."""

    _has_other_step = False
    """A subclass has a ``step`` of its own."""
    _cpu_only: bool
    """The op that takes the step runs on the CPU only."""

    @abstractmethod
    def _numbers(self, group: StateDict) -> tuple[float, ...] | None:
        """The numbers of a step, as the op takes them; None if the group has options that only torch's step knows."""

    @abstractmethod
    def _kept(self, parameter: Tensor, group: StateDict) -> State | None:
        """The state of a parameter, as the op takes it; begun as torch begins it."""

    def _groups_of(
        self, model: nn.Module, weight_decay: float, mask_weight_decay: float, by_use: bool, **numbers: float
    ) -> list[StateDict]:
        """Check the model and the numbers; returns the groups of what all tasks share and of the masks."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not any(isinstance(module, MaskedLayer) for module in model.modules()):
            raise ValueError(f"model must have a masked layer, got a {type(model).__name__} without one")
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "model must not hold a DistributedDataParallel: give the module that it wraps. Where a wrapper averages gradients, "
                "they are stored, and the step is an ordinary one"
            )
        checked = {**numbers, "weight_decay": weight_decay, "mask_weight_decay": mask_weight_decay}
        for name, number in checked.items():
            if not number >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {number!r}")
        self.model, self._scales_by_use = model, bool(by_use)
        place_shards(model)
        shared, masks = _parameters(model)
        if not masks:
            raise ValueError("model must have a task, got one without masks")
        return [
            {"params": list(shared.items()), "weight_decay": weight_decay},
            {"params": list(masks.items()), "weight_decay": mask_weight_decay},
        ]

    def _begin(self) -> None:
        self._is_sharded = is_sharded(self.model.modules())
        self._remember()
        self._use = MaskUse(self.model) if self._scales_by_use else None
        # Not by a step of our own around torch's: each of the two would call the hooks of users.
        self.register_step_pre_hook(_find_new_tasks)
        self.register_step_pre_hook(_scale_masks)
        self.register_step_post_hook(_keep_outside)

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "model": self.model, "_scales_by_use": self._scales_by_use}

    def __setstate__(self, state: StateDict) -> None:
        set_state: Callable[[StateDict], None] = super().__setstate__
        set_state(state)
        if "model" in state:  # a copy; torch also calls this when it loads a state dict
            self._begin()

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Differentiate ``loss`` and take one step; afterwards no parameter has a gradient.

        Args:
            loss: a scalar with a graph; or any tensor, with ``gradient``.
            gradient: of what comes after ``loss``, as in :meth:`torch.Tensor.backward`.

        Raises:
            TypeError, ValueError: ``loss`` is no tensor, has no graph, is no scalar while ``gradient`` is None, or is scaled by a
                ``torch.amp.GradScaler``; nothing has changed.
            RuntimeError: ``fully_shard`` took the model after the optimiser was made; nothing has changed. Or from inside the
                backward: layers that come later in the model may have taken their step already.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if loss.grad_fn is None:
            raise ValueError("loss must depend on a parameter, got a tensor without a graph")
        if gradient is None and loss.numel() != 1:
            raise ValueError(f"loss must be a scalar where no gradient is given, got shape {list(loss.shape)}")
        if is_scaled(loss.grad_fn):
            raise ValueError(
                "loss must not be scaled, got one that a GradScaler scaled: the step would not take its factor out again. Give the "
                "unscaled loss (bfloat16 needs no scaling), or call scaler.scale(loss).backward() and scaler.step(optimizer)"
            )
        nodes = self._fused_nodes(loss.grad_fn)
        try:
            for node, steps in nodes:
                node.steps = steps
            torch.autograd.backward(loss, gradient)
        finally:
            for node, _ in nodes:
                del node.steps
            # A node steps on the stream of its forward, and gives autograd no gradient to wait for. All note it in one place.
            for _, steps in nodes[:1]:
                steps.streams.wait()
        self._find_new_tasks()
        left = [parameter for group in self._groups for parameter in group["params"] if parameter.grad is not None]
        if left or self._is_watched():
            self.step()
            for parameter in left:
                parameter.grad = None

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls._has_other_step = cls._has_other_step or "step" in vars(cls)

    def _is_watched(self) -> bool:
        """True if someone else's code runs in a step: then torch's is called without a gradient too, or it would not know of it.

        A call that finds nothing to do takes as long as a small layer's backward.
        """
        own = (_find_new_tasks, _scale_masks, _keep_outside)
        hooks = (*self._optimizer_step_pre_hooks.values(), *self._optimizer_step_post_hooks.values())
        others = self._has_other_step or "step" in self.__dict__ or any(hook not in own for hook in hooks)
        # To scale masks is for all processes at once, whether this one has gradients or not.
        return others or self._use is not None or has_global_step_hooks()

    @property
    def param_groups(self) -> list[StateDict]:
        """The parameter groups, with the parameters that the model has now, also for code that reads them before a step
        (``GradScaler.unscale_``, gradient clipping)."""
        if self.__dict__.get("_changes", CHANGES.count) != CHANGES.count:
            self._find_new_tasks()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[StateDict]) -> None:
        self.__dict__["param_groups"] = groups  # where torch's __setstate__ puts them too

    @property
    def _groups(self) -> list[StateDict]:
        groups: list[StateDict] = self.__dict__["param_groups"]
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._find_new_tasks()
        if self._use is not None:
            self._use.forget()
        super().zero_grad(set_to_none)

    def state_dict(self) -> StateDict:
        self._find_new_tasks()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state as torch does, but refuse one of another optimiser, or of parameters with other names or in another order.

        Names are those of the plain model. The names that torch gives the parameters of a wrapped model (``_orig_mod.…``), as
        earlier versions saved them, are read too.
        """
        self._find_new_tasks()
        state_dict = self._by_plain_names(state_dict)
        for index, (ours, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            missing = [option for option in self._options if option not in theirs]
            if missing:
                raise ValueError(
                    f"state_dict must be that of a {type(self).__name__}, got one whose group {index} has no {', '.join(missing)}"
                )
            names = theirs.get("param_names")
            if names is not None and names != ours["param_names"]:
                differing = set(names) ^ set(ours["param_names"])
                which = f"{sorted(differing)} are in one only" if differing else "the order differs"
                raise ValueError(f"state_dict must have the model's parameters in group {index}, got others: {which}")
        super().load_state_dict(state_dict)
        _keep_outside(self)
        self._remember()

    def _by_plain_names(self, state_dict: StateDict) -> StateDict:
        """The state with our names in the groups whose names are those that torch gives the same parameters."""
        plain = {name: plain_path(self.model, name) for name, _ in self.model.named_parameters()}
        groups = list(state_dict["param_groups"])
        for index, (ours, theirs) in enumerate(zip(self.param_groups, groups)):
            if [plain.get(name, name) for name in theirs.get("param_names") or ()] == ours["param_names"]:
                groups[index] = {**theirs, "param_names": list(ours["param_names"])}
        return {**state_dict, "param_groups": groups}

    def _remember(self) -> None:
        """Keep the parameters that :meth:`_find_new_tasks` compares with, and each parameter's group."""
        changes = CHANGES.count
        self._group_of = {parameter: group for group in self._groups for parameter in group["params"]}
        self._of_model = set(self.model.parameters())
        self._masks = [module for module in self.model.modules() if isinstance(module, TaskDict)]
        self._seen = self._fingerprint()
        self._changes = changes

    def _fingerprint(self) -> list[tuple[int, int]]:
        # A task that is added becomes the last one. Parameters that were seen are alive in param_groups: no id is used twice.
        return [(len(masks._parameters), id(next(reversed(masks._parameters.values()), None))) for masks in self._masks]

    def _find_new_tasks(self) -> None:
        changes = CHANGES.count
        is_known = changes == self.__dict__.get("_changes")
        if self._is_sharded:
            # The registered parameters of a sharded model are by turns sharded and gathered ones.
            if not is_known:
                place_shards(self.model)
                self._update_groups()
        elif not is_known or self._fingerprint() != self._seen:
            self._update_groups()
        self._changes = CHANGES.count

    def _update_groups(self) -> None:
        """Take up parameters that the model has got since, and let go of those it has lost."""
        if not self._is_sharded and is_sharded(self.model.modules()):
            raise RuntimeError("the model was sharded after its optimiser was made: make the optimiser after fully_shard")
        shared, masks = _parameters(self.model)
        names: dict[Tensor, str] = {parameter: name for found in (shared, masks) for name, parameter in found.items()}
        for group in self._groups:
            # A group that the user added may hold parameters of no module here.
            kept = [
                (parameter, name)
                for parameter, name in zip(group["params"], group["param_names"])
                if parameter in names or parameter not in self._of_model
            ]
            group["params"], group["param_names"] = [parameter for parameter, _ in kept], [name for _, name in kept]
        known: set[Tensor] = {parameter for group in self._groups for parameter in group["params"]}
        for group, found in zip(self._groups, (shared, masks)):
            for name, parameter in found.items():
                if parameter not in known:
                    group["params"].append(parameter)
                    group["param_names"].append(name)
        known = {parameter for group in self._groups for parameter in group["params"]}
        for gone in [parameter for parameter in self.state if parameter not in known]:
            del self.state[gone]
        self._remember()

    def _fused_nodes(self, root: Node) -> list[tuple[Node, Steps]]:
        """The masked layers' nodes of the graph that can update parameters, with the steps they are to take."""
        if self._is_sharded:
            return []
        uses, nodes = walk(root)
        # Not for an input that requires a gradient: looking through the model costs as much as a small step.
        if any(isinstance(variable, nn.Parameter) and variable not in self._group_of for variable in uses):
            self._update_groups()
        # Two parameters over one memory: an update of one changes what the other's backward reads, and no version counter shows it.
        pointers = [variable.data_ptr() for variable in uses]
        if len(set(pointers)) < len(pointers):
            memory = Counter(pointers)
            uses = {variable: max(count, memory[pointer]) for (variable, count), pointer in zip(uses.items(), pointers)}
        # A wrapper takes the gradient from where autograd stores it, and gives back the mean.
        for averaged in averaged_parameters():
            uses = {variable: count for variable, count in uses.items() if variable not in averaged}
        numbers = {id(group): self._numbers(group) for group in self._groups}
        found = []
        streams = Streams()
        for node, variables in nodes:
            taken, states, settings = [], [], []
            for variable in variables:
                group = self._group_of.get(variable) if self._can_update(node, variable, uses) else None
                its = None if group is None else numbers[id(group)]
                taken.append(its is not None)
                states.append(None if variable is None or group is None or its is None else self._kept(variable, group))
                settings.append(self._no_step if its is None else its)
            if any(taken):
                steps = Steps(self._rule, tuple(taken), tuple(states), tuple(settings), tuple(variables), streams)
                found.append((node, steps))
        return found

    def _can_update(self, node: Node, variable: Tensor | None, uses: dict[Tensor, int]) -> bool:
        # Not a tensor of another class (DTensor), which has its memory elsewhere.
        if variable is None or type(variable) not in (nn.Parameter, Tensor):
            return False
        if uses.get(variable) != 1 or not is_dense(variable) or not getattr(node, "same_order", True):
            return False
        return variable.grad is None and not has_gradient_hooks(variable) and (variable.is_cpu or not self._cpu_only)

    def _in_order(self, state: StateDict, parameter: Tensor, name: str) -> Tensor:
        """A tensor of a parameter's state in its memory order, in which a step walks through both; zeros where there is none yet.

        The order differs in a checkpoint, or after the model has taken another memory format.
        """
        kept: Tensor | None = state.get(name)
        if kept is None:
            kept = state[name] = torch.zeros_like(parameter, requires_grad=False)
        elif kept.stride() != parameter.stride() and kept.shape == parameter.shape:
            kept = torch.empty_like(parameter, dtype=kept.dtype, requires_grad=False).copy_(kept)
            state[name] = kept
        return kept


def is_dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _find_new_tasks(optimizer: FusedOptimizer, *_: object) -> None:
    optimizer._find_new_tasks()


def with_gradients(
    optimizer: FusedOptimizer, args: tuple[Any, ...], options: dict[str, Any], act: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call ``act`` before a step, once the gradients are there: those of a closure come within the step."""
    closure: Callable[[], Any] | None = options.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        act()
        return None

    def then_act() -> Any:
        loss = closure()
        act()
        return loss

    return (optimizer, then_act), {}


def _scale_masks(
    optimizer: FusedOptimizer, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    use = optimizer._use
    return None if use is None else with_gradients(optimizer, args, options, partial(use.scale, optimizer.model))


def _keep_outside(optimizer: FusedOptimizer, *_: object) -> None:
    """Put copies in the place of momentum that was made under ``inference_mode``: a later step writes to it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            for state in optimizer.state.values():
                state.update(
                    {key: value.clone() for key, value in state.items() if isinstance(value, Tensor) and value.is_inference()}
                )


def _parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that all tasks share, and the masks, by name; the masks task after task, so that a new task's come last."""
    names = {parameter: plain_path(model, name) for name, parameter in model.named_parameters()}
    of_tasks = [module for module in model.modules() if isinstance(module, TaskDict)]
    found = {task: [tensors._parameters.get(escape(task)) for tensors in of_tasks] for task in tasks(model)}
    masks = {names[parameter]: parameter for of_task in found.values() for parameter in of_task if parameter is not None}
    return {name: parameter for parameter, name in names.items() if name not in masks}, masks
