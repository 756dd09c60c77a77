"""FSDP2 over masked layers of 16 bits: what works is what one process computes, the rest is refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
from support import sharded


@pytest.fixture(scope="module")
def results():
    return sharded.run()


def _train(model, x, compute):
    """Steps of SGD on ``model``, whose gradients a copy in ``compute`` gives."""
    for _ in range(3):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(compute) if compute else parameter.data
        sharded.loss(twin(x)).backward()
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), twin.parameters()):
                if theirs.grad is not None:
                    ours -= 0.5 * theirs.grad.to(ours.dtype)
    return model.state_dict()


def _same(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype
        torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance)


def test_float32_storage_with_a_mixed_precision_policy_is_one_process_computing_in_bfloat16(results):
    wanted = _train(sharded.masked_mlp(), sharded.data().bfloat16(), torch.bfloat16)
    _same(results["policy"], wanted, 1e-6)


def test_frozen_weights_of_16_bits_with_masks_of_float32_are_one_process(results):
    model = sharded.masked_mlp().bfloat16()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("masks" in name)
    wanted = _train(model, sharded.data().bfloat16(), None)
    _same(results["frozen"], wanted, 1e-6)


@pytest.mark.parametrize("which", ["whole", "layers"])
def test_two_dtypes_that_both_train_are_refused_in_words_before_torchs_assertion(results, which):
    assert results[which].startswith("RuntimeError: fully_shard trains parameters of one dtype")
    assert "MixedPrecisionPolicy" in results[which] and "mask_dtype" in results[which]
