"""The committed page of results is the one that ``metamask report`` makes from the committed metrics files."""

from __future__ import annotations

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
