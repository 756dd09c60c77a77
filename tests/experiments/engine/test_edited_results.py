"""A run's files are believed only with their checksums: edited pieces, metrics and checkpoints are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metamask_ext.continual import CheckpointError, OutputError
from metamask_ext.experiments import report
from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, OptionError, run
from metamask_ext.experiments.engine.jobs import checked_bytes, json_bytes, read_json, read_results, without_checksum
from metamask_ext.experiments.engine.settings import read_toml
from metamask_ext.experiments.engine.tracking import Tracking, recording, track
from metamask_ext.experiments.papers.supsup import learning
from metamask_ext.files.checkpoint import save_checkpoint

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-5],
    "empty": lambda data: b"",
    "no object": lambda data: b"[]",
    "deep": lambda data: b"[" * 100_000,
    "no text": lambda data: b"\xff" + data,
}
"""Changes of a file that no checksum is needed to notice."""


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Entry("support.toy_experiment", "for tests"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "toy", Entry("support.toy_experiment", "for tests"))
        run("toy", folder, workers=1, quick=True)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def again(folder: Path) -> dict[str, Any]:
    return run("toy", folder, workers=1, quick=True)


def edit(path: Path, change: Callable[[dict[str, Any]], object], keep: bool = True) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(json_bytes(value if keep else without_checksum(value)))


class TestChecksums:
    def test_values(self, tmp_path):
        value = {"a": [1, -0.0, 1e-300, (True, None)], 3: {"b": "ä\ud800"}, "z": 2**70}
        path = tmp_path / "file.json"
        path.write_bytes(checked_bytes(value))
        assert without_checksum(read_json(path)) == json.loads(json.dumps(value))
        path.write_text(json.dumps(json.loads(path.read_text())))
        assert read_json(path), "the layout is not in the checksum"
        for data in (b"1e-300", b"-0.0", b"true", b"null"):
            path.write_bytes(checked_bytes(value).replace(data, b"7"))
            with pytest.raises(OutputError, match="was changed since it was written"):
                read_json(path)
        with pytest.raises(ValueError, match="'sha256'"):
            checked_bytes({"sha256": 1})

    @pytest.mark.parametrize("given", [None, 3, [], "x", "0" * 64])
    def test_checksums_that_are_none(self, tmp_path, given):
        (tmp_path / "file.json").write_text(json.dumps({"sha256": given, "a": 1}))
        with pytest.raises(OutputError, match="was changed since it was written"):
            read_json(tmp_path / "file.json")


class TestPieces:
    @pytest.fixture
    def piece(self, folder) -> Path:
        (folder / "metrics.json").unlink()
        return folder / "seed-0" / "masked.json"

    def test_an_edited_piece(self, folder, piece):
        edit(piece, lambda value: value.update(score=100.0))
        with pytest.raises(OutputError, match=r"masked\.json' was changed since it was written.*Delete it"):
            again(folder)
        piece.unlink()
        assert again(folder)["resumed"]

    def test_a_piece_without_a_checksum_is_computed_again(self, folder, piece):
        """As earlier versions wrote them, or as someone who edits one may leave it."""
        before = piece.read_bytes()
        edit(piece, lambda value: value.update(score=100.0), keep=False)
        again(folder)
        assert piece.read_bytes() == before

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_piece(self, folder, piece, damage):
        piece.write_bytes(damage(piece.read_bytes()))
        with pytest.raises(OutputError, match=r"cannot read .*masked\.json'"):
            again(folder)

    def test_a_link_to_nothing_or_a_pipe(self, folder, piece):
        piece.unlink()
        os.mkfifo(piece)
        with pytest.raises(OutputError, match="not a regular file"):
            again(folder)
        piece.unlink()
        piece.symlink_to(folder / "nowhere")
        with pytest.raises(OutputError, match="No such file"):
            again(folder)

    @pytest.mark.parametrize("text", [b"{}", b"[]", b"{", b'{"seconds": "x"}', b'{"seconds": -1}', b"", b"[" * 100_000])
    def test_the_time_so_far_is_cosmetic(self, folder, piece, text, capsys):
        (folder / "elapsed.json").write_bytes(text)
        assert again(folder)["duration_s"] >= 0
        assert "the time of the run so far is not known" in capsys.readouterr().out

    def test_what_killed_runs_left_goes_away(self, folder, piece):
        left = [folder / "metrics.json.0123456789abcdef.tmp", piece.with_name("shared.json.tmp"), folder / "toy.png.tmp"]
        theirs = [folder / "notes.tmp", folder / "seed-0" / "notes.txt.tmp"]
        for path in left + theirs:
            path.touch()
        again(folder)
        assert not any(path.exists() for path in left) and all(path.exists() for path in theirs)


class TestMetrics:
    def test_edited_metrics(self, folder, tmp_path):
        edit(folder / "metrics.json", lambda value: value["results"]["masked"]["score (%)"].update(mean=100.0))
        (tmp_path / "runs").mkdir()
        folder.rename(tmp_path / "runs" / "toy")
        for use in (lambda: again(tmp_path / "runs" / "toy"), lambda: report.report(tmp_path / "runs", tmp_path / "docs")):
            with pytest.raises(OutputError, match=r"metrics\.json' was changed since it was written"):
                use()
        assert not (tmp_path / "docs").exists()

    def test_metrics_of_an_earlier_version(self, folder, tmp_path):
        edit(folder / "metrics.json", lambda value: None, keep=False)
        with pytest.warns(UserWarning, match=r"metrics\.json' has no checksum"):
            assert again(folder)["results"]
        (tmp_path / "runs").mkdir()
        folder.rename(tmp_path / "runs" / "toy")
        with pytest.warns(UserWarning, match=r"toy/metrics\.json' has no checksum"):
            report.report(tmp_path / "runs", tmp_path / "docs")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda value: value.pop("results"), "lacks 'results'"),
            (lambda value: value.pop("settings"), "lacks 'settings'"),
            (lambda value: value.update(seed=3), "seed was 3, now 0"),
        ],
    )
    def test_metrics_of_another_run(self, folder, change, message):
        edit(folder / "metrics.json", change, keep=False)
        with pytest.warns(UserWarning), pytest.raises(OutputError, match=rf"metrics\.json'.*{message}"):
            again(folder)

    @pytest.mark.parametrize("value", [3, [], None, {"masked": 3}, {"masked": {"score (%)": []}}])
    def test_a_report_of_nonsense(self, folder, tmp_path, value):
        edit(folder / "metrics.json", lambda metrics: metrics.update(results=value), keep=False)
        (tmp_path / "runs").mkdir()
        folder.rename(tmp_path / "runs" / "toy")
        with pytest.warns(UserWarning), pytest.raises(OutputError, match=r"metrics\.json' is not of this version"):
            report.report(tmp_path / "runs", tmp_path / "docs")

    @pytest.mark.parametrize("name", ["seeds", "results", "baselines"])
    @pytest.mark.parametrize("value", [3, [], None, {"masked": 3}])
    def test_nonsense_is_not_shown(self, folder, name, value):
        edit(folder / "metrics.json", lambda metrics: metrics.update({name: value}), keep=False)
        with pytest.warns(UserWarning), pytest.raises(OutputError, match=r"metrics\.json' is not of this version"):
            again(folder)

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    @pytest.mark.parametrize("name", ["metrics.json", "run.json"])
    def test_damaged_files(self, folder, name, damage):
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        with pytest.raises(OutputError, match=f"cannot read .*{name}"):
            again(folder)

    def test_committed_metrics_are_read(self):
        folder = Path(__file__).parents[3] / "docs" / "results"
        for path in folder.glob("*/metrics.json"):
            if b'"sha256"' not in path.read_bytes()[:40]:
                with pytest.warns(UserWarning, match="has no checksum"):
                    assert read_results(path)["results"]
            else:
                assert read_results(path)["results"]


class TestOtherFiles:
    def test_tracked_numbers_follow_no_link(self, tmp_path):
        (tmp_path / "seed-0").mkdir()
        (tmp_path / "victim").write_text("precious")
        (tmp_path / "seed-0" / "job.csv").symlink_to(tmp_path / "victim")
        with recording() as rows:
            track(1, loss=0.5)
        Tracking(tmp_path, "csv").write(0, "job", rows)
        assert (tmp_path / "victim").read_text() == "precious"
        assert "1,loss,0.5" in (tmp_path / "seed-0" / "job.csv").read_text()

    @pytest.mark.parametrize("text", [b"a = " + b"[" * 50_000, b"a = " + b"9" * 5000, b"\xff", b"a = {"])
    def test_settings_that_cannot_be_read(self, tmp_path, text):
        (tmp_path / "file.toml").write_bytes(text)
        with pytest.raises(OptionError, match=r"file\.toml"):
            read_toml(tmp_path / "file.toml")
        with open(tmp_path / "file.toml", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(OptionError, match="1,099,511,627,776 bytes"):
            read_toml(tmp_path / "file.toml")

    @pytest.mark.parametrize(
        "change",
        [
            {"learned": 3},
            {"learned": "x"},
            {"curve": []},
            {"curve": [float("nan")]},
            {"curve": ["x"]},
            {"curve": [50.0] * 4},
            {"model": {}},
            {"model": {"weight": torch.ones(1)}},
            {"model": {"weight": torch.full((2, 3), float("nan")), "bias": torch.ones(2)}},
            {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(3)}},
            {"model": 3},
        ],
    )
    def test_a_sequence_that_was_not_learned(self, tmp_path, change):
        model = torch.nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {"learned": 2, "curve": [50.0, 60.0], "model": torch.nn.Linear(3, 2).state_dict()}
        save_checkpoint(tmp_path / "sequence.pt", {**state, **change})
        with pytest.raises(CheckpointError, match=r"sequence\.pt' cannot be of this run"):
            learning._take_over(tmp_path / "sequence.pt", model, [1, 2, 3])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        save_checkpoint(tmp_path / "sequence.pt", state)
        assert learning._take_over(tmp_path / "sequence.pt", model, [1, 2, 3]) == (2, [50.0, 60.0])
        assert torch.equal(model.weight, state["model"]["weight"])
