"""Compiled models in DistributedDataParallel on two ranks: the gradients are those of one process, from the kernels."""

from __future__ import annotations

import pytest
from support import compiled_ranks


@pytest.mark.parametrize("inside", [True, False], ids=["compiled and wrapped", "wrapped and compiled"])
def test_gradients_are_those_of_one_process(ranks, inside):
    for difference, ops in ranks(compiled_ranks.wrapped, inside):
        assert difference < 1e-10
        assert ops == ["masked_linear", "masked_linear_backward"]
