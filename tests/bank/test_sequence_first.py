"""infer_task for each sample where modules of the model take the batch as the second dimension."""

from __future__ import annotations

import pytest
import torch
from support.sequence_models import Recurrent, Turned, with_tasks

import metamask_ext as mm
from metamask_ext.bank.inference import Snapshot, entropy_gradient


class Inner(Turned):
    """Only the module that takes a sequence first is masked."""

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).mean(0)


def _model(kind):
    model = kind(Recurrent())
    if kind is Inner:
        del model.before, model.after
    return with_tasks(model)


def _alone(model, x, names):
    snapshot = Snapshot(model)
    return torch.cat([entropy_gradient(model, names, row[None], True, snapshot) for row in x])


@pytest.mark.parametrize("packed", ["", "b", "abc"])
@pytest.mark.parametrize("length", [1, 3, 4, 6])
def test_each_sample_is_as_alone(length, packed):
    model = _model(Inner)
    bank = mm.MaskBank(model)
    for task in packed:
        bank.pack(task)
    x = torch.randn(4, length, 4, dtype=torch.float64)
    got = entropy_gradient(model, bank.tasks, x, True, Snapshot(model))
    torch.testing.assert_close(got, _alone(model, x, bank.tasks))
    torch.testing.assert_close(entropy_gradient(model, bank.tasks, x, False, Snapshot(model))[0], got.sum(0))


def test_a_layer_beside_such_a_module_that_may_have_either_dimension_is_refused():
    model = _model(Turned)
    bank = mm.MaskBank(model)
    for length in (3, 6):
        x = torch.randn(4, length, 4, dtype=torch.float64)
        got = entropy_gradient(model, bank.tasks, x, True, Snapshot(model))
        torch.testing.assert_close(got, _alone(model, x, bank.tasks))
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"\[4, 4, 4\].*per_sample=False"):
        bank.infer_task(x)
    assert bank.infer_task(x, per_sample=False) in "abc"
