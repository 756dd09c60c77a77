"""The program of stages: limits, budget, resuming, crashes, its lines and its exit code. No stage itself runs here."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from gpu import command, profilers, results, runner, suite
from gpu.runner import Stage

OK = "write(ok=True)"
SCRIPT = """
import json, os, signal, subprocess, sys, time
out, stage = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--stage") + 1]
def write(**line):
    with open(out + "/results.jsonl", "a") as file:
        file.write(json.dumps({"stage": stage, "case": "case", "seconds": 0.1, **line}) + "\\n")
"""


def run(folder: Path, bodies: dict[str, str], budget: float = 60.0, seconds: float = 30.0) -> int:
    """Runs stages of these Python programs."""
    script = folder / "stage.py"

    def start(stage: Stage, limit: float) -> list[str]:
        script.write_text(f"{SCRIPT}\n{bodies[stage.name]}\n")
        return [sys.executable, "-IS", str(script), "--stage", stage.name, "--out", str(folder)]

    stages = [Stage(name, seconds, "of a test") for name in bodies]
    return runner.run_stages(stages, start, folder, budget, dict(os.environ))


def whole(folder: Path) -> dict[str, results.Line]:
    return {line["stage"]: line for line in results.read(folder) if line["case"] == results.WHOLE}


def test_no_stage_stops_the_next(tmp_path, capsys):
    """A failed result, an exit code, a signal, a stage that says nothing."""
    bodies = {
        "A": "write(ok=False, reason='off by 3')",
        "B": "write(ok=True); sys.exit(7)",
        "C": "os.kill(os.getpid(), signal.SIGSEGV)",
        "D": "pass",
        "E": OK,
    }
    assert run(tmp_path, bodies) == 1
    ended = whole(tmp_path)
    assert list(ended) == list(bodies)
    assert [line["ok"] for line in ended.values()] == [True, False, False, False, True]
    reasons = [line.get("reason") for line in ended.values()]
    assert reasons == [None, "ended with exit code 7", "ended by signal 11", "wrote no result", None]
    said = capsys.readouterr().out
    assert "not ok: A case: off by 3" in said and "5 of 8 lines of this run are ok" not in said
    assert "4 of 8 lines of this run are ok" in said


def test_a_stage_that_cannot_start_is_a_line(tmp_path):
    stages = [Stage("A", 30, "no such program"), Stage("B", 30, "of a test")]
    commands = {"A": ["/no/such/program"], "B": [sys.executable, "-IS", "-c", "pass"]}
    assert runner.run_stages(stages, lambda stage, limit: commands[stage.name], tmp_path, 60, dict(os.environ)) == 1
    assert whole(tmp_path)["A"]["reason"].startswith("did not start: ")
    assert "B" in whole(tmp_path)


def test_all_right_is_exit_code_0(tmp_path):
    assert run(tmp_path, {"A": OK, "B": OK}) == 0


def test_a_stage_has_its_time_and_leaves_no_process(tmp_path):
    sleeper = "child = subprocess.Popen(['sleep', '300']); write(ok=True, child=child.pid); time.sleep(300)"
    start = time.monotonic()
    assert run(tmp_path, {"A": sleeper, "B": OK}, seconds=3.0) == 1
    assert time.monotonic() - start < 20
    assert whole(tmp_path)["A"]["reason"] == "stopped after 3 s" and whole(tmp_path)["B"]["ok"]
    child = results.read(tmp_path)[0]["child"]
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("what the stage started outlived it")


def test_a_stage_gets_what_is_left_of_the_budget(tmp_path):
    assert run(tmp_path, {"A": OK + "; time.sleep(300)", "B": OK}, budget=1.5) == 1  # less than a stage's own 30 s
    ended = whole(tmp_path)
    assert ended["A"]["reason"].startswith("stopped after") and ended["A"]["seconds"] < 10
    assert ended["B"]["reason"] == "not started: the budget of 1.5 s is spent"


def test_every_line_has_its_fields_and_is_json(tmp_path):
    stage = results.Results(tmp_path, "S1")
    with stage.case("numbers") as line:
        line |= {"share": 0.25, "error": float("nan"), "times": {"ours": float("inf")}}
    with stage.case("wrong") as line:
        line["share"] = 3.0
        line |= {"ok": False, "reason": "off"}
    with stage.case("raises") as line:
        line["before"] = 1
        raise ValueError("said so\nand more")
    lines = results.read(tmp_path)
    assert [line["ok"] for line in lines] == [True, False, False]
    assert all(line["stage"] == "S1" and line["case"] and line["seconds"] >= 0 for line in lines)
    assert lines[0]["error"] == "nan" and lines[0]["times"] == {"ours": "inf"} and "reason" not in lines[0]
    assert lines[1]["share"] == 3.0 and lines[1]["reason"] == "off"
    assert lines[2]["before"] == 1 and lines[2]["reason"].startswith("ValueError: said so")
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"stage": "S2", "cut')
    assert results.read(tmp_path) == lines


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The whole program on a card, with a script of the test's in place of its own; returns a function that runs it."""
    script = tmp_path / "script.py"
    monkeypatch.setattr(command, "SCRIPT", script)
    monkeypatch.setattr(command, "build_emulator", lambda: None)
    monkeypatch.setattr(runner, "STAGES", tuple(Stage(name, 30, "of a test") for name in ("S0", "S1", "S2")))
    found = [runner.Found("Card One", "9.0", "90-real", None)]
    monkeypatch.setattr(runner, "probe", lambda environment: found[0] if len(found) == 1 else found.pop(0))

    def run_program(*arguments: str, body: str = OK, cards: list[runner.Found] | None = None) -> int:
        script.write_text(f"{SCRIPT}\n{body}\n")
        found[:] = cards or found
        monkeypatch.setattr(sys, "argv", ["gpu_stages", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as end:
            command.main()
        return end.value.code

    return run_program


def test_resuming_keeps_what_was_found_before(program, tmp_path):
    assert program(body="write(ok=stage != 'S1', reason='first time')") == 1
    before = results.read(tmp_path / "out")
    assert program("--from", "S1") == 0
    after = results.read(tmp_path / "out")
    assert after[: len(before)] == before and {line["stage"] for line in after[len(before) :]} == {"start", "S1", "S2"}
    assert program() == 0
    assert len(results.read(tmp_path / "out")) == len(before), "a run from the first stage begins anew"


def test_two_cards_never_share_a_file(program, tmp_path):
    program()
    before = results.read(tmp_path / "out")
    assert "is of Card One, this is Card Two" in program("--from", "S1", cards=[runner.Found("Card Two", "9.0", "90-real", None)])
    none = runner.Found(None, None, None, None)
    assert "is of Card One, this is no card" in program("--from", "S1", "--dry-run", cards=[none])
    assert "is of Card One, this is no card" in program("--dry-run", cards=[none]), "a dry run would replace what was measured"
    assert results.read(tmp_path / "out") == before
    results.Results(tmp_path / "out", "S0").write(results.MACHINE, True, 0.0, card="Card Two")
    with pytest.raises(SystemExit, match="several cards: Card One, Card Two"):
        results.card_of(results.read(tmp_path / "out"))


def test_without_a_gpu_nothing_is_run(program, tmp_path):
    none = runner.Found(None, None, "90-real", None)
    assert "torch finds no GPU" in program(cards=[none])
    assert "torch finds no GPU" in program("--ready", cards=[none])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "broken",
    [runner.Found("Card One", "9.0", None, "does not load"), runner.Found("Card One", "9.0", None, None)],
    ids=["no import", "no kernels"],
)
def test_what_does_not_import_is_built_for_this_card(program, tmp_path, monkeypatch, broken):
    log = tmp_path / "built.json"
    code = f"import json, os; json.dump(dict(os.environ), open({str(log)!r}, 'w'))"
    monkeypatch.setattr(runner, "build_command", lambda folder: [sys.executable, "-IS", "-c", code])
    good = runner.Found("Card One", "9.0", "90-real", None)
    assert program(cards=[broken, good]) == 0
    chosen = json.loads(log.read_text())
    assert chosen["METAMASK_BACKEND"] == "cuda" and chosen["TORCH_CUDA_ARCH_LIST"] == "9.0" and chosen["MAX_JOBS"] == "16"
    line = results.read(tmp_path / "out")[0]
    assert line["stage"] == "build" and line["ok"] and line["because"]
    assert "no stage can run" in program(cards=[broken, broken])
    assert not results.read(tmp_path / "out")[-1]["ok"]


def test_building_needs_no_registry():
    built = runner.build_command(Path("/folder"))
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(built) and str(runner.ROOT) in built


def test_results_are_kept_under_the_name_of_their_card(tmp_path):
    out, into = tmp_path / "out", tmp_path / "kept"
    into.mkdir()
    with pytest.raises(SystemExit, match="names no card"):
        results.keep(out, into)
    results.Results(out, "S0").write(results.MACHINE, True, 0.0, card="NVIDIA H200 NVL")
    assert [path.name for path in results.keep(out, into)] == ["nvidia-h200-nvl.stages.jsonl"]
    (out / "bench").mkdir()
    (out / "bench" / "results.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H200 NVL"}}))
    assert [path.name for path in results.keep(out, into)] == ["nvidia-h200-nvl.stages.jsonl", "nvidia-h200-nvl.json"]
    (out / "bench" / "results.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA A100"}}))
    with pytest.raises(SystemExit, match="is of NVIDIA A100"):
        results.keep(out, into)


def test_what_the_tools_say_is_read():
    assert profilers.errors("========= ERROR SUMMARY: 3 errors\n") == 3
    assert profilers.errors("========= ERROR SUMMARY: 0 errors\n") == 0
    assert profilers.errors("========= RACECHECK SUMMARY: 12 hazards displayed (12 errors, 0 warnings)\n") == 12
    assert profilers.errors("Killed\n") is None
    table = (
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n"","","ns","register"\n'
    )
    kernels = profilers.parse(table + '"0","masked_linear_kernel","45,120","128"\n"1","pack_kernel","7","n/a"\n')
    assert kernels[0] == {"kernel": "masked_linear_kernel", "nanoseconds": 45120.0, "registers": 128.0}
    assert kernels[1] == {"kernel": "pack_kernel", "nanoseconds": 7.0, "registers": "n/a"}
    assert profilers.parse("") == []


def test_reports_of_tests_are_counted_by_function():
    ends = [
        {"test": "a.py::one[1]", "outcome": "passed", "seconds": 0.5},
        {"test": "a.py::one[2]", "outcome": "failed", "seconds": 0.25, "reason": "off by 2"},
        {"test": "a.py::one[3]", "outcome": "skipped", "seconds": 0.0},
        {"test": "b.py::two", "outcome": "passed", "seconds": 1.0},
        {"test": "b.py::two", "outcome": "failed", "seconds": 0.0, "reason": "in a fixture, afterwards"},
        {"test": "b.py::three", "outcome": "passed", "seconds": 1.0},
    ]
    found = suite.by_function("".join(json.dumps(end) + "\n" for end in ends) + '{"test": "cut o')
    assert list(found) == ["a.py::one", "b.py::two", "b.py::three"]
    counts = {"passed": 1, "failed": 1, "skipped": 1}
    assert found["a.py::one"] == {"ok": False, "seconds": 0.75, **counts, "reason": "2: off by 2", "tests": ["2"]}
    assert not found["b.py::two"]["ok"] and found["b.py::two"]["passed"] == 0
    assert found["b.py::three"] == {"ok": True, "seconds": 1.0, "passed": 1, "failed": 0, "skipped": 0}


class TwoWorkers:
    workers, marks, tests = 2, "", {"S3": "not left_out"}

    def files(self, names):
        return names


def test_tests_are_run_by_workers_and_each_end_is_a_result(tmp_path):
    file = tmp_path / "test_these.py"
    tests = ("right(): pass", "wrong(): assert 1 == 2", "left_out(): assert 0")
    file.write_text("import pytest\n" + "".join(f"def test_{body}\n" for body in tests))
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module\n")
    suite.run_pytest(TwoWorkers(), results.Results(tmp_path, "S3"), "S3", [str(file), str(broken)], time.monotonic() + 120)
    first, *others = results.read(tmp_path)
    assert (first["case"], first["ok"], first["passed"]) == ("tests", False, 1) and first["failed"] >= 2
    found = {line["case"].rsplit("/")[-1]: line for line in others}
    assert found["test_these.py::test_right"]["ok"] and not any("left_out" in name for name in found)
    assert "assert 1 == 2" in found["test_these.py::test_wrong"]["reason"]
    assert any("no_such_module" in line.get("reason", "") for line in others)


def test_the_files_of_each_stage_are_there():
    assert set(suite.EXECUTION) <= set(suite.files()) and "tests/ops/linear/test_raw.py" in suite.files()
