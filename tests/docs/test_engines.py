"""Every block of docs/guide/engines.md runs, in the environment of its engine: ``make test-engines``."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.pages import blocks_of, run_blocks

import metamask_ext as mm

PAGE = "docs/guide/engines.md"
ENGINES = ("lightning", "transformers", "avalanche")


def test_each_block_is_of_an_engine():
    blocks = blocks_of(PAGE, "python")
    assert [block.splitlines()[0] for block in blocks] == [f"# {engine}" for engine in ENGINES]
    for block in blocks:
        compile(block, PAGE, "exec")


@pytest.mark.parametrize("engine", ENGINES)
def test_block(tmp_path, monkeypatch, engine):
    if importlib.util.find_spec(engine) is None:
        pytest.skip("make test-engines installs it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAMASK_DATA", str(tmp_path))
    torch.set_num_threads(1)
    left = run_blocks(PAGE, blocks_of(PAGE, "python", f"# {engine}"))
    if engine == "lightning":
        assert left["trainer"].callback_metrics["accuracy"] > 0.8 and left["module"].net[0].temperature == pytest.approx(0.05)
    elif engine == "transformers":
        assert mm.tasks(left["bert"]) == ["default", "a", "b"] and left["bert"].bert.pooler.dense.temperature == pytest.approx(0.05)
    else:
        found = [value for name, value in left["accuracies"].items() if "Top1_Acc_Exp" in name]
        assert len(found) == 3 and min(found) > 0.7
