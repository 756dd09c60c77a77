"""fully_shard over masked layers of 16 bits: what works is what one process computes, the rest is refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
from support import sharded_dtypes as cases


def _by_one_process(model, compute=None):
    """Steps of SGD on ``model``, whose gradients a copy gives, converted to ``compute``."""
    for _ in range(cases.STEPS):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.data = parameter.data if compute is None else parameter.data.to(compute)
        cases.loss_of(twin(cases.data())).backward()
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                if theirs.grad is not None:
                    ours -= cases.RATE * theirs.grad.to(ours.dtype)
    return model.state_dict()


def _assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_float32_storage_with_a_mixed_precision_policy_is_one_process_computing_in_bfloat16(ranks):
    wanted = _by_one_process(cases.masked_mlp(), torch.bfloat16)
    for got in ranks(cases.with_a_policy):
        _assert_same(got, wanted)


def test_frozen_weights_of_16_bits_with_masks_of_float32_are_one_process(ranks):
    wanted = _by_one_process(cases.masked_mlp(torch.bfloat16, frozen=True))
    for got in ranks(cases.with_frozen_weights):
        _assert_same(got, wanted)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_two_dtypes_that_both_train_are_refused_in_words_before_torchs_assertion(ranks, whole):
    for raised in ranks.try_(cases.with_two_dtypes, whole):
        assert raised.kind == "RuntimeError"
        assert raised.message.startswith("fully_shard trains parameters of one dtype")
        assert "MixedPrecisionPolicy" in raised.message and "mask_dtype" in raised.message
