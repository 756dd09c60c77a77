"""Every tensor argument of every op in every layout of memory: the result is that of the same values, contiguous."""

from __future__ import annotations

import re

import pytest
import torch
from support.linear_checks import inputs
from support.paths import ROOT
from support.samples import DTYPES, PAIR_IDS, PAIRS
from support.step_checks import SETTINGS, state_of, tensors_of
from support.strides import (
    GATE,
    LAYOUTS,
    PUBLIC,
    RAW,
    SIZES,
    Make,
    contiguous,
    laid_out,
    with_gradients,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metamask_ext.ops.linear import raw as linear_raw
from metamask_ext.ops.weight import raw as weight_raw
from metamask_ext.ops.weight.raw import AdamWState

# Memory order decides which elements share a vector, and a remainder may round otherwise; a stride that is not seen is off by
# about the largest element.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Their values are made contiguous before anything is computed: bit for bit the same.
EXACT = re.compile(r"masked_linear(?!.*_(?:sgd|adamw)_)|mask$|im2col|col2im")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_sizes = pytest.mark.parametrize("sizes", SIZES)


def difference(got, wanted, exact):
    """Describe the difference; None if there is none."""
    got, wanted = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (got, wanted))
    if len(got) != len(wanted):
        return f"{len(got)} tensors, expected {len(wanted)}"
    for index, (one, other) in enumerate(zip(got, wanted)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"result {index} is {one.dtype} {list(one.shape)}, expected {other.dtype} {list(other.shape)}"
        if torch.equal(one, other):
            continue
        if exact or not one.is_floating_point():
            return f"result {index} is not the same"
        error = (one.double() - other.double()).abs().max().item()
        largest = other.double().abs().max().item()
        if not error <= TOLERANCE[one.dtype] * largest:
            return f"result {index} is {error:.3g} off, where the largest is {largest:.3g}"
    return None


def sweep(run, arguments, exact, layouts=LAYOUTS, each=True):
    """Every argument in turn, then all together, in each layout; lists what differs."""
    found = []
    for layout_name, layout in layouts.items():
        for names in [*([name] for name in arguments if each), list(arguments)]:
            given = {name: laid_out(one, layout) if name in names else one for name, one in arguments.items()}
            said = difference(run(given, layout), run(contiguous(given), lambda one, its=layout: contiguous(its(one))), exact)
            if said is not None:
                found.append(f"{layout_name} {' '.join(names)}: {said}")
    return found


# Those that come to a CUDA kernel in different forms
EMULATED = {name: LAYOUTS[name] for name in ("expanded_rows", "transposed", "offset", "negated")}


def in_the_emulator(op, sizes, dtype, **_):
    """The CPU has the only im2col. Types differ in the kernels' accesses, not in how a tensor comes to them."""
    fits = sizes in ("whole", "ragged") or (sizes == "many" and op.startswith("masked_linear"))
    return op not in ("im2col", "col2im") and dtype in (torch.float32, torch.bfloat16) and fits


@pytest.mark.every_device(emulated_if=in_the_emulator)
@each_dtype
@each_sizes
@pytest.mark.parametrize("op", RAW)
def test_a_raw_op_sees_strides(op, sizes, dtype, request):
    if op in ("im2col", "col2im") and dtype not in (torch.float32, torch.float64):
        pytest.skip("for float32 and float64")
    check_raw_op(op, Make(SIZES[sizes], dtype), request.node.callspec.params["_device"] == "emulated")


@pytest.mark.every_device(emulated_if=lambda op, sizes, dtype, **_: in_the_emulator(op, sizes, dtype) and sizes != "many")
@pytest.mark.parametrize(("dtype", "mask_dtype"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("sizes", ["whole", "ragged", "many"])
@pytest.mark.parametrize("op", [op for op in RAW if op.startswith(("masked", "task"))])
def test_a_raw_op_with_logits_of_float32_sees_strides(op, sizes, dtype, mask_dtype, request):
    check_raw_op(op, Make(SIZES[sizes], dtype, mask_dtype), request.node.callspec.params["_device"] == "emulated")


def check_raw_op(op, make, emulated):
    run, arguments = RAW[op](make)

    def refused(given, layout):
        try:
            return run(**given)
        except ValueError as error:
            # An updated parameter stays where it is, and the other one has its memory order.
            if "must have the strides of weight" in str(error) and op.endswith(("_sgd_ mask", "_adamw_ mask")):
                return run(**contiguous(given))
            raise

    # A CUDA kernel for tensors that are not aligned adds up in another order.
    exact = EXACT.search(op) is not None and not emulated
    if emulated and make.dtype == torch.float32:
        found = sweep(refused, arguments, exact, EMULATED)
    else:
        found = sweep(refused, arguments, exact, each=not emulated)
    assert not found, "\n".join(found)


@each_dtype
@pytest.mark.parametrize("sizes", ["whole", "ragged"])
@pytest.mark.parametrize("function", PUBLIC)
def test_a_public_function_and_its_gradients_see_strides(function, sizes, dtype):
    check_public(function, Make(SIZES[sizes], dtype))


@pytest.mark.parametrize(("dtype", "mask_dtype"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("function", [function for function in PUBLIC if function.startswith(("masked", "task"))])
def test_a_public_function_of_float32_logits_and_its_gradients_see_strides(function, dtype, mask_dtype):
    check_public(function, Make(SIZES["ragged"], dtype, mask_dtype))


def check_public(function, make):
    run, arguments = PUBLIC[function](make)
    found = sweep(lambda given, layout: with_gradients(run, given, layout), arguments, False)
    assert not found, "\n".join(found)


# What a step changes is not copied.
REFUSED = ("sliced", "sliced_rows", "column", "expanded_rows", "expanded_columns", "transposed", "sliced_with_offset", "negated")
REFUSAL = "in place|(momentum buffer|exp_avg|exp_avg_sq) of|must have the strides"
KEPT = {"sgd": 1, "adamw": 3}
"""The tensors that are kept of a parameter. The last one of AdamW counts its steps, in any layout."""


def each_changed(parameters):
    """The rules, with the places of the tensors that a step changes: the parameters, then what is kept of each."""
    places = {
        rule: [*range(parameters), *(parameters + kept * of + at for of in range(parameters) for at in range(min(kept, 2)))]
        for rule, kept in KEPT.items()
    }
    return pytest.mark.parametrize(("rule", "index"), [(rule, index) for rule in places for index in places[rule]])


def check_step(rule, index, layout, parameters, take):
    """``take(parameters, states)`` changes the tensor itself, or is refused."""
    count = len(parameters)
    tensors = [*parameters, *(tensor for p in parameters for tensor in tensors_of(state_of(rule, p)))]

    def step(tensors):
        kept = tensors[count:]
        states = kept if rule == "sgd" else [AdamWState(*kept[at : at + 3]) for at in range(0, len(kept), 3)]
        return take(tensors[:count], states)

    tensors[index] = LAYOUTS[layout](tensors[index])
    before, wanted = contiguous(tensors), contiguous(tensors)
    if layout in REFUSED:
        with pytest.raises(ValueError, match=REFUSAL):
            step(tensors)
        wanted = before
    else:
        assert difference(step(tensors), step(wanted), False) is None
        assert not torch.equal(wanted[index], before[index])
    assert difference(tensors, wanted, layout in REFUSED) is None


@pytest.mark.every_device(emulated_if=lambda layout, rule, **_: rule == "sgd" and layout in ("sliced", "offset"))
@pytest.mark.parametrize("layout", [*REFUSED, "offset"])
@each_changed(4)
def test_a_step_of_masked_linear_changes_the_tensor_itself_or_is_refused(rule, index, layout):
    x, *parameters, grad = inputs((5, 18), 10, torch.float32)

    def take(parameters, states):
        op = linear_raw.UPDATES[rule]
        return op(grad, x, *parameters, *GATE, (True,) * 5, (True,) * 4, states, SETTINGS[rule])

    check_step(rule, index, layout, parameters, take)


@pytest.mark.every_device(emulated_if=lambda layout, rule, **_: rule == "sgd" and layout in ("sliced", "transposed"))
@pytest.mark.parametrize("layout", [*REFUSED, "offset"])
@each_changed(2)
def test_a_step_of_masked_weight_changes_the_tensor_itself_or_is_refused(rule, index, layout):
    make = Make(SIZES["ragged"], torch.float32)
    grad, *parameters = (make.random(10, 18) for _ in range(3))

    def take(parameters, states):
        return weight_raw.UPDATES[rule](grad, *parameters, *GATE, (True, True), (True, True), states, SETTINGS[rule][:2])

    check_step(rule, index, layout, parameters, take)


@pytest.mark.once
def test_only_the_accessors_take_a_data_pointer():
    """csrc/ops/memory.h asserts what each pointer's reader takes for granted."""
    taken = re.compile(r"data_ptr|unsafe_storage|\.storage\(\)|packed_accessor|->\s*(mutable_)?(unsafe_)?data\(")
    found = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.name != "memory.h":
            lines = path.read_text().splitlines()
            found += [f"{path.name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if taken.search(line)]
    assert not found, "\n".join(found)
