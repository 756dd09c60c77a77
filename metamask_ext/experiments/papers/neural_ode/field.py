"""Fields of ordinary differential equations: a masked net as one, every trajectory with its own task, and counted evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from metamask_ext.nn.names import escape
from metamask_ext.nn.task_dict import TaskDict
from metamask_ext.nn.using_task import using_task


class TaskField(nn.Module):
    """``dy/dt = net(y)`` with the masks of a task, or of one for each row of ``y`` ``[B, d]``: one mixed-task batch a call.

    The adjoint method (Chen et al., arXiv:1806.07366, appendix B) calls the field again in its backward, whenever and wherever
    that runs: after the block around the forward has closed, inside the block of another task, in another thread. So the field
    opens its block itself, in each call; a block around the solver alone is refused there, since it might be another one by then.

    Args:
        net: a module with masked layers.
        task: as :class:`metamask_ext.using_task` takes it: a name, or one for each row.

    Attributes:
        evaluations: calls so far, those of backwards included.
    """

    def __init__(self, net: nn.Module, task: str | Sequence[str]):
        super().__init__()
        self.net, self.evaluations = net, 0
        self._names = [task] if isinstance(task, str) else list(dict.fromkeys(task))
        self._block = using_task(net, task)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        with self._block:
            return self.net(y)

    def adjoint_parameters(self) -> tuple[Tensor, ...]:
        """The tensors that the adjoint method gives gradients to: W, and the masks of the tasks of this field.

        By default it takes *all* parameters of the module: the masks of other tasks would get gradients of zero, not None, by
        which the momentum of an optimiser moves them, and the solver would carry them along.
        """
        owned = {
            id(tensor): None for module in self.net.modules() if isinstance(module, TaskDict) for tensor in module.parameters()
        }
        for module in self.net.modules():
            if isinstance(module, TaskDict):
                for name in self._names:
                    owned.pop(id(module._parameters.get(escape(name))), None)
        return tuple(tensor for tensor in self.net.parameters() if id(tensor) not in owned and tensor.requires_grad)


class Counted(nn.Module):
    """A field ``function(t, y)`` that counts its evaluations."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function, self.evaluations = function, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return self.function(t, y)
