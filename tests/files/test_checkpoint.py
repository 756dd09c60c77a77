"""State dicts of checkpoints: what torch cannot copy is refused in words, and nothing has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from metamask_ext.files.checkpoint import take_over_state_dict
from metamask_ext.files.errors import CheckpointError

CHANGES = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
    "with gaps": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_not_dense_or_not_there(change):
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="bias must be a dense tensor on the CPU"):
        take_over_state_dict(Path("x"), {**before, "weight": before["weight"] + 1, "bias": change(before["bias"])}, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_order_of_dimensions_is_free():
    model = nn.Conv2d(2, 2, 3)
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    given["weight"] = given["weight"].contiguous(memory_format=torch.channels_last)
    take_over_state_dict(Path("x"), given, model)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
