"""MaskBank: the tasks of a model in one place, made, packed, mixed, inferred and saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.atomic import write_atomic
from ..files.lock import ThreadLock
from ..nn import tasks as model_tasks
from ..nn.names import describe, escape, plain
from ..nn.selection import Superposition
from ..nn.structure import structure
from ..nn.task_layer import task_layers
from ..nn.using_task import using_task
from ..nn.wrappers import check_whole
from . import folder
from .artefact import read
from .counts import Sums
from .hub import folder_of, task_files, write_card, write_tasks
from .index import INDEX, BankError
from .inference import infer
from .mappings import OF_PROCESS, Mappings
from .metrics import Metrics, recorded
from .per_task import keep_matching, per_task_names
from .prefetch import in_background
from .refresh import refresh
from .residency import Residency, check_pins, usable
from .single import artefact_of, check_all, fingerprints, take_in
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
        max_resident: the most packed tasks that stay in memory, the host's and the GPU's, of those whose bits are in a folder. When
            a block is first used (:func:`metamask_ext.using_task`) those beyond them that no block has used for longest leave it,
            and are read again when they are needed; not those of the block itself, nor pinned ones (:meth:`load`), nor any that
            were changed since they were read. Files of more than 256 KiB are mapped, as many at once; others are read. None: all
            tasks that were used stay, and 4,096 files are mapped, for all such banks together.

    Attributes:
        model: the model.

    Raises:
        TypeError: ``model`` is no module, a pattern no string, or ``max_resident`` no integer.
        ValueError: ``model`` has no masked layer, a pattern matches nothing, or only what a masked layer shares between its tasks;
            ``max_resident`` is negative.
    """

    def __init__(self, model: nn.Module, per_task: str | Iterable[str] = (), *, max_resident: int | None = None):
        residency = None if max_resident is None else Residency(max_resident)
        model_tasks.masked_layers(model)
        keep_matching(model, per_task)
        self.model = model
        self._residency = residency
        self._mappings = OF_PROCESS if residency is None else Mappings(residency.most)
        self._store: Store | None = None
        self._seen: frozenset[str] = frozenset()
        """The states of folders that were loaded into the model, or saved from it: a save may replace them."""
        self._saving = ThreadLock()
        self._sums = Sums()
        self._metrics: dict[int, Metrics] = {}
        """By slot: a later task of the same name has another one."""

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
        before = self.is_packed(task) if plain(task) in self.tasks else True
        model_tasks.pack_task(self.model, task)
        if not before:
            slot = self.slots.index(plain(task))
            self._metrics[slot] = self._metrics.get(slot, Metrics()).packed()

    def is_packed(self, task: str) -> bool:
        """Return whether the task's masks are bits. ValueError if the task is unknown."""
        self._check_task(task)
        return all(layer._task_dict()._is_bits(escape(task)) for _, layer in model_tasks.masked_layers(self.model))

    def record(self, task: str, **metrics: float) -> None:
        """Note what was measured of a task, ``record("digits", accuracy=0.97)``: it is saved beside it, and travels with it.

        A name that is there gets the new value. :meth:`pack` keeps what was recorded until then as that of before: record again
        what you measure after it.

        Raises:
            TypeError, ValueError: the task is unknown, or a value is no finite number. Nothing has changed.
        """
        found = self._metrics_of(task).with_more(metrics)
        self._metrics[self.slots.index(plain(task))] = found

    def metrics(self, task: str, before_packing: bool = False) -> dict[str, float]:
        """Return what was recorded of a task; with ``before_packing`` of its logits, before they were packed.

        Raises:
            ValueError: the task is unknown.
        """
        found = self._metrics_of(task)
        return dict(found.before_packing if before_packing else found.now)

    def superpose(self, alphas: Mapping[str, float | Tensor]) -> using_task[nn.Module]:
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
            folder.save(self.model, directory, None if overwrite else seen, self._remember, self._residency, dict(self._metrics))

    def _remember(self, store: Store) -> None:
        store.mappings = self._mappings
        self._store = store
        self._seen |= {store.state}

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        max_resident: int | None = None,
        pin: str | Iterable[str] = (),
        device: torch.device | str | None = None,
    ) -> MaskBank:
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
            pin: names of tasks that are read now, and stay in memory.
            device: where ``model`` goes first, and its tasks when they are used. None: where it is.

        Raises:
            BankError: no bank is there, it is damaged, or it is of another model; ``model`` has not changed.
            TypeError, ValueError: ``max_resident`` is no integer or negative, ``pin`` names no task of the bank, or ``device`` is
                none that can be used here; ``model`` has not changed.
        """
        place = None if device is None else usable(device)
        store = Store.open(directory)
        pinned = check_pins(pin, store.tasks)
        residency = None if max_resident is None else Residency(max_resident, pinned)
        mappings = store.mappings = OF_PROCESS if residency is None else Mappings(residency.most)
        folder.load(store, model, pinned, place, residency)
        bank = cls(model)
        bank._mappings, bank._residency = mappings, residency
        bank._remember(store)
        bank._metrics = recorded(store)
        return bank

    def prefetch(self, tasks: str | Iterable[str]) -> Future[None]:
        """Read tasks from the folder in the background, into memory and onto the model's device, so that their first use need not.

        Where a task cannot be read, its next use raises the error, and so does ``result()`` of what this returns. Those after it
        are read all the same. With ``max_resident`` this counts as a use of all of them by one block.

        Args:
            tasks: names of tasks, the most urgent first; those that are in memory take no time.

        Returns:
            A future that is done when all are there; it need not be looked at.

        Raises:
            TypeError, ValueError: one is no name, or of no task.
        """
        names = [tasks] if isinstance(tasks, str) else [*tasks]
        known = set(self.tasks)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"tasks must be names, got {type(name).__name__}")
            if plain(name) not in known:
                raise ValueError(f"tasks must be among {describe(known)}, got {name!r}")
        return in_background(self.model, [escape(name) for name in names], self._residency)

    def refresh(self) -> list[str]:
        """Take over what other processes have saved into the folder since this bank was loaded, last saved or refreshed.

        Tasks that were added, changed or removed there are so in the model; slots are the folder's. Logits and heads are filled in
        place, as by :meth:`load`. Tasks of this bank that nobody else has touched stay, saved or not. Call it between two batches:
        a forward that runs meanwhile may use the old masks in one layer and the new ones in the next.

        Returns:
            The names of the tasks that were added, changed or removed, by slot. Empty where nobody has saved: that is found out by
            one comparison of ``bank.json``.

        Raises:
            BankError: the folder has other shared weights or settings now; a task was changed or removed there and here, or added
                there in a slot that this bank has given to another; a file is damaged or the bank gone. Nothing has changed.
            RuntimeError: the bank was neither loaded nor saved; new parameters where a ``DistributedDataParallel`` or
                ``fully_shard`` holds the model.
        """
        if self._store is None:
            raise RuntimeError("the bank has no folder to refresh from: it was neither loaded nor saved")
        with self._saving.held(lambda: BankError("a save of this bank is under way in this thread")):
            before = self._store
            store, names = refresh(self.model, before, self._residency)
            self._remember(store)
            for slot, name in enumerate(store.tasks):
                if name in names:
                    self._metrics[slot] = Metrics.read(store.info(name))
        return names

    # Single tasks

    def save_task(self, task: str, file: str | os.PathLike[str], *, base: str | None = None, card: str | None = None) -> None:
        """Write one task without the weights that it masks into a safetensors file, which replaces one that is there.

        It holds the masks and the task's own tensors, what was recorded of it, a card, and of the base the name, the shapes and
        fingerprints: another model is refused by :meth:`load_task`.

        Args:
            task: its name.
            file: the file; its folder must be there.
            base: a name for the model, for people. None: that of its class.
            card: a text about the task, in Markdown. None: one with its layers and metrics.

        Raises:
            ValueError: the task is unknown.
            OutputError: the file cannot be written; an old one is still there.
        """
        artefact = artefact_of(self.model, task, self._metrics_of(task), base, card, fingerprints(self.model))
        write_atomic(Path(file), artefact.encode())

    def load_task(self, file: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the task of a file that :meth:`save_task` wrote, of a bank with the same base.

        The base is the same where each shared tensor has the same bits in the narrower one of the two dtypes: tasks of a float32
        model go into its ``.bfloat16()``, and the other way round, but not from bfloat16 to float16. Logits and heads are then
        converted to what the model has for them.

        Args:
            file: the file.
            name: the task's name here. None: that in the file.

        Returns:
            The name.

        Raises:
            BankError: the file is damaged or none of a task; it belongs to another base (the message names what differs), to other
                layers, to a gate of other settings (for logits), or to other tensors per task; the name is taken. Nothing has
                changed.
            OSError: the file cannot be read.
        """
        path = Path(file)
        artefact = read(path)
        task = take_in(self.model, path, artefact, name)
        self._metrics[self.slots.index(task)] = artefact.metrics
        return task

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tasks: Iterable[str] | None = None,
        with_base: bool = True,
        base: str | None = None,
        card: str | None = None,
    ) -> None:
        """Write a folder as model hubs have them: ``README.md``, and the bank or tasks without their base.

        Args:
            folder: made if it is not there.
            tasks: names of those to write without their base. None: all.
            with_base: the whole bank, as :meth:`save` writes it; False: a file for each task (:meth:`save_task`), and
                ``config.json``, which lists them.
            base: a name for the model, for people. None: that of its class.
            card: the text of ``README.md``. None: one that lists the tasks, if none is there.

        Raises:
            BankError, OSError, OutputError: as :meth:`save` and :meth:`save_task`.
            ValueError: a task is unknown, or there are none; ``tasks`` are given with the base.
        """
        where, base = Path(folder), type(self.model).__name__ if base is None else base
        if with_base:
            if tasks is not None:
                raise ValueError("tasks must be None with the base, of which a bank has all: with_base=False writes some")
            self.save(where)
            write_card(where, card, base, self.tasks, base_is_here=True)
            return
        names = self.tasks if tasks is None else [tasks] if isinstance(tasks, str) else [*tasks]
        if not names:
            raise ValueError("tasks must name at least one")
        of_base = fingerprints(self.model)
        metrics = {name: self._metrics_of(name) for name in names}
        write_tasks(where, {name: artefact_of(self.model, name, metrics[name], base, None, of_base) for name in names}, card)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        model: nn.Module,
        *,
        revision: str | None = None,
        max_resident: int | None = None,
        pin: str | Iterable[str] = (),
        device: torch.device | str | None = None,
    ) -> MaskBank:
        """Load what :meth:`save_pretrained` wrote, from a folder or a repository of the Hugging Face hub.

        A bank is loaded as by :meth:`load`. Tasks without their base are added to those of ``model``, which must have the base;
        what they keep per task beside masks, the model then does.

        Args:
            where: a folder; or ``"owner/name"``, which is downloaded where ``huggingface_hub`` is installed.
            model: with the masked layers of the tasks.
            revision: of a repository.
            max_resident, pin, device: as for :meth:`load`.

        Raises:
            BankNotFoundError: neither is there, or ``huggingface_hub`` is missing.
            BankError, TypeError, ValueError: as of :meth:`load` and :meth:`load_task`; ``model`` has not changed.
        """
        folder = folder_of(where, revision)
        if (folder / INDEX).exists():
            return cls.load(folder, model, max_resident, pin, device)
        place = None if device is None else usable(device)
        files = task_files(folder)
        residency = None if max_resident is None else Residency(max_resident, check_pins(pin, files))
        artefacts = {path: read(path) for path in files.values()}
        with structure():
            per_task = check_all(artefacts, model)
            bank = cls(model if place is None else model.to(place), per_task)
            for path, artefact in artefacts.items():
                task = take_in(model, path, artefact, None)
                bank._metrics[bank.slots.index(task)] = artefact.metrics
        if residency is not None:
            bank._residency, bank._mappings = residency, Mappings(residency.most)
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

    def _metrics_of(self, task: str) -> Metrics:
        self._check_task(task)
        return self._metrics.get(self.slots.index(plain(task)), Metrics())

    def __repr__(self) -> str:
        return f"MaskBank({type(self.model).__name__}, {len(self.tasks)} tasks: {describe(self.tasks)})"

    def _check_task(self, task: str) -> None:
        known = self.tasks
        if plain(task) not in known:
            raise ValueError(f"task must be one of {describe(known)}, got {task!r}")
