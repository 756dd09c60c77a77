"""The examples of the documentation run, in order, and do what the text beside them says."""

from __future__ import annotations

import re
from typing import Any

import torch
from support.paths import ROOT

import metamask_ext


def _run_blocks(page: str, start: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Execute the Python blocks of a page one after another; the names they leave, and how many there were."""
    names = dict(start)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names, len(blocks)


def test_life_of_a_task():
    torch.set_num_threads(1)
    left, blocks = _run_blocks("docs/guide/tasks.md", {})
    assert blocks == 10
    assert min(left["before"].values()) > 0.75 and left["new"] > 0.75
    # 64 samples, each served right about 86 % of the time: standard deviation 0.043
    assert left["served"] > 0.65 and left["right"] > 0.7
    assert left["bank"].slots == [None, "permutation-0", None, "permutation-2", "permutation-3"]
    assert left["bank"].bytes_per_task("permutation-0") == 256 * 98 + 50 * 32
    assert len({float(alpha.detach()) for alpha in left["alphas"].values()}) == 3
    assert left["own"].tasks == ["default", "b"] and set(left["own"].per_task) >= {"4.weight", "4.bias", "1.running_mean"}


def test_a_bank_in_production():
    left, blocks = _run_blocks("docs/guide/bank.md", {})
    assert blocks == 5
    bank, loaded = left["bank"], left["loaded"]
    assert min(bank.metrics(task)["accuracy"] for task in left["labels"]) > 0.5  # four classes
    assert loaded.tasks == ["default", *left["labels"]] and loaded.is_packed("task-0")
    assert left["sixteen"].model[2].masks["of float32"].dtype == torch.uint8


def test_compile():
    left, blocks = _run_blocks("docs/guide/compile.md", {})
    assert blocks == 2
    assert left["mixed"].shape == (8, 10) and metamask_ext.tasks(left["model"]) == ["default", "b", "c", "d", "e"]
    assert left["model"][0].masks["b"].grad is not None and left["model"][0].masks["default"].grad is None


def test_first_mask(capsys):
    left, blocks = _run_blocks("docs/guide/first-mask.md", {})
    assert blocks == 5
    x, mixed, plain = left["x"], left["mixed"], left["plain"]
    assert "has 2 tasks" in capsys.readouterr().out
    assert type(plain[0]) is torch.nn.Linear
    torch.testing.assert_close(mixed[1::2], plain(x)[1::2], rtol=1e-4, atol=1e-5)
    for task, y in left["targets"].items():
        with metamask_ext.using_task(left["model"], task):
            assert torch.nn.functional.mse_loss(left["model"](x), y) < 0.2


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = torch.rand(2, 784), torch.tensor([3, 7])
    left, blocks = _run_blocks("README.md", {"batches": [("default", x, y), ("rotated", x, y)], "x": x, "y": y})
    assert blocks == 1
    bank = left["bank"]
    assert bank.tasks == ["default", "rotated"] and all(map(bank.is_packed, bank.tasks))
    assert left["y"].shape == (2, 10) and (tmp_path / "bank" / "bank.json").exists()
    metamask_ext.MaskBank.load(tmp_path / "bank", left["model"]).verify()


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110 and sum(len(line.split()) for line in lines) <= 900
    # Tables and links cannot be broken.
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "Ratios of medians"))]


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
