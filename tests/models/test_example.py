"""examples/sentence_tasks.py: its quick run, with the encoder's real weights and WordNet's glosses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

WORDNET = Path("/usr/share/wordnet")


@pytest.mark.long
def test_quick_run(tmp_path):
    assert (WORDNET / "data.noun").exists(), "apt-get install wordnet-base"
    command = [sys.executable, str(ROOT / "examples" / "sentence_tasks.py"), "--quick", "--out", str(tmp_path), "--set", "tasks=1"]
    for _ in range(2):  # the second finds all there
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
    settings, *runs = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert settings["tasks"] == 1 and [run["method"] for run in runs] == ["words", "probe", "masks", "lora", "full"]
    assert min(run["accuracy"] for run in runs[1:]) > 0.6
    by_method = {run["method"]: run for run in runs}
    linear = 6 * (4 * 384 * 384 + 2 * 384 * 1536) // 8
    assert linear < by_method["masks"]["bytes"] < 1.01 * linear
    assert json.loads((tmp_path / "serving.json").read_text()).keys() == {"plain", "masks", "lora"}
    assert "| mean accuracy at most 1 point below LoRA |" in (tmp_path / "report.md").read_text()
