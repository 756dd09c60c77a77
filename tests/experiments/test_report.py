"""The committed pages of results are those that ``metamask report`` makes from the committed metrics files."""

from __future__ import annotations

from itertools import groupby

from support.paths import ROOT

from metamask_ext.experiments import report


def test_committed_page(tmp_path, monkeypatch):
    committed = ROOT / "docs" / "results"

    def names(folder, experiment, figures):
        """The figures' files without their pictures, which take long."""
        return [f"{experiment}-{key}.png" if key else f"{experiment}.png" for key in figures]

    monkeypatch.setattr(report, "write_figures", names)
    page, missing = report.report(committed, tmp_path)
    assert not missing and page.read_text() == (committed / "README.md").read_text()
    for text in tmp_path.rglob("*.md"):
        assert text.read_text() == (committed / text.relative_to(tmp_path)).read_text()
    for run in [folder for folder in committed.iterdir() if folder.is_dir()]:
        assert {path.name for path in run.glob("*.md")} == {path.name for path in (tmp_path / run.name).glob("*.md")}


def test_the_first_page_is_a_screen_and_no_table_is_long():
    committed = ROOT / "docs" / "results"
    first = (committed / "README.md").read_text().splitlines()
    assert len(first) < 60
    for path in committed.rglob("*.md"):
        lines = path.read_text().splitlines()
        tables = [len(list(rows)) for is_row, rows in groupby(lines, lambda line: line.startswith("|")) if is_row]
        assert path.name == "tables.md" or not [rows for rows in tables if rows > 2 + report.MOST_ROWS], path


def test_the_sentence_that_asks():
    assert report._question("Section 1: a fact. It is\nlarge (see 2.) Does a mask do? And more?") == "Does a mask do?"
    assert report._question("Section 3.1: if $y = x$, does it?") == "if $y = x$, does it?"
