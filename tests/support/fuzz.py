"""One case of the ops' fuzzer, and many: what is wrong with it, and what ended the process that ran it."""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from support.blas import ALWAYS
from support.fuzz_cases import Case, Make, fitting
from support.fuzz_nonsense import nonsense
from support.fuzz_oracle import Expected, changed, flat
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metamask_ext.ops.checks import DTYPES
from metamask_ext.products import PANELS, using_table

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
# What a fake kernel does not get to see: what torch refuses before, None for a tensor, the values of slots, a lack of memory.
UNSEEN = re.compile(
    r"Expected a value of type|There were no tensor arguments|got UNKNOWN_SCALAR|slots must be in \[0|"
    "can't allocate memory|not enough memory|Storage size calculation overflowed"
)
FAULTS = re.compile("INTERNAL ASSERT|bad_alloc|std::|Segmentation")
SECONDS = 60


class Outcome(NamedTuple):
    kind: str
    """Of what happened, for the counts."""
    fault: str | None = None
    """A description, if it should not have happened."""


class Finding(NamedTuple):
    index: int
    fault: str


def case_of(seed: int, index: int) -> tuple[Case, bool]:
    """A case, and whether its arguments fit."""
    make = Make(seed, index)
    fits = make.is_so(0.5)
    return (fitting(make) if fits else nonsense(make)), fits


def described(case: Case) -> str:
    def one(value: object) -> str:
        if isinstance(value, Tensor):
            where = list(value.stride()) if value.layout == torch.strided else str(value.layout)
            return f"{list(value.shape)}/{where}/{str(value.dtype)[6:]}/{value.device}"
        return f"[{', '.join(map(one, value))}]" if isinstance(value, list) else repr(value)

    return f"{case.op}({', '.join(map(one, case.arguments))})"


def run_case(seed: int, index: int) -> Outcome:
    """Run one case on the real and on the fake kernel, and compare both, and the numbers with the reference's.

    Every other case multiplies through BLAS, which large batches take, the others by panels.
    """
    case, fits = case_of(seed, index)
    try:
        with torch.no_grad(), using_table(ALWAYS if index % 2 else PANELS):
            outcome = _run(case, fits)
    except Exception as error:
        outcome = Outcome("error", f"{type(error).__name__}: {error}")
    return outcome._replace(fault=f"{outcome.fault}: {described(case)}") if outcome.fault else outcome


def _run(case: Case, fits: bool) -> Outcome:
    # Results of many elements are not compared with the reference: it would take their memory several times over.
    small = _strided(case) and sum(leaf.numel() for leaf in tree_leaves(case.arguments) if isinstance(leaf, Tensor)) < 2**20
    expected = Expected(case) if fits else None
    before = [None if one is None else one.clone() for one in changed(case)] if small else []
    try:
        result = getattr(torch.ops.metamask, case.op)(*case.arguments)
    except REFUSALS as error:
        return _refused(error, case, fits, small, before)
    if small:
        fake = _fake_result(case)
        if isinstance(fake, Exception):
            return Outcome("returned", f"the fake kernel refuses ({fake}), the real one does not")
        said = _unlike(flat(fake), flat(result))
        if said:
            return Outcome("returned", said)
    if expected is None:
        return Outcome("returned")
    said = expected.difference([*flat(result), *changed(case)])
    return Outcome("right", said)


def _refused(error: Exception, case: Case, fits: bool, small: bool, before: list[Tensor | None]) -> Outcome:
    words = str(error)
    kind = type(error).__name__
    if fits or FAULTS.search(words) or not words:
        return Outcome(kind, f"{kind}: {words[:300]}")
    if small and not UNSEEN.search(words) and not isinstance(_fake_result(case), Exception):
        return Outcome(kind, f"the fake kernel does not refuse, the real one does ({words[:200]})")
    for now, then in zip(changed(case), before):
        if now is None or then is None or now.dtype not in DTYPES:
            continue
        if not torch.equal(now.nan_to_num(), then.nan_to_num()):
            return Outcome(kind, f"refused after it had changed a parameter ({words[:200]})")
    return Outcome(kind)


def _strided(case: Case) -> bool:
    """All tensors are on the CPU, and have strides: a fake tensor of another kind does not exist."""
    tensors = [leaf for leaf in tree_leaves(case.arguments) if isinstance(leaf, Tensor)]
    return all(one.layout == torch.strided and one.device.type == "cpu" and not one.is_quantized for one in tensors)


def _fake_result(case: Case) -> object:
    """The result of the fake kernel, or how it refuses."""
    memory: dict[int, Tensor] = {}

    def without_values(leaf: object) -> object:
        """On ``meta``; tensors that share memory do so there."""
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if storage._cdata not in memory:
            memory[storage._cdata] = torch.empty(storage.nbytes() // 16 * 16 + 16, dtype=torch.uint8, device="meta")
        made = memory[storage._cdata].view(leaf.dtype).as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
        return torch._neg_view(made) if leaf.is_neg() else made

    arguments = [tree_map(without_values, argument) for argument in case.arguments]
    try:
        return getattr(torch.ops.metamask, case.op)(*arguments)
    except (*REFUSALS, OverflowError) as error:
        return error


def _unlike(fake: list[Tensor | None], real: list[Tensor | None]) -> str | None:
    def form(tensor: Tensor | None) -> object:
        if tensor is None:
            return None
        # A stride says nothing where there is one element, or none.
        strides = [stride if size > 1 and tensor.numel() else 0 for size, stride in zip(tensor.shape, tensor.stride())]
        return list(tensor.shape), strides, tensor.dtype

    if len(fake) != len(real):
        return f"the fake kernel gives {len(fake)} tensors, the real one {len(real)}"
    for index, (one, other) in enumerate(zip(fake, real)):
        if form(one) != form(other):
            return f"result {index} of the fake kernel is {form(one)}, of the real one {form(other)}"
    return None


def run_all(seed: int, first: int, cases: int, threads: int = 1) -> tuple[Counter[str], list[Finding]]:
    """Run cases in child processes, so that one that ends its process is a finding like others."""
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    on_meta = torch.empty(1, device="meta")
    torch.ops.metamask.masked_weight(on_meta, on_meta, 0, 1.0)  # imports, here and not in each child, what a fake kernel needs
    index, last = first, first + cases
    while index < last:
        with mmap.mmap(-1, 8) as current:
            outcomes = list(_in_child(seed, index, last, threads, current))
            status, lines = outcomes[-1], outcomes[:-1]
            reached = struct.unpack("q", current[:8])[0]
        for line in lines:
            number, kind, fault = line.split("\t", 2)
            counts[kind] += 1
            if fault:
                findings.append(Finding(int(number), fault))
        if status == "0":
            break
        counts["ended its process"] += 1
        findings.append(Finding(reached, f"ended its process with status {status}: {described(case_of(seed, reached)[0])}"))
        index = reached + 1
    return counts, findings


def _in_child(seed: int, first: int, last: int, threads: int, current: mmap.mmap) -> Iterator[str]:
    """The outcomes of the cases in one process, as lines, then its exit status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        torch.set_num_threads(threads)
        with os.fdopen(writing, "w", buffering=1) as out:
            for index in range(first, last):
                current[:8] = struct.pack("q", index)
                signal.alarm(SECONDS)  # ends the process: a case that does not return
                kind, fault = run_case(seed, index)
                out.write(f"{index}\t{kind}\t{' '.join((fault or '').split())}\n")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            if line.endswith("\n"):
                yield line.rstrip("\n")
    yield str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
