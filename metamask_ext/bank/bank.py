"""MaskBank: the tasks of a model in one place, made, packed, mixed, inferred and saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..files.lock import ThreadLock
from ..nn import tasks as model_tasks
from ..nn.names import describe, escape, plain
from ..nn.selection import Superposition
from ..nn.task_layer import task_layers
from ..nn.using_task import using_task
from ..nn.wrappers import check_whole
from . import folder
from .counts import Sums
from .index import BankError
from .inference import infer
from .mappings import OF_PROCESS, Mappings
from .per_task import keep_matching, per_task_names
from .store import Store


class MaskBank:
    """The tasks of a model with masked layers: shared weights, a mask for each task, and bits for each task that is finished.

    The tasks are the model's own (:func:`metamask_ext.tasks`, ``add_task``, ``using_task`` mean the same ones); several banks of
    one model see the same tasks. To run a mixed-task batch: ``with using_task(bank.model, names): y = bank.model(x)``.

    ``per_task`` names what else must belong to a task (a head, batch-norm statistics): shared, it would fit the task trained last,
    and the accuracy of earlier tasks would fall to chance. Such a tensor ``head.weight`` becomes ``head.per_task.weight.<task>``, a
    parameter for each task (the first keeps the tensor that is there), and ``model.head.weight`` is the active task's: build
    optimisers afterwards.

    Args:
        model: a module with masked layers.
        per_task: glob patterns of names of parameters and buffers (``"head.*"``). :class:`metamask_ext.nn.TaskBatchNorm2d` needs
            none.
        max_resident: the most files of tasks in a folder that are mapped into memory at once; what is used beyond them is read
            into memory of its own, as files of up to 256 KiB always are. None: 4,096, for all such banks together.

    Attributes:
        model: the model.

    Raises:
        TypeError: ``model`` is no module, a pattern no string, or ``max_resident`` no integer.
        ValueError: ``model`` has no masked layer, a pattern matches nothing, or only what a masked layer shares between its tasks;
            ``max_resident`` is negative.
    """

    def __init__(self, model: nn.Module, per_task: str | Iterable[str] = (), *, max_resident: int | None = None):
        mappings = OF_PROCESS if max_resident is None else Mappings(max_resident)
        model_tasks.masked_layers(model)
        keep_matching(model, per_task)
        self.model = model
        self._mappings = mappings
        self._store: Store | None = None
        self._seen: frozenset[str] = frozenset()
        """The states of folders that were loaded into the model, or saved from it: a save may replace them."""
        self._saving = ThreadLock()
        self._sums = Sums()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, oldest first."""
        return model_tasks.tasks(self.model)

    @property
    def slots(self) -> list[str | None]:
        """The names by slot; None where a task was removed."""
        return model_tasks.slots(self.model)

    @property
    def per_task(self) -> list[str]:
        """The names, in the plain model, of the parameters and buffers that belong to tasks beside the masks."""
        return per_task_names(self.model)

    def add_task(self, name: str, init: str | Mapping[str, float] = "random") -> None:
        """See :func:`metamask_ext.add_task`; ``init={task: alpha}`` begins with a combination of known tasks."""
        model_tasks.add_task(self.model, name, init)

    def remove_task(self, name: str) -> None:
        """See :func:`metamask_ext.remove_task`. In a folder the task is removed by the next :meth:`save`."""
        model_tasks.remove_task(self.model, name)

    def pack(self, task: str) -> None:
        """Turn a finished task's logits into bits: 1 where ``M > threshold`` for the hard gate, ``M > 0`` for the sigmoid gate.

        The logits are removed from the parameters. With the hard gate outputs stay the same. With the sigmoid gate they change the
        more, the further gates are from 0 and 1: anneal the temperature first, and check the accuracy before and after. A packed
        task stays as it is.

        Raises:
            ValueError: the task is unknown, or a logit is NaN, as after a training that diverged. Nothing has changed.
        """
        model_tasks.pack_task(self.model, task)

    def is_packed(self, task: str) -> bool:
        """Return whether the task's masks are bits. ValueError if the task is unknown."""
        self._check_task(task)
        return all(layer._task_dict()._is_bits(escape(task)) for _, layer in model_tasks.masked_layers(self.model))

    def superpose(self, alphas: Mapping[str, float | Tensor]) -> using_task:
        """Open a block that runs the model with ``theta = W * sum_t alpha_t g(M_t)``, the same combination of biases and heads.

        It starts an unseen task from known ones (Blum and Law, EE5239 proposal, section 2.1, "During test time"; Wortsman et al.,
        arXiv:2006.14769, eq. 3): tune only coefficients that require grad, or start a new mask at the superposition with
        ``add_task(name, init=alphas)``.

        Args:
            alphas: the coefficient of each task, a number or a floating-point tensor of one element.

        Raises:
            TypeError, ValueError: no such mapping, an unknown task, a coefficient that is not finite, or a task with NaN in its
                logits. In the block: RuntimeError from layers with batch statistics of tasks in training mode.
        """
        amounts = model_tasks.check_amounts(self.tasks, alphas, "alphas")
        model_tasks.refuse_nan(self.model, amounts, "superposed")
        return using_task(self.model, Superposition(amounts))

    def infer_task(self, x: Tensor, method: str = "one_shot", per_sample: bool = True) -> list[str] | str:
        """Infer the task of each sample: the one whose coefficient lowers the entropy of the output fastest.

        From ``theta = W * sum_t alpha_t g(M_t)`` at ``alpha_t = 1/T``: ``"one_shot"`` takes the task of the largest
        ``-dH/dalpha_t``, ``"binary"`` keeps the better half of the tasks at every step. Source: Wortsman et al., Supermasks in
        Superposition, arXiv:2006.14769, sections 3.3 and 3.4. One shot is one forward and one backward for all tasks. Binary steps
        for each sample split the batch by candidates, at worst into single samples: it is meant for few tasks, or
        ``per_sample=False``.

        The model runs as it is: call ``model.eval()`` first. Heads and statistics of tasks are averaged and held fixed. Sums of the
        bits of packed tasks are kept for the next call, with a copy of the bits to tell whether they have changed.

        Args:
            x: ``[B, ...]``, the model's input; its output must be logits ``[B, classes]``.
            method: ``"one_shot"`` or ``"binary"``.
            per_sample: False: all samples are of one task, and their entropies are summed.

        Returns:
            A name for each sample, which ``using_task`` takes; with ``per_sample=False`` one name.

        Raises:
            TypeError, ValueError: ``x`` is no tensor or empty, an unknown method, an output that is no logits, or holds NaN or
                +inf (-inf is the probability 0); a task with NaN in its logits.
            RuntimeError: a layer got another number of samples than ``x`` has; a task was removed meanwhile.
        """
        check_whole(self.model.modules(), "tasks cannot be inferred")
        return infer(self.model, x, method, per_sample, self._sums)

    def bytes_per_task(self, task: str) -> int:
        """Count the bytes of memory that the task's own tensors take: masks and what else belongs to it.

        Raises:
            ValueError: the task is unknown.
        """
        self._check_task(task)
        key = escape(task)
        own = {tensors: None for _, layer in task_layers(self.model) for tensors in layer._dicts().values()}
        return sum(tensors._tensor(key).nbytes for tensors in own)

    # Files

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Make the folder hold this bank; see :func:`metamask_ext.bank.save` for what that guarantees.

        Tasks that nobody has used since they were loaded are neither read nor written. All others are compared with the folder by
        their contents, and written where they differ: a mask is saved however it was changed. During a save other threads may add,
        remove, pack and use tasks (the save holds the tasks that existed when it began), but not train or load them.

        Args:
            directory: the folder; made if it is not there.
            overwrite: replace a bank that this one has not seen: it was neither loaded from there, nor saved there last.

        Raises:
            BankError: another process is writing, or this thread, where a signal handler calls this amid a save; the folder holds a
                bank, or a later save of this one, that was not seen and ``overwrite`` is False; its ``bank.json`` is damaged.
                Nothing has changed.
            OSError: the files cannot be written. The old bank is whole.
        """
        check_whole(self.model.modules(), "a bank cannot be saved")
        with self._saving.held(lambda: BankError("a save of this bank is under way in this thread")):
            seen = self._seen if self._store is None else self._seen | {self._store.state}
            folder.save(self.model, directory, None if overwrite else seen, self._remember)

    def _remember(self, store: Store) -> None:
        store.mappings = self._mappings
        self._store = store
        self._seen |= {store.state}

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module, max_resident: int | None = None) -> MaskBank:
        """Load the bank in a folder into ``model``: its shared weights are overwritten, its tasks replaced by the bank's.

        Packed tasks are read or mapped, and checked, when they are first used: the time does not depend on their number, unless
        the bank keeps parameters per task (heads), which are all read. Logits take the dtype of the model's masks. Temperature,
        threshold and the tensors kept per task are the bank's.

        Optimisers made before hold what they held: the shared weights, and the logits and tensors per task of every task that the
        model has under the same name, stay the same parameters and get other values, as with ``load_state_dict``. ``load`` replaces
        bits, logits of a task that is packed in the folder, and bits of one that is not, and removes tasks that the folder lacks.
        New tasks have new parameters. Gradients and ``requires_grad`` stay as they are.

        Args:
            directory: as given to :meth:`save`.
            model: has the masked layers that were saved, of the same names, shapes, gates and dtypes.
            max_resident: see :class:`MaskBank`.

        Raises:
            BankError: no bank is there, it is damaged, or it is of another model; ``model`` has not changed.
        """
        mappings = OF_PROCESS if max_resident is None else Mappings(max_resident)
        store = Store.open(directory)
        store.mappings = mappings
        folder.load(store, model)
        bank = cls(model)
        bank._mappings = mappings
        bank._remember(store)
        return bank

    def verify(self) -> None:
        """Check every file of the folder from which this bank was loaded, or into which it was last saved.

        Raises:
            BankError: that lists all damaged files.
            RuntimeError: the bank was neither loaded nor saved.
        """
        if self._store is None:
            raise RuntimeError("the bank has no folder to verify: it was neither loaded nor saved")
        self._store.verify()

    def __repr__(self) -> str:
        return f"MaskBank({type(self.model).__name__}, {len(self.tasks)} tasks: {describe(self.tasks)})"

    def _check_task(self, task: str) -> None:
        known = self.tasks
        if plain(task) not in known:
            raise ValueError(f"task must be one of {describe(known)}, got {task!r}")
