"""The notebook's cells run, in order, and it holds no output."""

from __future__ import annotations

import json
from typing import Any

import torch
from support.paths import ROOT


def test_quickstart():
    torch.set_num_threads(1)
    book = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"), names)
    assert names["unknown"] == ["nobody"] and names["answers"].isnan().any(1).tolist() == [False, False, True, False]
    for name in names["labels"]:
        before, after = names["bank"].metrics(name, before_packing=True), names["bank"].metrics(name)
        assert before["accuracy"] > 0.5 and after["accuracy"] > 0.35
