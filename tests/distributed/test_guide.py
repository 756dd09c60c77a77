"""The program of docs/guide/distributed.md runs on two ranks; the block that needs Lightning where there is Lightning."""

from __future__ import annotations

import importlib.util

import pytest
from support import guide_blocks


def test_blocks_of_the_page(ranks):
    for blocks, tasks in ranks(guide_blocks.run, False):
        assert blocks == 6 and tasks == ["default", "a", "b", "c"]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is no part of the test extra")
def test_the_block_of_lightning():
    guide_blocks.run_under_torchrun()
