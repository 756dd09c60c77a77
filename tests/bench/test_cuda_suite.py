"""The suite ``cuda``: its code runs here on small tensors, with a clock in place of the GPU's events. No time is asserted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from metamask_ext.bench import cuda_case, cuda_tables, machine, report, run, tables, targets
from metamask_ext.bench.cases import SUITES
from metamask_ext.bench.cuda_timing import Cpu, Gpu, copies
from rich.console import Console
from support.gpu import needs_gpu

# The sizes of each measure in place of the suite's.
SIZES = {
    "masked_weight-forward": (24,),
    "masked_weight-backward": (24,),
    "masked_linear-forward": (3, 40),
    "masked_linear-fused-step": (3, 40),
    "bfloat16-fused-step": (40, 40),
    "packed-forward": (3, 40, 5),
    "mixed-task-forward": (3, 2, 40),
}
# Elements that a case moves at least: W and M; W, M and theta; ... 5 tasks of a bit.
MOVED = {
    "masked_weight-forward": 4 * 3 * 24**2,
    "masked_weight-backward": 4 * 8 * 24**2,
    "masked_linear-forward": 4 * 2 * 40**2,
    "masked_linear-fused-step": 4 * 6 * 40**2,
    "bfloat16-fused-step": 2 * 6 * 40**2,
    "packed-forward": 4 * 40**2 + 5 * 40**2 // 8,
    "mixed-task-forward": 4 * (1 + 3) * 40**2,
}


def small(case, device="cpu"):
    sizes = SIZES[case.measure]
    build = partial(case.build.func, *sizes, *case.build.args[len(sizes) :], device=device)
    return replace(case, shape="x".join(map(str, sizes)), build=build)


SMALL = {case.measure: small(case) for case in SUITES["cuda"]}
each_measure = pytest.mark.parametrize("name", SMALL)
PLAIN = ("eager", "dense", "copy", "loop", "gather")
"""Without those that compile, which takes seconds."""


def test_every_measure_of_the_suite_is_tried_here():
    assert SIZES.keys() == MOVED.keys() == SMALL.keys()
    assert all(case.device == "cuda" and case.build.keywords == {"device": "cuda"} for case in SUITES["cuda"])


@each_measure
def test_a_case_is_checked_and_timed(name):
    timed = cuda_case.measure(SMALL[name], Cpu(), PLAIN)
    assert timed["gpu"] == "cpu" and timed["moved"] == MOVED[name] and timed["copies"] == copies(MOVED[name], Cpu())
    contenders = timed["contenders"].keys()
    assert {"metamask", "copy"} <= contenders and contenders == timed["error_over_tolerance"].keys() == timed["timed_by"].keys()
    assert all(error <= 1.0 for error in timed["error_over_tolerance"].values())
    assert set(timed["timed_by"].values()) == {"graph"} and timed["ratios"].keys() >= {"copy/metamask"}
    assert all(len(spread["times"]) == timed["rounds"] for spread in timed["contenders"].values())


@each_measure
def test_the_copy_moves_the_bytes_that_the_case_must(name):
    problem = SMALL[name].problem()
    (copied,) = problem.contenders["copy"].work()
    assert 2 * copied.nbytes == problem.moved == MOVED[name]


@each_measure
def test_a_wrong_result_is_found_before_anything_is_timed(name, monkeypatch):
    case = SMALL[name]
    monkeypatch.setattr(cuda_case, "time_all", lambda *_: pytest.fail("timed"))

    def damaged():
        problem = case.problem()
        right = problem.contenders["metamask"]
        wrong = replace(right, work=lambda: (right.work()[0].detach() + 1, *right.work()[1:]))
        return replace(problem, contenders={**problem.contenders, "metamask": wrong})

    with pytest.raises(AssertionError, match="of metamask is wrong"):
        cuda_case.measure(replace(case, build=damaged), Cpu(), ())


def test_the_compiled_contender_is_one_of_them():
    timed = cuda_case.measure(SMALL["masked_linear-fused-step"], Cpu())
    assert timed["ratios"].keys() == {"eager/metamask", "compiled/metamask", "metamask/dense", "copy/metamask"}


class Benchmark:
    """As much of pytest-benchmark as a case uses."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, arguments=(), rounds=1):
        return function(*arguments)


def test_a_case_becomes_a_row_of_the_table(monkeypatch):
    case = SMALL["packed-forward"]
    problem = case.problem()
    del problem.contenders["compiled"]
    suite = import_module("metamask_ext.bench.test_suite")
    monkeypatch.setattr(suite, "Gpu", Cpu)
    benchmark = Benchmark()
    suite.test_case(replace(case, build=lambda: problem), benchmark)
    measured = {**run._row(case, "default", "measured"), **run.combined([benchmark.extra_info])}
    text = tables.details({**RESULTS, "rows": [measured]}).splitlines()[2]
    assert text.startswith("| packed-forward | 3x40x5 | ") and text.count("not measured") == 2  # no eager, none compiled
    assert "loop/metamask" in text and "gather/metamask" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_case_and_every_target_is_not_measured(tmp_path):
    assert run.run("cuda", tmp_path) == 0
    text = (tmp_path / "table.md").read_text()
    assert text.count("| not measured |") == len(targets.TARGETS["cuda"]) and "): no GPU." in text
    details = (tmp_path / "details.md").read_text().splitlines()
    for line in details[2 : 2 + len(SUITES["cuda"])]:
        assert line.count("not measured") == 6


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (
            'test "$4" = GPU-abc || exit 7\necho "580.1, 1980, 1980, 3201, 3201, 700.00"',
            ["580.1", "1980", "1980", "3201", "3201", "700.00"],
        ),
        ("echo Unable to determine the device handle\nexit 2", ["Unable to determine the device handle"]),
        ("exit 3", ["exit code 3"]),
        (None, ["not on PATH"]),
    ],
    ids=["asked", "refuses", "fails", "absent"],
)
def test_the_clocks_are_those_of_the_card_in_use(tmp_path, monkeypatch, script, wanted):
    """By its name, since nvidia-smi counts others; and no run ends because it cannot tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="abc"))
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    state = machine._gpu_state()
    assert list(state.values()) == wanted and (len(wanted) > 1 or list(state) == ["nvidia-smi"])


MACHINE = {"cpu": "CPU", "cores": 4, "threads": 2, "instruction_set": "avx2", "memory_gib": 8.0, "gpu": "NVIDIA H200"}
MACHINE |= {"torch": "2.x", "metamask_ext": "0.1", "commit": None}


def row(shape="8x4096", gpu="NVIDIA H200", **more):
    times = {"metamask": [50_000], "copy": [40_000], "dense": [25_000], "loop": [2_000_000]}
    spreads = {name: {"median": its[0], "iqr": 0, "times": its} for name, its in times.items()}
    values = {"copy/metamask": 0.8, "metamask/dense": 2.0, "loop/metamask": 40.0}
    ratios = {name: {"of_medians": value} for name, value in values.items()}
    how = {**dict.fromkeys(times, "graph"), "loop": "events: it waits"}
    common = {"case": f"cuda/masked_linear-forward-{shape}", "measure": "masked_linear-forward", "shape": shape}
    measured = {"allocator": "default", "status": "measured", "gpu": gpu, "moved": 120_000_000, "copies": 2, "timed_by": how}
    reasons = {"compiled": "torch.compile failed: no compiler"}
    return {**common, **measured, "contenders": spreads, "ratios": ratios, "not_measured": reasons, **more}


def missing(shape):
    common = {"case": f"cuda/masked_linear-forward-{shape}", "measure": "masked_linear-forward", "shape": shape}
    return {**common, "allocator": "default", "status": "not measured", "reason": "the run ended before it"}


RESULTS = {"suite": "cuda", "date": "2026-01-02", "machine": MACHINE, "rows": [row(), missing("16x4096")]}
NO = " not measured |"
# 120 MB in 40 us are 3,000 GB/s.
TABLE = (
    "| measure | shape | metamask, us | share of copy bandwidth | metamask/dense | eager/metamask | compiled/metamask "
    "| other contenders | copy, GB/s | without a graph |\n|" + 10 * "---|" + "\n"
    "| masked_linear-forward | 8x4096 | 50.00 | 0.80 | 2.00 | not measured | not measured | loop/metamask 40.00 | 3,000 | loop |\n"
    f"| masked_linear-forward | 16x4096 |{5 * NO}  |{NO}  |\n"
)


def test_table_worked_out_by_hand(tmp_path):
    text = tables.details(RESULTS)
    assert text.startswith(TABLE + "\n")
    assert "8.0 GiB, NVIDIA H200; torch 2.x" in text
    assert "Timed by events (masked_linear-forward, loop): it waits." in text
    assert "Not measured (masked_linear-forward, compiled): torch.compile failed: no compiler." in text
    console = Console(record=True, width=300)
    report.show(RESULTS, console)
    shown = console.export_text()
    assert "suite cuda, NVIDIA H200" in shown and "3,000" in shown and "not measured" in shown


def test_two_cards_share_no_table(tmp_path):
    both = {**RESULTS, "rows": [row(), row("16x4096", gpu="NVIDIA L4")]}
    for write in (tables.details, tables.markdown, cuda_tables.mark, lambda results: report.show(results, Console(quiet=True))):
        with pytest.raises(ValueError, match="results must be of one card, got those of NVIDIA H200, NVIDIA L4: a table for each"):
            write(both)


def test_each_card_has_its_table_in_a_page(tmp_path):
    page = tmp_path / "cuda.md"
    marks = "<!-- bench:cuda:nvidia-h200:details -->\n<!-- /bench:cuda:nvidia-h200:details -->\n"
    other = "<!-- bench:cuda:nvidia-l4:details -->\nits own\n<!-- /bench:cuda:nvidia-l4:details -->\n"
    page.write_text(marks + other)
    report.update(page, RESULTS)
    assert page.read_text().startswith(marks.split("\n")[0] + "\n" + TABLE) and page.read_text().endswith(other)
    page.write_text("<!-- bench:cuda -->\n<!-- /bench:cuda -->\n")
    with pytest.raises(ValueError, match="<!-- bench:cuda:nvidia-h200 -->"):
        report.update(page, RESULTS)


@needs_gpu
@each_measure
def test_a_small_case_on_a_gpu(name):
    (case, *_) = [case for case in SUITES["cuda"] if case.measure == name]
    device = Gpu()
    device.l2_bytes = Cpu.l2_bytes  # else so small a case needs thousands of copies
    timed = cuda_case.measure(small(case, "cuda"), device, PLAIN)
    assert timed["timed_by"]["metamask"] == timed["timed_by"]["copy"] == "graph"
    assert timed["timed_by"].get("loop", "events: ").startswith("events: ")
