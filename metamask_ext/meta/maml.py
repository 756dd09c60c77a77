"""Model-agnostic meta-learning, for masks and for weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import torch_private
from ..nn.names import describe
from ..torch_private import PyTree
from .adapted import Adapt, AdaptedModel, Output, Start
from .batch_norm import Statistics
from .steps import Rates, recomputed_steps, updated

Tree = TypeVar("Tree")
LossFunction = Callable[[Output, PyTree], Tensor]
Samples = tuple[Tensor, PyTree] | tuple[Tensor, PyTree, Tensor]

torch_private.load_vmap_decompositions()  # of operators without a rule of their own under vmap


class TaskParameters(dict[str, Tensor]):
    """The result of :meth:`MAML.adapt`: by name the adapted tensors ``[T, ...]``, one for each task.

    Attributes:
        statistics: with ``batch_norm="per task"`` mean and variance ``[T, C]`` of each batch norm, by name; else empty.
    """

    def __init__(self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics] = {}):
        super().__init__(tensors)
        self.statistics = dict(statistics)


class MAML(nn.Module):
    """Learns a start from which a model adapts to a new task in a few gradient steps on a few samples.

    For each task, from ``phi_0``, what is adapted of the model: ``phi_k+1 = phi_k - lr * dL(support; phi_k)/dphi``; the meta-loss
    is the mean over tasks of ``L(query; phi_n)``, a function of ``phi_0`` and of everything else that is learned. Source: Finn,
    Abbeel and Levine, arXiv:1703.03400, algorithm 2. This library adds ``adapt="masks"``: it adapts only ``M`` of
    ``theta = W * g(M)`` (Blum and Law, EE5239 proposal, eq. 3), while the tasks share a meta-learned ``W``.

    All tasks run at once. When only masks of masked layers are adapted, their samples are one mixed-task batch
    (:func:`metamask_ext.task_masked_linear`): its first dimension holds samples of several tasks, which the model must treat one by
    one (batch norm aside). Otherwise the model runs under ``torch.vmap``, on one task's samples.

    The parameters of this module are the model's, and ``inner_lr`` if it is learned. Those that require grad are meta-learned.

    Args:
        model: any module that takes a tensor whose first dimension is that of samples. Dropout draws for each sample by itself.
        inner_lr: the rate of the inner steps.
        inner_steps: their number, 0 or more.
        adapt: ``"masks"``: the masks of the weights and biases of masked layers; ``"weights"``: every other parameter (of what
            belongs to tasks, that of ``start``); ``"all"``: both; or a function of a parameter's name, as in
            ``named_parameters()`` of the model without wrappers, that says whether it is adapted.
        first_order: take the inner gradients as constants (arXiv:1703.03400, section 5.2): no graph of the inner steps is kept.
        learn_inner_lr: make ``inner_lr`` a parameter, a rate for each adapted tensor (as Antoniou et al., arXiv:1810.09502,
            section 4, for each layer).
        checkpoint: compute inner steps again in the backward: its memory does not grow with their number, its time does
            (:func:`metamask_ext.meta.steps.recomputed_steps`). The meta-gradient cannot be differentiated again then.
        start: of a model with several tasks, the name of that whose masks are ``phi_0``; or ``{task: alpha}``: masks whose gate is
            ``sum_t alpha_t g(M_t)``, as :func:`metamask_ext.add_task` makes them of known tasks (packed ones too), differentiable
            for the masks and for coefficients that are tensors. None: the model's only task.
        batch_norm: ``"batch"``: each task is normalised by the statistics of its own samples, support or query, as in
            arXiv:1703.03400; ``"frozen"``: by the running statistics; ``"per task"``: support as in ``"batch"``, and queries by the
            statistics of their task's support set under the adapted parameters, so that a prediction does not depend on the other
            queries. In all three, in training mode too, running statistics are not changed. Batch norms of the model become
            subclasses of what they were, in place.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or selects nothing; an unknown task; packed masks; a batch norm that
            the policy does not fit.
    """

    inner_lr: nn.Parameter | float

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float,
        inner_steps: int = 1,
        adapt: Adapt = "masks",
        first_order: bool = False,
        learn_inner_lr: bool = False,
        checkpoint: bool = False,
        *,
        start: Start | None = None,
        batch_norm: str = "batch",
    ):
        super().__init__()
        _check_steps("inner_steps", inner_steps)
        self._adapted = AdaptedModel(model, adapt, start, batch_norm)
        self.model = model
        self.inner_steps, self.first_order, self.checkpoint = inner_steps, first_order, checkpoint
        first = self._adapted.first()
        if learn_inner_lr:
            with torch.inference_mode(False):
                rates = torch.full((len(first),), float(inner_lr), dtype=first[0].dtype, device=first[0].device)
            self.inner_lr = nn.Parameter(rates)
        else:
            self.inner_lr = float(inner_lr)

    @property
    def adapted_names(self) -> list[str]:
        """The names of the adapted tensors, in the order of a learned ``inner_lr``."""
        return list(self._adapted.names)

    def forward(self, loss_fn: LossFunction, support: Samples, query: Samples) -> Tensor:
        """The meta-loss: the mean over tasks of the loss on ``query`` after adaptation to ``support``, a scalar.

        Args:
            loss_fn: ``loss_fn(prediction, target)``, a scalar for one task, whatever its reduction; torch.vmap applies it to all.
            support, query: ``(x, y)`` with ``x`` ``[T, K, ...]`` and ``y`` ``[T, K, ...]`` (or a tree of such tensors); or
                ``(x, y, weights)`` with ``weights`` ``[T, K]``: a task's loss is then ``sum_k w_k l_k / sum_k w_k`` with
                ``l_k`` that of sample ``k`` alone. Sets of several sizes are padded, with weight 0.

        Raises:
            TypeError, ValueError: of another form, or of different numbers of tasks; weights that are negative, or all zero for a
                task; a loss that is no scalar; a parameter that is to be adapted but that the loss does not depend on.
            RuntimeError: from the model, if its output or a layer's input does not have a sample for each of ``x``.
        """
        x, y, weights = _checked("query", query)
        parameters = self.adapt(loss_fn, support)
        tasks = len(next(iter(parameters.values())))
        if len(x) != tasks:
            raise ValueError(f"query must have the tasks of support, {tasks}, got {len(x)}")
        statistics = parameters.statistics or None
        prediction, _ = self._adapted.run(list(parameters.values()), x, weights, statistics)
        return _losses(loss_fn, prediction, y, weights).mean()

    def adapt(
        self, loss_fn: LossFunction, support: Samples, *, steps: int | None = None, parameters: TaskParameters | None = None
    ) -> TaskParameters:
        """Each task's parameters after the inner steps, differentiable for the meta-parameters unless grad mode is off.

        Under ``torch.inference_mode`` it leaves that mode, runs in no-grad mode, and copies the inference tensors that it gets.

        Args:
            loss_fn, support: as in :meth:`forward`.
            steps: how many, instead of ``inner_steps``.
            parameters: those of an earlier call with the same tasks, from which to continue; None: the start.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                kept = None if parameters is None else TaskParameters(_outside(dict(parameters)), _outside(parameters.statistics))
                return self.adapt(loss_fn, _outside(support), steps=steps, parameters=kept)
        x, y, weights = _checked("support", support)
        if steps is None:
            steps = self.inner_steps
        else:
            _check_steps("steps", steps)
        if parameters is None:
            state = [tensor.expand(len(x), *tensor.shape) for tensor in self._adapted.first()]
        else:
            state = self._given(parameters)
            if len(state[0]) != len(x):
                raise ValueError(f"support must have the tasks of parameters, {len(state[0])}, got {len(x)}")

        def gradients(state: list[Tensor], create_graph: bool) -> list[Tensor]:
            state = _graded(state)
            with torch.enable_grad():
                prediction, _ = self._adapted.run(state, x, weights)
                losses = _losses(loss_fn, prediction, y, weights)
            return self._gradients(losses, state, create_graph)

        rates = self._rates()
        second_order = torch.is_grad_enabled() and not self.first_order
        if second_order and self.checkpoint and steps:
            state = recomputed_steps(gradients, rates, steps, state, self._others(x, y, weights))
        else:
            for _ in range(steps):
                state = updated(state, gradients(state, second_order), rates)
        statistics: Mapping[str, Statistics] = {}
        if self._adapted.policy == "per task" and self._adapted.norms:
            statistics = self._adapted.run(state, x, weights, keep=True)[1]
        return TaskParameters(dict(zip(self._adapted.names, state)), statistics)

    def predict(self, parameters: TaskParameters, x: Tensor) -> Output:
        """The model's outputs ``[T, K, ...]`` for ``x`` ``[T, K, ...]``, each task with its parameters.

        Raises:
            TypeError, ValueError: no parameters of :meth:`adapt`, or ``x`` of another number of tasks.
        """
        state = self._given(parameters)
        x, _, _ = _checked("x", (x, ()))
        if len(x) != len(state[0]):
            raise ValueError(f"x must have the tasks of parameters, {len(state[0])}, got {len(x)}")
        return self._adapted.run(state, x, None, parameters.statistics or None)[0]

    def clone(self) -> Learner:
        """A learner of one task that is adapted step by step: see :class:`Learner`."""
        return Learner(self)

    def _rates(self) -> Rates:
        """The rate of each adapted tensor."""
        return self.inner_lr.unbind() if isinstance(self.inner_lr, Tensor) else [self.inner_lr] * len(self._adapted.names)

    def _gradients(self, loss: Tensor, state: list[Tensor], create_graph: bool) -> list[Tensor]:
        grads = torch.autograd.grad(loss, state, torch.ones_like(loss), create_graph=create_graph, allow_unused=True)
        unused = [name for name, grad in zip(self._adapted.names, grads) if grad is None]
        if unused:
            raise ValueError(f"adapt selects {describe(unused)}, on which the loss does not depend")
        return list(grads)

    def _given(self, parameters: TaskParameters) -> list[Tensor]:
        if not isinstance(parameters, TaskParameters) or list(parameters) != self._adapted.names:
            raise TypeError(f"parameters must be what adapt gave, got {type(parameters).__name__}")
        return list(parameters.values())

    def _others(self, *given: PyTree) -> list[Tensor]:
        """Every tensor that requires grad and that an inner step reads, beside the adapted ones."""
        leaves = [leaf for leaf in torch_private.tree_leaves(given) if isinstance(leaf, Tensor)]
        return [tensor for tensor in dict.fromkeys([*self.parameters(), *leaves]) if tensor.requires_grad]

    def extra_repr(self) -> str:
        lr = "learned" if isinstance(self.inner_lr, Tensor) else self.inner_lr
        order = "first" if self.first_order else "second"
        return f"inner_lr={lr}, inner_steps={self.inner_steps}, {order} order, {len(self._adapted.names)} tensors adapted"


class Learner:
    """One task of a :class:`MAML`, for code written for learn2learn or higher; slower, since it knows one task at a time.

    ``learner = maml.clone()``; then ``learner.adapt(loss_fn(learner(x), y))`` for each inner step, and the loss of
    ``learner(x_query)`` may be differentiated for the meta-parameters. The model's own parameters are not changed.

    Attributes:
        parameters: by name the adapted tensors.
    """

    def __init__(self, maml: MAML):
        if maml._adapted.policy == "per task" and maml._adapted.norms:
            raise ValueError("batch_norm='per task' needs support sets, which a learner does not see: use maml.adapt")
        self._maml = maml
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            self.parameters = {name: _alias(tensor) for name, tensor in zip(maml._adapted.names, maml._adapted.first())}

    def __call__(self, x: Tensor) -> Output:
        """The model's output for one task's samples ``[K, ...]``."""
        return self._maml._adapted.run_one(list(self.parameters.values()), x)[0]

    def adapt(self, loss: Tensor) -> None:
        """One inner step: ``phi <- phi - lr * dloss/dphi``, first order or second order as the MAML is.

        Raises:
            ValueError: the loss does not depend on an adapted parameter.
        """
        second_order = torch.is_grad_enabled() and not self._maml.first_order
        state = list(self.parameters.values())
        grads = self._maml._gradients(loss, state, second_order)
        self.parameters = dict(zip(self.parameters, updated(state, grads, self._maml._rates())))


def _outside(tree: Tree) -> Tree:
    """The same tree with copies of what was made under ``inference_mode``, which no gradient could pass; called outside it."""
    copied: Tree = torch_private.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, tree
    )
    return copied


def _alias(tensor: Tensor) -> Tensor:
    """The same values as no leaf: its gradient in an inner step is its own, also where the model reads the parameter elsewhere."""
    aliased = tensor.view_as(tensor) if torch.is_grad_enabled() else tensor.detach()
    return aliased if aliased.requires_grad else aliased.requires_grad_()


def _graded(state: list[Tensor]) -> list[Tensor]:
    """The same values, that require grad; without a way back where grad mode is off."""
    if torch.is_grad_enabled():
        return [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in state]
    return [tensor.detach().requires_grad_() for tensor in state]


def _losses(loss_fn: LossFunction, prediction: Output, y: PyTree, weights: Tensor | None) -> Tensor:
    """The loss of each task, ``[T]``."""
    if weights is None:
        return _mapped(loss_fn, prediction, y)

    def alone(prediction: Output, y: PyTree) -> Tensor:
        return loss_fn(*torch_private.tree_map(lambda tensor: tensor[None], (prediction, y)))

    each = torch.vmap(torch.vmap(alone, randomness="different"), randomness="different")(prediction, y)
    _check_scalar(each[:, 0], len(weights))
    return (each * weights).sum(1) / weights.sum(1)


def _mapped(loss_fn: LossFunction, prediction: Output, y: PyTree) -> Tensor:
    """``torch.vmap(loss_fn, randomness="different")``, less the 28 us that its wrapper takes (tests compare the two)."""
    leaves, tree = torch_private.tree_flatten((prediction, y))
    losses = torch_private.vmap(lambda *tensors: loss_fn(*torch_private.tree_unflatten(tensors, tree)), leaves)
    _check_scalar(losses, len(leaves[0]))
    return losses


def _check_scalar(losses: object, tasks: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (tasks,):
        got = f"shape {list(losses.shape[1:])}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must give a scalar for one task, got {got}")


def _check_steps(name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {steps!r}")


def _checked(name: str, samples: Samples) -> tuple[Tensor, PyTree, Tensor | None]:
    """``x``, ``y`` and the weights of a set of samples."""
    if not isinstance(samples, (tuple, list)) or len(samples) not in (2, 3):
        raise TypeError(f"{name} must be (x, y) or (x, y, weights), got {type(samples).__name__}")
    x, y, weights = (*samples, None)[:3]
    if not isinstance(x, Tensor):
        raise TypeError(f"x of {name} must be a tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"x of {name} must be [T, K, ...] with at least one task and sample, got shape {list(x.shape)}")
    for leaf in torch_private.tree_leaves(y) if not isinstance(y, Tensor) else (y,):
        if leaf.shape[:2] != x.shape[:2]:
            raise ValueError(f"y of {name} must be [T, K, ...] = {list(x.shape[:2])} as x, got shape {list(leaf.shape)}")
    if weights is not None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"weights of {name} must be a floating-point tensor, got {getattr(weights, 'dtype', type(weights))}")
        if weights.shape != x.shape[:2]:
            raise ValueError(f"weights of {name} must be [T, K] = {list(x.shape[:2])}, got shape {list(weights.shape)}")
        if bool((weights < 0).any()) or not bool((weights.sum(1) > 0).all()):
            raise ValueError(f"weights of {name} must not be negative, and not all zero for a task")
    return x, y, weights
