"""Elastic weight consolidation: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, arXiv:1612.00796."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp

from ..nn.names import describe
from ..nn.task_dict import TaskDict

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
CHUNK_NUMBERS = 2**25
"""Numbers of per-sample gradients that are held at once."""


class EWC:
    """Hold the parameters that earlier tasks need near the values that they had there (equation 3 of the paper).

    ``penalty() = strength / 2 * sum_k sum_i F_{k,i} * (theta_i - theta*_{k,i})^2`` over the tasks ``k`` that :meth:`remember` was
    called for: ``theta*_k`` are the parameters at that moment, ``F_k`` the importance given there. For EWC that is the diagonal of
    the Fisher information, :func:`fisher_diagonal`; with ones it is the L2 penalty that the paper compares with. Add it to the loss
    of the next tasks::

        ewc = EWC(model, strength=100.0)
        for name, (x, y) in tasks.items():
            with metamask_ext.using_task(model, name):
                ...  # train on loss(model(x), y) + ewc.penalty()
                ewc.remember(fisher_diagonal(model, x))

    In a masked model the parameters are W, which the tasks share: a task's masks move in its own training only, and need none.

    The quadratics of all tasks are kept as one, ``sum_k F_k (theta - theta*_k)^2 = A (theta - c)^2 + r``, exactly: memory is two
    tensors a parameter, and a step costs the same, for any number of tasks.

    Args:
        model: any module, on its device. Its parameters must stay the same objects.
        strength: ``lambda``, at least 0.
        parameters: names of ``model.named_parameters()``; None: all that require gradients and that no task owns.

    Attributes:
        strength: as given; may be changed.
        parameters: by name.
        tasks: how many were remembered.

    Raises:
        ValueError: ``strength`` is negative or not finite, a name is unknown, or no parameter is left.
    """

    def __init__(self, model: nn.Module, strength: float, parameters: Iterable[str] | None = None):
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and at least 0, got {strength}")
        self.strength, self.parameters, self.tasks = strength, _chosen(model, parameters), 0
        self._importance: dict[str, Tensor] = {}
        self._center: dict[str, Tensor] = {}
        self._rest: Tensor | float = 0.0

    @torch.no_grad()
    def remember(self, importance: Mapping[str, Tensor]) -> None:
        """Hold the parameters near their present values from now on, each entry as much as ``importance`` says.

        Args:
            importance: by name, for each of ``parameters`` a tensor of its shape: finite numbers of at least 0.

        Raises:
            ValueError: a name is missing or unknown, a shape is another, or a number is negative or not finite; nothing changes.
        """
        if importance.keys() != self.parameters.keys():
            raise ValueError(f"importance must have {describe(self.parameters)}, got {describe(importance)}")
        for name, tensor in importance.items():
            if tensor.shape != self.parameters[name].shape:
                raise ValueError(f"importance[{name!r}] must be {list(self.parameters[name].shape)}, got {list(tensor.shape)}")
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"importance[{name!r}] must be finite and at least 0, got a number that is not")
        for name, parameter in self.parameters.items():
            kept = _computed(parameter)
            added, now = importance[name].detach().to(kept), kept.detach().clone()
            if name not in self._center:
                self._importance[name], self._center[name] = added.clone(), now
                continue
            before, center = self._importance[name], self._center[name]
            total = before + added
            # Where nothing is held yet the center is free; it goes to where the parameter is.
            share = torch.where(total > 0, added / total, 1.0)
            self._rest = self._rest + (before * share * (now - center).square()).sum()
            self._importance[name], self._center[name] = total, center + share * (now - center)
        self.tasks += 1

    def penalty(self) -> Tensor:
        """The term to add to the loss, 0-dimensional; 0 before the first :meth:`remember`."""
        if not self.tasks:
            return next(iter(self.parameters.values())).new_zeros(())
        total: Tensor | float = self._rest
        for name, parameter in self.parameters.items():
            distance = _computed(parameter) - self._center[name]
            total = total + (self._importance[name] * distance * distance).sum()
        assert isinstance(total, Tensor)
        return 0.5 * self.strength * total


def fisher_diagonal(
    model: nn.Module,
    x: Tensor,
    likelihood: str = "categorical",
    *,
    parameters: Iterable[str] | None = None,
    draws: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information of ``model`` at its parameters, over the inputs ``x``.

    ``F_i = mean_x E_{y ~ p(y | x, theta)} (d log p(y | x, theta) / d theta_i)^2``: squares of the gradients of *single samples*,
    with
    labels as the model gives them (arXiv:1612.00796, section 2). The square of a batch's gradient is another number, and squares
    at the labels of the data (the "empirical" Fisher information) are too. Exact: the expectation is the sum over ``k`` of
    ``w_k (d h_k / d theta_i)^2``, with the outputs' ``h`` and ``w`` below.

    | likelihood | y given the output f | h | w |
    |---|---|---|---|
    | ``categorical`` | class c with ``softmax(f)_c``; f ``[n, C]`` | ``log_softmax(f)`` | ``softmax(f)`` |
    | ``gaussian`` | normal, mean f, variance 1 | ``f`` | 1 |
    | ``bernoulli`` | each 1 with ``sigmoid(f)`` | ``f`` | ``sigmoid(f) (1 - sigmoid(f))`` |

    Costs one backward per sample and output, by ``torch.func``'s vmap of vjp. The model is evaluated in ``eval`` mode.

    Args:
        model: called with ``[1, ...]``. A masked one with several tasks inside a :class:`metamask_ext.using_task` block of one
            task.
        x: inputs ``[n, ...]``, at least one.
        likelihood: see above.
        parameters: names of ``model.named_parameters()``; None: all that require gradients and that no task owns.
        draws: None: exact. Else an unbiased estimate from so many backwards per sample: those of ``sum_k e_k sqrt(w_k) h_k`` with
            random signs ``e``, for models with many outputs.
        generator: of the signs; None: torch's global one.

    Returns:
        By name, a tensor of each parameter's shape; of its dtype, float32 for parameters of 16 bits.

    Raises:
        ValueError: an unknown likelihood or name, no input, ``draws`` below 1, or an output that is not of the likelihood.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    if x.dim() < 1 or len(x) == 0:
        raise ValueError(f"x must be [n, ...] with at least one sample, got shape {list(x.shape)}")
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be None or at least 1, got {draws}")
    theta = {name: parameter.detach() for name, parameter in _chosen(model, parameters).items()}

    def scores(theta: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
        return _scores(functional_call(model, theta, (sample[None],)), likelihood)

    def of_sample(sample: Tensor, signs: Tensor) -> dict[str, Tensor]:
        _, pull, *weights = vjp(lambda theta: scores(theta, sample), theta, has_aux=True)
        rows = signs * weights[0].sqrt()
        (gradients,) = torch.vmap(pull)(rows.to(weights[0].dtype))
        return {name: gradient.square().sum(0) for name, gradient in gradients.items()}

    with _evaluated(model):
        with torch.no_grad():
            outputs = len(scores(theta, x[0])[0])
        rows = outputs if draws is None else draws
        together = max(1, CHUNK_NUMBERS // max(1, rows * sum(tensor.numel() for tensor in theta.values())))
        found: dict[str, Tensor] = {}
        for some in x.split(together):
            if draws is None:
                signs = torch.eye(outputs, device=x.device).expand(len(some), -1, -1)
            else:
                drawn = torch.randint(2, (len(some), draws, outputs), generator=generator)
                signs = ((2 * drawn - 1) / draws**0.5).to(x.device)
            with torch.no_grad():
                squares = torch.vmap(of_sample)(some, signs)
            for name, square in squares.items():
                part = _computed(square).sum(0)
                found[name] = found[name] + part if name in found else part
    return {name: total / len(x) for name, total in found.items()}


def _scores(output: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """``h`` and ``w`` of a single sample's output ``[1, ...]``, one-dimensional each."""
    if not isinstance(output, Tensor) or output.shape[:1] != (1,):
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model must give a tensor [1, ...] for one sample, got {got}")
    if likelihood == "categorical":
        if output.dim() != 2:
            raise ValueError(f"for likelihood='categorical' the model must give [n, C], got {output.dim()} dimensions")
        logs = F.log_softmax(output[0], 0)
        return logs, logs.detach().exp()
    flat = output.flatten()
    if likelihood == "gaussian":
        return flat, torch.ones_like(flat)
    on = torch.sigmoid(flat.detach())
    return flat, on * (1 - on)


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of these names; by default those that require gradients and that no task owns."""
    known = dict(model.named_parameters())
    if names is None:
        owned = {id(tensor) for module in model.modules() if isinstance(module, TaskDict) for tensor in module.parameters()}
        chosen = {name: tensor for name, tensor in known.items() if tensor.requires_grad and id(tensor) not in owned}
    else:
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"parameters must name parameters of the model, got {unknown[0]!r}")
        chosen = {name: known[name] for name in names}
    if not chosen:
        raise ValueError("parameters must be at least one: the model has none that require gradients and that no task owns")
    return chosen


def _computed(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype that is computed in: float32 for 16 bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
