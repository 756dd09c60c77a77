"""The kernels under torch.compile: right in every order and transform, and the kernels it is that run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import compiled_families  # noqa: F401  enters its cases
from support.compiled import COUNTED, Compiled, metamask_nodes
from support.compiled_cases import CASES, LOST, REFUSED, inputs, leaves, loss_and_gradients, loss_of, ours, plain
from support.profiling import metamask_ops
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor

import metamask_ext as mm
from metamask_ext.ops import dispatch

pytestmark = pytest.mark.once
SOME = (
    "a meta-step traced in both orders",
    "product convolution: backward outside",
    "mixed-task: a list of masks, backward outside",
    "packed: backward outside",
)
"""The cases that run with Inductor too; with --inductor all do (`make test-compiled`)."""


OPTIONS = [{"mode": "reduce-overhead"}, {"options": {"cpp_wrapper": True}}]


def pytest_generate_tests(metafunc):
    full = metafunc.config.option.inductor
    if "with_inductor" in metafunc.fixturenames:
        metafunc.parametrize("with_inductor", CASES if full else SOME)
    if "of_inductor" in metafunc.fixturenames:
        metafunc.parametrize("of_inductor", OPTIONS if full else OPTIONS[:1], ids=str)


@pytest.fixture
def every_size(monkeypatch):
    """Kernels for small weights too. What is traced so must not be found on disk by others."""
    monkeypatch.setattr(dispatch, "SMALLEST", 0)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def flat(result):
    return [result.detach()] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


def check(name, backend):
    function, ops = CASES[name]
    compiled = Compiled(backend)
    if refused := REFUSED.get((name, backend)):
        for layer in (ours, plain):
            with pytest.raises(RuntimeError, match=refused):
                function(layer, Compiled(backend))
        return
    if (name, backend) in LOST:
        assert function(ours, compiled) is None and function(plain, Compiled(backend)) is None
        return
    expected = flat(function(plain, Compiled(None)))
    got = flat(function(ours, compiled))
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    if backend == COUNTED:
        assert compiled.ops == ops


@pytest.mark.parametrize("backend", ["eager", COUNTED])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_ops(every_size, name, backend):
    check(name, backend)


def test_with_inductor(every_size, with_inductor):
    check(with_inductor, "inductor")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_kernels_run(every_size, backend):
    given, function = leaves(inputs()), Compiled(backend)(loss_of(ours))
    loss_and_gradients(function, given)
    assert metamask_ops(lambda: loss_and_gradients(function, given)) == {"masked_linear": 2, "masked_linear_backward": 2}


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("weight, mask", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", ["none", "outside", "inside"])
def test_bits_are_those_of_eager_mode(every_size, weight, mask, autocast):
    if autocast != "none" and weight == torch.float16:
        weight, mask = torch.float32, torch.float32

    def layer(x, w, m, b, bm):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "inside"):
            return mm.masked_linear(x, w, m, b, bm)

    def run(function):
        x, w, m, b, bm = inputs()
        given = leaves([x.to(weight), w.to(weight), m.to(mask), b.to(weight), bm.to(mask)])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "outside"):
            y = function(*given)
        return [y, *torch.autograd.grad(y, given, torch.ones_like(y).cumsum(0))]

    counted = Compiled(COUNTED)
    for got, wanted in zip(run(counted(layer)), run(layer)):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert counted.ops == {"masked_linear": 1, "masked_linear_backward": 1}


def test_ten_temperatures_make_two_graphs_at_most(every_size):
    x, w, m, *_ = inputs()
    counters.clear()
    function = torch.compile(lambda temperature: mm.masked_linear(x, w, m, temperature=temperature), backend="aot_eager")
    for step in range(10):
        temperature = 1 / (1 + step)
        torch.testing.assert_close(function(temperature), mm.masked_linear(x, w, m, temperature=temperature))
    assert counters["stats"]["unique_graphs"] <= 2


def test_small_weights_are_plain():
    compiled = Compiled(COUNTED)
    function = compiled(lambda x, w, m: mm.masked_linear(x, w, m), dynamic=None)
    for rows, ops in ((255, {}), (256, {"masked_linear": 1})):
        function(torch.ones(2, 256), torch.ones(rows, 256), torch.ones(rows, 256))
        assert compiled.ops == ops


def test_what_is_plain_where_the_graph_runs():
    x = torch.ones(2)
    assert not dispatch.is_plain([x, None], 1.0)
    assert dispatch.is_plain([None, TwoTensor(x, x)])
    assert dispatch.is_plain([x.to("meta")])
    with torch.autograd.forward_ad.dual_level():
        assert dispatch.has_tangent(torch.autograd.forward_ad.make_dual(x, x)) and not dispatch.has_tangent(x)
        assert dispatch.is_plain([x])
    with torch.inference_mode():
        assert not dispatch.is_plain([torch.ones(2)])


def test_a_tensor_made_of_others_is_plain(every_size):
    x, w, m, b, bm = inputs()
    compiled = Compiled(COUNTED)
    got = compiled(ours)(TwoTensor(x, x), w, m, b, bm)
    torch.testing.assert_close(got.a, plain(x, w, m, b, bm))
    assert compiled.ops == {}


def test_exported_programs_hold_no_op_of_the_library(every_size):
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.convolution = mm.nn.MaskedLinear(80, 6), mm.nn.MaskedConv2d(8, 80, 3)

        def forward(self, x, slots, masks, bits):
            y = self.linear(self.convolution(x).flatten(1))
            y = y + mm.task_masked_linear(y, slots, self.linear.weight[:, :6], masks)
            return mm.packed_masked_linear(y, slots, self.linear.weight[:, :6], bits)

    given = torch.ones(1, 8, 3, 3), torch.zeros(1, dtype=torch.int64), torch.ones(2, 6, 6), torch.ones(2, 6, 1, dtype=torch.uint8)
    for strict in (False, True):
        program = torch.export.export(Layers(), given, strict=strict)
        assert list(metamask_nodes(program.graph_module)) == []


def test_options_of_inductor(every_size, of_inductor):
    function = torch.compile(loss_of(ours), fullgraph=True, **of_inductor)
    got, wanted = (loss_and_gradients(each, leaves(inputs())) for each in (function, loss_of(plain)))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


STALE = """
import torch, metamask_ext as mm
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
function = torch.compile(lambda x, w, m: mm.masked_linear(x, w, m), fullgraph=True)
tensors = [torch.ones(*shape) for shape in ((2, 256), (256, 256), (256, 256))]
function(*tensors)
with profile(activities=[ProfilerActivity.CPU]) as profiler:
    function(*tensors)
ran = any(event.key == "metamask::masked_linear" for event in profiler.key_averages())
print("RAN", ran, counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_saved"])
"""


def test_changed_code_is_not_hidden_by_what_torch_kept_on_disk(tmp_path):
    package = Path(mm.__file__).parent
    shutil.copytree(
        package, tmp_path / "metamask_ext", ignore=shutil.ignore_patterns("bench", "__pycache__", "data", "experiments")
    )

    def run():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", STALE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return next(line for line in done.stdout.splitlines() if line.startswith("RAN"))

    assert run() == "RAN True 0 1"
    source = tmp_path / "metamask_ext" / "ops" / "dispatch.py"
    source.write_text(source.read_text().replace("SMALLEST = 2**16", "SMALLEST = 2**17"))
    assert run() == "RAN False 0 1"
