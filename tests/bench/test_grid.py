"""The suite grid: its points, the samples that are checked, floors and targets by hand, and runs that are stopped and go on.

No time is asserted.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from metamask_ext.bench import (
    floors,
    grid,
    grid_estimate,
    grid_tables,
    group,
    group_check,
    machine,
    measure,
    report,
    results_json,
    run,
    samples,
    targets,
)
from metamask_ext.bench.cases import SUITES
from rich.console import Console

CASES = {case.id: case for case in SUITES["grid"]}
MACHINE = {
    "cpu": "CPU",
    "processor": "zen4",
    "cores": 2,
    "threads": 2,
    "instruction_set": "avx512_bf16",
    "memory_gib": 8.0,
    "gpu": None,
    "torch": "2.x",
    "metamask_ext": "0.1",
    "commit": None,
}


def points(quick=False, full=False):
    """The allocators of each point, by its name."""
    cases = [case for case in SUITES["grid"] if case.quick or not quick]
    found = {}
    for job in run._jobs(cases, quick, full):
        for case in job.cases:
            found.setdefault(case.id, []).append(job.allocator)
    return found


def test_the_points_of_a_run():
    usual = points()
    timed = {id: allocators for id, allocators in usual.items() if "copy" not in id}
    assert sum(map(len, timed.values())) == 3 * 6 * (8 + 3 + 3)
    assert timed["grid/forward-16384x4096x4096"] == ["tuned"]
    assert sorted(timed["grid/backward-256x768x3072"]) == ["default", "tuned"]
    assert timed["grid/bfloat16-fused-step-4096x1024x1024"] == ["tuned"]
    assert "grid/bfloat16-forward-1x64x64" not in usual
    full = points(full=True)
    assert all(len(allocators) == (1 if "copy" in id else 2) for id, allocators in full.items())
    assert len(full) == 3 * 6 * 8 * 2 + 12
    quick = points(quick=True)
    assert quick == {id: ["tuned"] for id in quick}
    assert list(quick) == ["grid/copy-64x64", *(f"grid/{m}-{b}x64x64" for b in (8, 256) for m in grid.MODES)]


def test_a_process_measures_one_weight_by_ascending_batches():
    jobs = run._jobs(SUITES["grid"], False, False)
    assert len(jobs) == 18
    for job in jobs:
        assert len({case.group for case in job.cases}) == 1
        batches = [grid.sizes_of(case.shape)[0] for case in job.cases if not case.quantities]
        assert batches == sorted(batches) and len(batches) in (9, 24)


def test_the_estimate_is_at_most_40_minutes_and_counts_operations():
    assert grid_estimate.minutes([job.cases for job in run._jobs(SUITES["grid"], False, False)]) <= 40
    # 2 * 16384 * 4096 * 4096 operations at 150 GFLOP/s, four contenders, a check and three rounds.
    products = 2 * 16384 * 4096 * 4096 / 150e9 * 4 * 4
    assert products < grid_estimate.seconds("forward", 16384, 4096, 4096) < 1.2 * products


@pytest.mark.parametrize(
    ("known", "used", "name"),
    [
        ({"vendor_id_raw": "AuthenticAMD", "family": 25, "flags": ["avx512_bf16"]}, "avx512_bf16", "zen4"),
        ({"vendor_id_raw": "AuthenticAMD", "family": 26, "flags": ["avx512_bf16"]}, "avx512_bf16", "zen5"),
        ({"vendor_id_raw": "AuthenticAMD", "family": 25, "flags": ["avx512_bf16"]}, "avx2", "zen4-avx2"),
        ({"vendor_id_raw": "AuthenticAMD", "family": 25, "brand_raw": "AMD EPYC 7763"}, "avx512_bf16", "amd-epyc-7763"),
        ({"family": 25, "flags": ["avx512_bf16"]}, None, "unknown-none"),
        ({"family": 6, "brand_raw": "Intel(R) Xeon(R) @ 2.0GHz"}, "avx512_bf16", "intel-r-xeon-r-2-0ghz"),
    ],
)
def test_the_name_of_a_processor(known, used, name):
    assert machine.processor(known, used, ["default", "avx2", "avx512", "avx512_bf16"]) == name


def test_floors_worked_out_by_hand():
    assert floors.operations("forward", 3, 5, 7) == 210 and floors.operations("fused-step", 3, 5, 7) == 630
    moved = {(mode, masked): floors.moved(mode, 3, 5, 7, 4, masked) for mode in grid.MODES for masked in (True, False)}
    assert moved == {
        ("forward", True): 4 * (70 + 36),
        ("forward", False): 4 * (35 + 36),
        ("backward", True): 4 * (210 + 87),
        ("backward", False): 4 * (105 + 87),
        ("fused-step", True): 4 * (210 + 87),
        ("fused-step", False): 4 * (210 + 87),
    }
    # 424 and 284 bytes, and 210 operations: both wait for memory, one does, none does.
    assert floors.ratio("forward", (3, 5, 7), 4, 1.0, 1.0) == 424 / 284
    assert floors.ratio("forward", (3, 5, 7), 4, 1.0, 0.7) == 424 / 300
    assert floors.ratio("forward", (3, 5, 7), 4, 1.0, 0.1) == 1.0


def point(mode, batch, weight, dense=1.0, plain=1.0, seconds=1.0, allocator="tuned", **more):
    shape = grid.shape_name(batch, *weight)
    common = {"case": f"grid/{mode}-{shape}", "measure": mode, "shape": shape, "allocator": allocator}
    ratios = {"metamask/dense": dense, "eager/metamask": 1.5 * plain, "compiled/metamask": plain}
    return {
        **common,
        "status": "measured",
        "dtype": "float32",
        "not_measured": {},
        "cpu_share_of_others": 0.0,
        "contenders": {"dense": {"median": seconds * 1e9}},
        "ratios": {name: {"of_medians": value} for name, value in ratios.items()},
        **more,
    }


def copied(weight, rate):
    shape = grid.shape_name(*weight)
    common = {"case": f"grid/copy-{shape}", "measure": "copy", "shape": shape, "allocator": "tuned", "status": "measured"}
    return {**common, "quantities": {grid.COPY: rate}}


def results_of(*rows, quick=False):
    given = {"format": 2, "suite": "grid", "quick": quick, "date": "2026-01-02", "seconds": 1.0, "machine": MACHINE}
    return {**given, "rows": list(rows)}


def test_the_rates_of_a_run_are_its_fastest_dense_product_and_the_copy_of_a_weight_as_large():
    small, large = (64, 64), (256, 256)
    rows = [
        copied(small, 1e-9),  # its time is that of the call: the copy of the larger weight is faster
        copied(large, 40e-9),  # 40 bytes a second
        point("forward", 1, small, seconds=1.0),
        point("forward", 256, large, seconds=2.0),
        {**point("forward", 1, large), "status": "failed", "reason": "wrong"},
    ]
    peak = 2 * 256 * 256 * 256 / 2.0
    expected = {
        ("forward", "1x64x64", "tuned"): floors.ratio("forward", (1, 64, 64), 4, 40.0, peak),
        ("forward", "256x256x256", "tuned"): floors.ratio("forward", (256, 256, 256), 4, 40.0, peak),
    }
    assert floors.ratios(results_of(*rows)) == pytest.approx(expected)
    assert 1.0 < expected["forward", "1x64x64", "tuned"] < 2.0
    assert floors.ratios(results_of(*rows[2:])) == {}


def test_targets_against_floors_and_growth_worked_out_by_hand(monkeypatch):
    weight = (64, 64)
    monkeypatch.setattr(
        floors, "ratios", lambda results: {("forward", f"{b}x64x64", "tuned"): f for b, f in ((8, 2.0), (256, 1.0))}
    )
    shapes, limits = ("8x64x64", "256x64x64"), {"tuned": 1.0}
    its = [
        targets.FloorTarget("floor", "forward", shapes, "metamask/dense", limits, True),
        targets.GrowthTarget("growth", "forward", ("16384x64x64",), "metamask/dense", {"tuned": 0.05}, True, where="there"),
        targets.Target("few", "forward", shapes, "eager or compiled/metamask", {"default": 1.0, "tuned": 1.0}, True, shapes[:1]),
    ]
    monkeypatch.setitem(targets.TARGETS, "grid", its)
    rows = [point("forward", 8, weight, 2.2), point("forward", 256, weight, 1.15), point("forward", 16384, weight, 1.21, 0.9)]
    rows += [point("forward", 8, weight, plain=2.0, allocator="default")]
    floor, growth, few = targets.table(results_of(*rows))[1:]
    # 2.2 of 1.1 * 2.0 allowed, and 1.15 of 1.15; 1.21 - 1.15.
    assert floor[1:] == ["8x64x64 256x64x64", "metamask/dense, each", "", "1.00 (at most 1)", "yes"]
    assert growth[1:] == ["there", "metamask/dense, each", "", "0.06 (at most 0.05)", "**no**"]
    assert few[3:] == ["2.00 (at least 1)", "1.00 (at least 1)", "yes"]
    rows[1] = point("forward", 256, weight, 1.2)
    assert targets.table(results_of(*rows))[1][4:] == ["1.04 (at most 1)", "**no**"]
    # The limits of the default allocator and of bfloat16 are for the batches that are measured without --full.
    monkeypatch.undo()
    usual = points()
    for target in targets.TARGETS["grid"]:
        for allocator in target.limits:
            for shape in target._shapes(allocator):
                assert allocator in usual[f"grid/{target.measure}-{shape}"]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 4096])
def test_samples_are_in_order_and_have_the_ends(size):
    picked = samples.picked(size)
    assert len(picked) == min(size, 32) and picked.unique().equal(picked)
    assert {0, size - 1} <= set(picked.tolist())
    assert samples.picked.__wrapped__(size).equal(picked)


@pytest.mark.parametrize("mode", grid.MODES)
@pytest.mark.parametrize("contender", ["eager", "dense"])
def test_the_samples_of_float64_are_those_of_the_whole_results(mode, contender):
    problem = grid.problem(40, 48, 36, mode, torch.float32)
    its = problem.contenders[contender]
    names, exact = its.results, its.exact()
    found = samples.exact(problem.layer, names, contender != "dense")
    expected = [sample for result in exact for sample in samples.taken(result)]
    assert len(found) == len(expected) == len(samples.named(names)) == 2 * len(names)
    assert [list(sample.shape) for sample in found[:2]] == [[32, 36], [40, 32]]
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def ends(size):
    """A row, or column, that is compared, and one that is not."""
    picked = samples.picked(size).tolist()
    return picked[5], next(number for number in range(size) if number not in picked)


@pytest.mark.parametrize("id", ["grid/backward-256x64x64", "grid/fused-step-256x64x64", "grid/bfloat16-backward-256x64x64"])
def test_a_wrong_row_column_shape_or_dtype_is_refused(id):
    exact = group_check._Exact(id)
    contender = CASES[id].problem().contenders["metamask"]
    right = [result.detach().clone() for result in contender.work()]

    def check(results):
        got = [sample for result in results for sample in samples.taken(result)]
        return exact.worst_error("metamask", [list(result.shape) for result in results], got)

    assert 0.0 < check(right) <= 1.0
    for index, name in enumerate(contender.results):
        rows, columns = (ends(size) for size in right[index].shape)
        for place in ((rows[0], columns[1]), (rows[1], columns[0])):
            wrong = right[index].clone()
            wrong[place] += 1.0 + wrong[place].abs()
            with pytest.raises(AssertionError, match=f"{name}, sampled .* of metamask is wrong in"):
                check([*right[:index], wrong, *right[index + 1 :]])
        with pytest.raises(AssertionError, match=f"{name} of metamask has shape"):
            check([*right[:index], right[index][:, :-1], *right[index + 1 :]])
        with pytest.raises(AssertionError, match=f"{name}, sampled rows of metamask is torch.float64"):
            check([*right[:index], right[index].double(), *right[index + 1 :]])


def test_rounds_of_slow_and_fast_points():
    assert measure.choose_rounds({"metamask": lambda: None}, 5, 2.0) == measure.MAX_ROUNDS
    assert measure.choose_rounds({"metamask": lambda: None}, 5, 0.0) == 5


def fake_group(monkeypatch, *ends):
    """Replaces the processes of groups: each ends after so many cases, by an error. Returns the cases that were measured."""
    done, ends = [], iter(ends)

    def measured(cases, allocator):
        end, error = next(ends, (len(cases), None))
        for case in cases[:end]:
            done.append(case.id)
            if case.quantities:
                yield {"quantities": {grid.COPY: 1.0}}
            elif case.measure == "backward":
                yield {"failed": "output of metamask is wrong"}
            else:
                row = point(case.measure, *grid.sizes_of(case.shape)[:1], grid.sizes_of(case.shape)[1:])
                yield {key: row[key] for key in ("dtype", "contenders", "ratios", "not_measured", "cpu_share_of_others")}
        if error is not None:
            raise error

    monkeypatch.setattr(group, "measured", measured)
    monkeypatch.setattr(run, "describe_machine", lambda: dict(MACHINE))
    return done


QUICK = list(points(quick=True))


def test_a_stopped_run_goes_on_in_the_same_folder(tmp_path, monkeypatch, capsys):
    done = fake_group(monkeypatch, (3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.run("grid", tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["grid-zen4.json"]
    rows = results_json.read(tmp_path / "grid-zen4.json")["rows"]
    assert [row["status"] for row in rows] == ["measured"] * 2 + ["failed"] + ["not measured"] * 4
    assert rows[1]["dtype"] == "float32" and rows[3]["reason"] == "the run ended before it"

    done.clear()
    assert run.run("grid", tmp_path, quick=True) == 1  # what failed is tried again, and fails again
    assert done == QUICK[2:]
    after = results_json.read(tmp_path / "grid-zen4.json")["rows"]
    assert after[:2] == rows[:2] and [row["case"] for row in after] == QUICK
    assert {path.name for path in tmp_path.iterdir()} == {
        "grid-zen4.json", "grid-zen4-dense.png", "grid-zen4-plain.png", "table.md"
    }  # fmt: skip
    assert "failed: grid/backward-8x64x64, tuned allocator" in " ".join(capsys.readouterr().out.split())


def test_after_a_process_that_died_the_others_are_measured_in_a_new_one(tmp_path, monkeypatch):
    done = fake_group(monkeypatch, (1, group.CaseError("its process ended with exit code -9")))
    assert run.run("grid", tmp_path, quick=True) == 1
    assert done == [QUICK[0], *QUICK[2:]]
    died = results_json.read(tmp_path / "grid-zen4.json")["rows"][1]
    assert (died["status"], died["reason"]) == ("failed", "its process ended with exit code -9")


def test_results_of_another_run_are_not_mixed_with_these(tmp_path, monkeypatch, capsys):
    path = tmp_path / "grid-zen4.json"
    done = fake_group(monkeypatch)
    others = [({**MACHINE, "commit": "abc"}, True, "another commit"), ({**MACHINE, "threads": 1}, False, "another quick, threads")]
    for its, quick, message in others:
        results_json.save({**results_of(quick=quick), "machine": its}, path)
        assert run.run("grid", tmp_path, quick=True) == 2
        assert message in capsys.readouterr().err
    path.write_text("[]")
    assert run.run("grid", tmp_path, quick=True) == 2
    assert "must hold results of this suite" in capsys.readouterr().err
    assert run.run("cpu", tmp_path, full=True) == run.run("grid", tmp_path, quick=True, full=True) == 2
    assert "full is for the suite 'grid' alone" in capsys.readouterr().err
    assert not done


WEIGHT = (256, 256)
SHOWN = results_of(
    copied(WEIGHT, 1e-9),
    point("forward", 8, WEIGHT, 1.234, 2.0, seconds=1e9),
    point("forward", 256, WEIGHT, 0.9, 0.987, seconds=1e-3),
    {**point("backward", 8, WEIGHT), "status": "failed", "reason": "wrong", "ratios": {}},
    point("forward", 8, WEIGHT, 1.0, 1.0, allocator="default"),
)


def test_tables_worked_out_by_hand():
    dense, plain, default, _ = grid_tables.tables(SHOWN)
    assert dense.title == "metamask / dense (the ratio of the floors), float32, tuned allocator"
    waits = f"1.23 ({(2 * 256 * 256 + 8 * 512) / (256 * 256 + 8 * 512):.2f})"
    other = f"0.90 ({floors.ratios(SHOWN)['forward', '256x256x256', 'tuned']:.2f})"
    assert dense.cells == [
        ["measure", "inputs x outputs", "batch 8", "batch 256"],
        ["forward", "256 x 256", waits, other],
        ["backward", "256 x 256", "failed", ""],
    ]
    assert plain.cells[1:] == [["forward", "256 x 256", "2.00", "0.99"], ["backward", "256 x 256", "failed", ""]]
    assert default.cells[0] == ["measure", "inputs x outputs", "batch 8"]


def test_the_page_gets_tables_and_maps(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("a\n<!-- bench:grid:zen4 -->\nold\n<!-- /bench:grid:zen4 -->\nb\n<!-- bench:grid:zen5 -->\n")
    report.update(page, SHOWN)
    text = page.read_text()
    assert text.startswith("a\n<!-- bench:grid:zen4 -->\n![metamask / dense, zen4](grid-zen4-dense.png)\n\n![best of eager")
    note = "Failed (backward 8x256x256, tuned allocator): wrong."
    assert text.endswith(f"2026-01-02.\n{note}\n<!-- /bench:grid:zen4 -->\nb\n<!-- bench:grid:zen5 -->\n")
    assert "| forward | 256 x 256 | 2.00 | 0.99 |" in text and "slower" not in text
    for name in ("dense", "plain"):
        assert (tmp_path / f"grid-zen4-{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="bench:grid:zen6"):
        report.update(page, {**SHOWN, "machine": {**MACHINE, "processor": "zen6"}})


def test_a_quick_run_is_shown_without_targets(tmp_path, capsys):
    report.write({**SHOWN, "quick": True}, tmp_path, Console(width=200))
    said = capsys.readouterr().out
    assert "1.23" in said and "at most" not in said
    assert "at most" not in (tmp_path / "table.md").read_text()


def test_a_point_is_measured_and_checked_in_processes_of_its_own(tmp_path, monkeypatch):
    # Without a compiler: compiling takes longer than all of the rest.
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    wanted = ["grid/copy-64x64", "grid/forward-8x64x64", "grid/fused-step-256x64x64"]
    assert run.run("grid", tmp_path / "out", quick=True, only=wanted) == 0
    (path,) = (tmp_path / "out").glob("grid-*.json")
    copy, *measured = json.loads(path.read_text())["rows"]
    assert copy["quantities"][grid.COPY] > 0
    assert [row["case"] for row in measured] == wanted[1:]
    for row in measured:
        assert (row["status"], row["allocator"], row["dtype"]) == ("measured", "tuned", "float32")
        assert row["contenders"].keys() == row["error_over_tolerance"].keys() == {"metamask", "eager", "dense"}
        assert all(0.0 < error <= 1.0 for error in row["error_over_tolerance"].values())
        assert all(len(times["times"]) == row["rounds"] >= grid.FEWEST for times in row["contenders"].values())
        assert "C++ compiler" in row["not_measured"]["compiled"]


def broken(*given):
    """As :func:`metamask_ext.bench.grid.problem`, with a contender whose result is wrong."""
    problem = grid.problem(*given)
    eager = problem.contenders["eager"]
    wrong = replace(eager, work=lambda: tuple(result + 1.0 for result in eager.work()))
    return replace(problem, contenders={"eager": wrong, "dense": problem.contenders["dense"]})


def test_the_check_says_what_is_wrong_and_that_its_process_died():
    id, problem = "grid/forward-8x64x64", broken(8, 64, 64, "forward", torch.float32)
    with group_check.Checker() as checker:
        with pytest.raises(AssertionError, match="output, sampled rows of eager is wrong in 512 of 512"):
            checker.worst_error(id, "eager", problem.contenders["eager"].work())
        assert checker.worst_error(id, "dense", problem.contenders["dense"].work()) <= 1.0
        checker._process.kill()
        with pytest.raises(AssertionError, match=f"the check of {id} ended without a result, exit code -9"):
            checker.worst_error(id, "dense", problem.contenders["dense"].work())


def test_short_table_of_the_grid(tmp_path):
    weight = (1024, 1024)
    results = results_of(point("forward", 1, weight, 2.5, 1.25), point("fused-step", 32, weight, 0.987, 1.5))
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- bench:grid:zen4:short -->\nold\n<!-- /bench:grid:zen4:short -->\nb\n")
    report.update(page, results)
    lines = page.read_text().splitlines()
    assert lines[2].startswith("| batch x inputs -> outputs | forward / dense |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:10]]
    absent = "not measured"
    assert rows[0] == ["1 x 1024 -> 1024", "2.50", absent, absent, "1.25", absent, absent]
    assert rows[2] == ["32 x 1024 -> 1024", absent, absent, "0.99", absent, absent, "1.50"]
    assert rows[1][1:] == rows[5][1:] == [absent] * 6 and rows[5][0] == "16,384 x 768 -> 768"
    assert "2026-01-02." in lines[11] and lines[-2:] == ["<!-- /bench:grid:zen4:short -->", "b"]
    assert list(tmp_path.iterdir()) == [page], "no heat map for the short table"
