"""MaskedEmbedding: rows of weight and mask; which indices are samples in a mixed-task batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import masks_on, randomize_masks
from torch import nn

import metamask_ext as mm
from metamask_ext.nn import MaskedEmbedding


def two_tasks(**options):
    layer = MaskedEmbedding(6, 10, **options).double()
    mm.add_task(layer, "b")
    return randomize_masks(layer)


def test_built_as_torchs_with_every_argument():
    weight = torch.randn(5, 3)
    layer = MaskedEmbedding(5, 3, 2, None, 2.0, True, False, weight, True, "cpu", torch.float32, mask_init=0.0)
    assert isinstance(layer, nn.Embedding) and not layer.weight.requires_grad and layer.masks["default"].requires_grad
    x = torch.tensor([[0, 2], [4, 2]])
    torch.testing.assert_close(layer(x), weight[x] / 2)
    plain = nn.Embedding(5, 3, padding_idx=-1)
    layer = MaskedEmbedding(5, 3, padding_idx=-1)
    layer.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(masks_on(layer)(x), plain(x))
    assert layer.padding_idx == 4 and "5, 3, padding_idx=4, gate=sigmoid" in repr(layer)
    assert not bool(layer.weight[4].any())


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_gradients_are_those_of_the_whole_theta(padding_idx):
    layer = two_tasks(padding_idx=padding_idx)
    x = torch.tensor([[0, 1, 1], [5, 1, 0]])
    found = []
    for compute in (
        lambda: layer(x),
        lambda: F.embedding(x, layer.weight * layer.masks["b"].sigmoid(), padding_idx),
    ):
        layer.zero_grad()
        with mm.using_task(layer, "b"):
            y = compute()
        y.square().sum().backward()
        found.append((y, layer.weight.grad, layer.masks["b"].grad))
    torch.testing.assert_close(*found)


def test_theta_is_never_there_as_a_whole():
    layer = MaskedEmbedding(1000, 10, mask_init=1.0)
    mm.add_task(layer, "b")
    x = torch.tensor([[3, 4], [5, 6]])
    for task in ("b", ["b", "default"]):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile, mm.using_task(layer, task):
            layer(x)
        assert max(event.cpu_memory_usage for event in profile.key_averages()) < layer.weight.nbytes / 4


class TestMixedTaskBatches:
    def test_indices_of_one_dimension_may_be_positions(self):
        layer = two_tasks()
        x = torch.tensor([0, 1, 2])
        names = ["b", "default", "b"]
        with mm.using_task(layer, names), pytest.raises(RuntimeError, match="they may be positions"):
            layer(x)
        with mm.using_task(layer, names, batch_dim=0):
            y = layer(x)
        with mm.using_task(layer, "b"):
            torch.testing.assert_close(layer(x)[::2], y[::2])
            with mm.using_task(layer, ["b"] * 3):
                torch.testing.assert_close(layer(x), layer(x))

    def test_one_row_of_positions_is_every_samples(self):
        layer = two_tasks()
        positions = torch.arange(4)[None]
        names = ["b", "default", "b"]
        with mm.using_task(layer, names):
            y = layer(positions)
        assert y.shape == (3, 4, 10)
        with mm.using_task(layer, "b"):
            torch.testing.assert_close(y[::2], layer(positions).expand(2, -1, -1))
        with mm.using_task(layer, names), pytest.raises(RuntimeError, match="names a task for each of 3"):
            layer(torch.zeros(2, 4, dtype=torch.int64))
        with mm.using_task(layer, names, batch_dim=1):
            assert torch.equal(layer(positions.T), y.transpose(0, 1))

    def test_packed_and_other_tasks_in_one_batch(self):
        layer = two_tasks(gate="hard")
        x = torch.randint(6, (3, 2))
        names = ["b", "default", "b"]
        with mm.using_task(layer, names):
            wanted = layer(x)
        mm.MaskBank(layer).pack("b")
        with mm.using_task(layer, names):
            assert torch.equal(layer(x), wanted)


def test_refused_options():
    with pytest.raises(ValueError, match="max_norm must be None, got"):
        MaskedEmbedding(5, 3, max_norm=1.0)
    with pytest.raises(ValueError, match="sparse must be False"):
        MaskedEmbedding(5, 3, sparse=True)
    model = nn.ModuleDict({"a": nn.Embedding(5, 3, max_norm=1.0), "b": nn.Embedding(5, 3, sparse=True), "c": nn.Linear(2, 2)})
    report = mm.conversion_report(mm.convert(model, include="*"))
    assert [(left.name, left.reason.split(":")[0]) for left in report.left] == [("a", "it has max_norm"), ("b", "it is sparse")]


def test_code_that_reads_its_weight_gets_theta():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)

        def forward(self, x):
            return F.linear(self.embed(x), self.embed.weight)

    model = randomize_masks(mm.convert(Tied(), include="embed"))
    x = torch.randint(5, (2, 4))
    torch.testing.assert_close(model(x), mm.merge(model, "default")(x))
    assert isinstance(model.embed, MaskedEmbedding)


def test_embeddings_of_distances_between_positions_are_left():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2), "words": nn.Embedding(5, 3)})
    report = mm.conversion_report(mm.convert(model, include="*"))
    assert [left.name for left in report.left] == ["relative_attention_bias"]
    assert isinstance(model["words"], MaskedEmbedding)


def test_convert_masks_those_that_include_names_and_ties_hold():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.other, self.head = nn.Embedding(5, 3), nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x) + self.other(x))

    model = mm.convert(Language())
    assert not isinstance(model.embed, MaskedEmbedding)
    assert "include= names it" in mm.conversion_report(model).left[-1].reason
    mm.convert(model, include="embed")
    assert isinstance(model.embed, MaskedEmbedding) and not isinstance(model.other, MaskedEmbedding)
    assert model.embed.weight is model.head.weight and model.embed.masks["default"] is not model.head.masks["default"]
    mm.add_task(model, "b")
    randomize_masks(model)
    x = torch.randint(5, (2, 4))
    with mm.using_task(model, ["b", "default"]):
        y = model(x)
    merged = mm.merge(model, "b")
    torch.testing.assert_close(merged(x)[:1], y[:1])
    assert type(merged.embed) is nn.Embedding
