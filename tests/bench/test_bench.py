"""The benchmark harness: its checks catch wrong results, its numbers follow from its times, its table is right.

No time is asserted.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
from metamask_ext.bench import bank, layers, measure, report, results_json, run, tables, targets
from metamask_ext.bench import plot as plots
from metamask_ext.bench.cases import SUITES, Case

# One case of each measure; of those that are large, the same work on other sizes.
SIZES = {
    "resnet18-step": (3, 32),
    "resnet18-fused-step": (3, 32),
    "vit-tiny-fused-step": (3, 32, 1),
    "bert-mini-fused-step": (3, 5, 1),
    "packed-forward": (3, 40, 5),
    "mixed-task-forward": (3, 2, 40),
    "mixed-task-backward": (3, 2, 40),
    "one-shot-inference": (5, 3),
    "compiled-layers-forward": (2, 8),
    "compiled-layers-backward": (2, 8),
}
SMALLEST = {}
for _cases in SUITES.values():
    for _case in _cases:
        if _case.quantities or _case.suite == "cuda":  # whose cases test_cuda_suite.py has
            continue
        if _case.measure in SIZES:
            sizes = SIZES[_case.measure]
            build = partial(_case.build.func, *sizes, *_case.build.args[len(sizes) :])
            _case = replace(_case, shape="x".join(map(str, sizes)), build=build)
        SMALLEST.setdefault((_case.suite, _case.measure), _case)
SMALLEST = {case.id: case for case in SMALLEST.values()}


def eager_problem(case):
    """The case without its compiled contenders, which would take seconds to compile."""
    problem = case.build()
    for name in ("compiled", "compiled-ours"):
        problem.contenders.pop(name, None)
    return problem


def test_cases_have_unique_ids_and_a_quick_form():
    ids = [case.id for cases in SUITES.values() for case in cases]
    assert len(ids) == len(set(ids))
    assert all(any(case.quick for case in cases) for cases in SUITES.values())
    assert "core/masked_linear-forward-32x1024" in ids and "cpu/masked_linear-fused-step-8x1024" in ids


@pytest.mark.parametrize("case", SMALLEST.values(), ids=SMALLEST)
def test_check_passes_and_refuses_any_wrong_result(case):
    problem = eager_problem(case)
    checked = measure.check(problem)
    assert checked.errors.keys() == problem.contenders.keys()
    assert all(error <= 1.0 for error in checked.errors.values())

    masked = eager_problem(case).contenders["metamask"]
    exact = masked.exact()
    right = [result.detach().clone() for result in masked.work()]
    # What rounds to 8 bits, or is compared by its norm, may differ by more.
    scale = 1.001 if problem.dtype == torch.float32 and problem.tolerance is None else 1.2
    damages = (lambda t: t.fill_(math.nan), lambda t: t.mul_(scale), lambda t: t.view(-1)[-1:].add_(1.0))
    for index, what in enumerate(masked.results):
        for damage in damages:
            results = list(right)
            results[index] = right[index].clone()
            damage(results[index])
            damaged = replace(masked, work=lambda results=results: tuple(results), exact=lambda: exact)
            with pytest.raises(AssertionError, match=f"{what} of metamask is wrong"):
                measure.check(replace(problem, contenders={"metamask": damaged}))


def test_check_refuses_a_wrong_shape_and_dtype():
    case = SMALLEST["core/masked_linear-forward-10x40"]
    for change, message in (
        (lambda t: t[:1], r"shape \[1, 40\], not \[10, 40\]"),
        (torch.Tensor.double, "float64, not torch.float32"),
    ):
        problem = eager_problem(case)
        masked = problem.contenders["metamask"]
        problem.contenders["metamask"] = replace(masked, work=lambda masked=masked, change=change: (change(masked.work()[0]),))
        with pytest.raises(AssertionError, match=message):
            measure.check(problem)


@pytest.mark.parametrize(("name", "contender"), [("MASKED", "metamask"), ("EAGER", "eager"), ("DENSE", "dense")])
def test_check_refuses_a_wrong_layer(monkeypatch, name, contender):
    right = getattr(layers, name)
    case = SMALLEST["core/masked_linear-forward-10x40"]
    problem = eager_problem(case)
    wrong = right._replace(linear=lambda x, w, m: right.linear(x, w, m) + 1e-3)
    monkeypatch.setattr(layers, name, wrong)
    work = eager_problem(case).contenders[contender].work
    problem.contenders[contender] = replace(problem.contenders[contender], work=work)
    with pytest.raises(AssertionError, match=f"output of {contender} is wrong in"):
        measure.check(problem)


def wrong_case():
    """A case that can be sent to another process, whose eager contender ignores the mask."""
    problem = eager_problem(SMALLEST["core/masked_linear-forward-10x40"])
    dense = problem.contenders["dense"].work
    problem.contenders["eager"] = replace(problem.contenders["eager"], work=dense)
    return problem


def test_check_in_its_own_process_refuses_a_wrong_contender():
    with pytest.raises(AssertionError, match="output of eager is wrong in"):
        measure.check_apart(Case("core", "wrong", "10x40", wrong_case))


def test_every_contender_of_a_step_does_the_work_of_one_step():
    problem = eager_problem(SMALLEST["core/masked_linear-step-10x40"])
    masked = ("output", "gradient of input", "gradient of weight 1", "gradient of mask 1", "weight 1", "mask 1")
    dense = ("output", "gradient of input", "gradient of weight 1", "weight 1")
    assert {name: contender.results for name, contender in problem.contenders.items()} == {
        "metamask": masked,
        "eager": masked,
        "dense": dense,
    }


def test_summary_of_times_worked_out_by_hand():
    summary = measure.summarise({"metamask": [10, 20, 30], "eager": [20, 60, 45], "dense": [5, 20, 60]})
    assert summary["ratios"] == {
        # medians 45 and 20; rounds 2, 3, 1.5
        "eager/metamask": {"of_medians": 2.25, "per_round": 2.0, "iqr": 0.75},
        # medians 20 and 20; rounds 2, 1, 0.5
        "metamask/dense": {"of_medians": 1.0, "per_round": 1.0, "iqr": 0.75},
    }
    assert summary["contenders"]["metamask"] == {"median": 20, "iqr": 10.0, "times": [10, 20, 30]}
    compiled = measure.summarise({"metamask": [10, 20, 30], "compiled": [30, 60, 60], "compiled-ours": [20, 20, 20]})
    assert compiled["ratios"].keys() == {"compiled/metamask", "compiled/compiled-ours"}
    assert compiled["ratios"]["compiled/compiled-ours"]["of_medians"] == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.98, "0.98"), (0.996, "1.0"), (1.04, "1.0"), (1.06, "1.1"), (12.4, "12"), (99.6, "100"), (123.0, "120"), (0.0123, "0.012")],
)
def test_two_digits(value, text):
    assert tables.two_digits(value) == text


def row(shape, allocator, eager=None, dense=None, **more):
    ratios = {"eager/metamask": eager, "metamask/dense": dense}
    given = {name: {"of_medians": value} for name, value in ratios.items() if value is not None}
    times = {"metamask": {"median": 10}, "eager": {"median": 10 * (eager or 1)}}
    common = {"case": f"core/m-{shape}", "measure": "m", "shape": shape, "allocator": allocator}
    measured = {"status": "measured", "not_measured": {}, "cpu_share_of_others": 0.0, "ratios": given, "contenders": times}
    return {**common, **measured, **more}


MACHINE = {
    "cpu": "CPU",
    "cores": 4,
    "threads": 2,
    "instruction_set": "avx2",
    "memory_gib": 8.0,
    "gpu": None,
    "torch": "2.x",
    "metamask_ext": "0.1",
    "commit": None,
}
FAILED = {
    "case": "core/m-3x4",
    "measure": "m",
    "shape": "3x4",
    "allocator": "tuned",
    "status": "failed",
    "reason": "output of metamask is wrong",
}
RESULTS = {
    "suite": "core",
    "date": "2026-01-02",
    "machine": MACHINE,
    "rows": [
        row("1x2", "default", eager=2.0, dense=0.5),
        row("1x2", "tuned", eager=0.9, dense=1.25, cpu_share_of_others=0.25),
        row("3x4", "default", eager=8.0, dense=2.0),
        FAILED,
        row("5x6", "default", eager=0.5, not_measured={"dense": "no such thing"}),
        row("5x6", "tuned", eager=0.4, not_measured={"dense": "no such thing"}),
    ],
}
# Geometric means: (2 * 8 * 0.5)^(1/3) = 2; (0.9 * 0.4)^(1/2) = 0.6; (0.5 * 2)^(1/2) = 1; 1.25 prints as 1.2 (round half to even).
TABLE = """\
| measure | shape | metamask/dense, default | metamask/dense, tuned | eager/metamask, default | eager/metamask, tuned |
|---|---|---|---|---|---|
| m | 1x2 | 0.50 | 1.2 slower | 2.0 | 0.90 slower |
| m | 3x4 | 2.0 slower | failed | 8.0 | failed |
| m | 5x6 | not measured | not measured | 0.50 slower | 0.40 slower |
| m | geometric mean | **1.0 (2 of 3)** | **1.2 (1 of 3) slower** | **2.0** | **0.60 (2 of 3) slower** |

Ratios of medians of interleaved rounds; "slower": there metamask loses. Machine: CPU, 4 cores, 2 threads, avx2, 8.0 GiB; \
torch 2.x, metamask_ext 0.1; 2026-01-02.
Failed (m 3x4, tuned allocator): output of metamask is wrong.
Not measured (m, dense): no such thing.
In 1 of 5 measurements other processes took more than 5% of the CPU time (at most 25%): those are less certain.
"""


def test_table_worked_out_by_hand():
    assert tables.markdown(RESULTS) == TABLE


def test_results_of_the_first_format_have_the_names_of_today(tmp_path):
    summary = measure.summarise({"metamask": [10, 20], "dense": [20, 40]})
    today = {
        "case": "tasks/mixed-task-forward-1x2",
        "measure": "mixed-task-forward",
        "error_over_tolerance": {"metamask": 0.5},
        **summary,
    }
    first = json.dumps(today).replace("mixed-task", "by-task").replace("metamask", "ours")
    (tmp_path / "results.json").write_text(f'{{"format": 1, "rows": [{first}]}}')
    assert results_json.read(tmp_path / "results.json")["rows"] == [today]


def test_update_replaces_only_what_is_between_the_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench:core -->\nold\n<!-- /bench:core -->\nafter <!-- bench:cuda -->\n")
    report.update(page, RESULTS)
    expected = f"before\n<!-- bench:core -->\n{TABLE}<!-- /bench:core -->\nafter <!-- bench:cuda -->\n"
    assert page.read_text() == expected
    report.update(page, RESULTS)
    assert page.read_text() == expected


@pytest.mark.parametrize(
    "text", ["", "<!-- bench:core -->", "<!-- /bench:core --><!-- bench:core -->", 2 * "<!-- bench:core --><!-- /bench:core -->"]
)
def test_update_refuses_a_page_without_its_one_pair_of_markers(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="bench:core"):
        report.update(page, RESULTS)
    assert page.read_text() == text


def result(measure, shape, allocator, **ratios):
    common = {"case": f"cpu/{measure}-{shape}", "measure": measure, "shape": shape, "allocator": allocator}
    return {**common, "status": "measured", "ratios": {name: {"of_medians": value} for name, value in ratios.items()}}


def test_targets_worked_out_by_hand(monkeypatch):
    compiled = {"compiled/metamask": 2.0, "loop/metamask": 40.0, "gather/metamask": 30.0}
    monkeypatch.setitem(
        targets.TARGETS,
        "cpu",
        [
            targets.Target("mean", "m", ("1x2", "3x4"), "metamask/dense", {"default": 1.0, "tuned": 1.0}),
            targets.Target("each", "m", ("1x2", "3x4"), "metamask/dense", {"default": 1.9, "tuned": 2.0}, each=True),
            targets.Target("compiled", "m", ("1x2", "3x4"), "compiled/metamask", {"default": 2.0, "tuned": 2.5}),
            targets.Target("best", "m", ("1x2", "3x4"), "loop or gather/metamask", {"default": 25.0, "tuned": 30.0}, each=True),
            targets.Target("missing", "m", ("1x2",), "loop or nonsense/metamask", {"default": 25.0}),
            targets.Target("absent", "m", ("1x2", "9x9"), "metamask/dense", {"default": 1.0}),
        ],
    )
    rows = [
        result("m", "1x2", "default", **{"metamask/dense": 0.5}, **compiled),
        result("m", "3x4", "default", **{"metamask/dense": 2.0}, **compiled),
        result("m", "1x2", "tuned", **{"metamask/dense": 0.6}, **compiled),
        result("m", "3x4", "tuned", **{"metamask/dense": 2.0}, **{**compiled, "loop/metamask": 29.0}),
    ]
    _, mean, each, against, best, missing, absent = targets.table({"suite": "cpu", "rows": rows})
    # Geometric means: (0.5 * 2)^(1/2) = 1 and (0.6 * 2)^(1/2) = 1.0954
    assert mean[2:] == ["metamask/dense, geometric mean", "1.00 (at most 1)", "1.10 (at most 1)", "yes, **no**"]
    assert each[2:] == ["metamask/dense, each", "2.00 (at most 1.9)", "2.00 (at most 2)", "**no**, yes"]
    assert against[3:] == ["2.00 (at least 2)", "2.00 (at least 2.5)", "yes, **no**"]
    assert best[2:] == ["loop or gather/metamask, each", "30.00 (at least 25)", "29.00 (at least 30)", "yes, **no**"]
    assert missing[3:] == ["0 of 1 measured", "", "not measured"]
    assert absent[3:] == ["1 of 2 measured", "", "not measured"]


def quantities(measure, shape, **values):
    common = {"case": f"tasks/{measure}-{shape}", "measure": measure, "shape": shape, "allocator": "default"}
    return {**common, "status": "measured", "quantities": values}


def test_quantities_in_the_tables(monkeypatch):
    limits = {"bytes": 41_000, "seconds": 0.2, "others": 1.0}
    its = [targets.Target("of a task", "bank", ("3",), name, {"default": limit}) for name, limit in limits.items()]
    monkeypatch.setitem(targets.TARGETS, "tasks", its)
    ratios = row("1x2", "default", eager=3.0, dense=0.5)
    results = {**RESULTS, "suite": "tasks", "rows": [ratios, quantities("bank", "3", bytes=39_814, seconds=0.206)]}
    assert [line[2:] for line in targets.table(results)[1:]] == [
        ["bytes", "39,814 (at most 41,000)", "", "yes"],
        ["seconds", "0.21 (at most 0.2)", "", "**no**"],
        ["others", "0 of 1 measured", "", "not measured"],
    ]
    details = tables.details(results).split("\n\n")
    assert details[0].endswith("| m | 1x2 | 0.50 | 3.0 |")
    head = "| measure | tasks | quantity | value |\n|---|---|---|---|\n"
    assert details[1] == head + "| bank | 3 | bytes | 39,814 |\n| bank | 3 | seconds | 0.21 |"
    assert tables.quantities(RESULTS) == []


def test_a_ratio_of_contenders_that_a_case_does_not_have_is_left_blank():
    other = {**row("1x2", "default", eager=3.0, dense=0.5), "measure": "n"}
    other["ratios"] = {"loop/metamask": {"of_medians": 7.0}}
    results = {**RESULTS, "rows": [*RESULTS["rows"][:3], other]}
    table = tables.details(results)
    assert "| m | geometric mean | **1.0** | **1.2 (1 of 2) slower** | **4.0** | **0.90 (1 of 2) slower** |  |  |" in table
    assert "| n | 1x2 |  | not measured |  | not measured | 7.0 | not measured |" in table


def test_the_bytes_of_a_packed_task():
    found = bank.task_bytes(2)
    # 98, 38 and 13 bytes a row of the weights (784, 300 and 100 bits), and the bits of the biases.
    assert found["bytes a task in memory"] == 300 * 98 + 100 * 38 + 500 * 13 + 38 + 13 + 63
    assert found["bytes a task in memory"] < found["bytes a task on disk"]


def test_a_bank_is_opened_in_its_own_process_and_its_output_is_checked(monkeypatch):
    monkeypatch.setattr(bank, "PROCESSES", 1)
    found = bank.opened_bank(3)
    assert found.keys() == {"open, s", "first batch, s", "resident after it, MB", "resident after a batch of every task, MB"}
    assert all(value > 0 for value in found.values())
    right = bank._plain
    monkeypatch.setattr(bank, "_plain", lambda *given: right(*given) + 1e-2)
    with pytest.raises(AssertionError, match="a bank of 3 tasks: "):
        bank.opened_bank(3)


def test_every_target_is_for_cases_that_exist():
    for suite, its in targets.TARGETS.items():
        ids = {case.id for case in SUITES[suite]}
        assert {f"{suite}/{target.measure}-{shape}" for target in its for shape in target.shapes} <= ids


def test_update_fills_in_all_ratios_where_they_are_asked_for(tmp_path):
    page = tmp_path / "cpu.md"
    page.write_text("<!-- bench:core:details -->\n<!-- /bench:core:details -->\n")
    report.update(page, RESULTS)
    assert page.read_text() == f"<!-- bench:core:details -->\n{TABLE}<!-- /bench:core:details -->\n"


def test_plot_is_written_also_when_a_case_failed(tmp_path):
    plots.plot(RESULTS, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_nothing_to_run_is_one_clear_error(tmp_path, capsys):
    assert run.run("nonsense", tmp_path) == 2
    assert capsys.readouterr().err == "suite must be one of " + ", ".join(sorted(SUITES)) + ", got 'nonsense'\n"
    assert run.run("core", tmp_path, only=["core/x"]) == 2
    assert "no case core/x; it has core/masked_weight" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "_measure", lambda case, allocator: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert run.run("core", tmp_path / "file", quick=True) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err


def test_a_run_that_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch):
    done = []

    def measure_one(case, allocator):
        if done:
            raise KeyboardInterrupt
        done.append(case.id)
        return {**row("1x2", allocator, eager=2.0), "case": case.id}

    monkeypatch.setattr(run, "_measure", measure_one)
    with pytest.raises(KeyboardInterrupt):
        run.run("core", tmp_path, quick=True)
    first, *rest = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (first["case"], first["status"]) == (done[0], "measured")
    assert rest and all((r["status"], r["reason"]) == ("not measured", "the run ended before it") for r in rest)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


TINY = "core/masked_linear-forward-10x40"


def test_run_measures_one_case_in_its_own_process(tmp_path):
    assert run.run("core", tmp_path / "out", quick=True, only=[TINY]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["format"], results["suite"], results["quick"]) == (2, "core", True)
    assert results["machine"].keys() >= {"cpu", "cores", "threads", "instruction_set", "memory_gib", "torch", "commit"}
    (measured,) = results["rows"]
    assert (measured["case"], measured["allocator"], measured["status"]) == (TINY, "default", "measured")
    assert measured["not_measured"] == {}
    contenders = measured["contenders"]
    assert (
        contenders.keys() == measured["error_over_tolerance"].keys() == {"metamask", "eager", "compiled", "compiled-ours", "dense"}
    )
    assert measured["rounds"] >= measure.MIN_ROUNDS
    for contender in contenders.values():
        assert len(contender["times"]) == measured["rounds"]
        assert contender["median"] == statistics.median(contender["times"]) > 0
    assert measured["ratios"].keys() == {"eager/metamask", "compiled/metamask", "compiled/compiled-ours", "metamask/dense"}
    for name, ratio in measured["ratios"].items():
        above, below = (contenders[part]["times"] for part in name.split("/"))
        assert ratio["of_medians"] == statistics.median(above) / statistics.median(below)
        assert ratio["per_round"] == statistics.median(a / b for a, b in zip(above, below))
    assert "masked_linear-forward | 10x40" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "ratios.png").exists()


def test_run_takes_quantities_once(tmp_path, capsys):
    case = "tasks/task-bytes-100"
    assert run.run("tasks", tmp_path, only=[case]) == 0
    (measured,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (measured["case"], measured["allocator"], measured["status"]) == (case, "default", "measured")
    assert measured["quantities"]["bytes a task in memory"] == 39_814
    assert "| bytes a task in memory | 39,814 (at most 41,000) |  | yes |" in (tmp_path / "table.md").read_text()
    assert "bytes a task in memory 39,814" in " ".join(capsys.readouterr().out.split())


def test_without_a_compiler_the_compiled_contender_is_not_measured_and_the_others_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    # What was compiled before would be found there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # Read by run's own pytest alone, this would make it fail.
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    assert run.run("core", tmp_path / "out", quick=True, only=[TINY]) == 0
    (measured,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert measured["contenders"].keys() == {"metamask", "eager", "dense"}
    assert "C++ compiler" in measured["not_measured"]["compiled"]
    assert "compiled not measured: torch.compile failed" in capsys.readouterr().out
    assert "not measured" in (tmp_path / "out" / "table.md").read_text().lower()


def test_a_case_that_fails_is_shown_and_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METAMASK_CPU_CAPABILITY", "nonsense")
    assert run.run("core", tmp_path, quick=True, only=[TINY]) == 1
    (failed,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert failed["status"] == "failed"
    assert "METAMASK_CPU_CAPABILITY" in failed["reason"]
    assert f"failed: {TINY}, default allocator" in " ".join(capsys.readouterr().out.split())
