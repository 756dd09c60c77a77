"""Mixed-task batches in [L, B, E]: each sample is itself alone under its own task, or the call is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.sequence_models import Recurrent, Turned, with_tasks
from torch import nn

import metamask_ext as mm
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

NAMES = ["b", "a", "c", "b"]
each_length = pytest.mark.parametrize("length", [1, 3, 4, 6])  # 4: that of the batch


class PerStep(nn.Module):
    """Calls a layer with one step, [B, E], after another."""

    batch_first = False

    def __init__(self):
        super().__init__()
        self.cell = MaskedLinear(4, 4)

    def forward(self, x):
        return torch.stack([self.cell(step) for step in x])


def _encoder(batch_first=False, **options):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
    return mm.convert(layer, exclude="self_attn*", **options)


def _decoder():
    layer = mm.convert(nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0), exclude=["self_attn*", "multihead_attn*"])
    return _Self(layer)


class _Self(nn.Module):
    """A decoder that attends to its own input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


def _stack():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 2, enable_nested_tensor=False)
    return mm.convert(stack, exclude="*self_attn*")


SEQUENCE_FIRST = {
    "encoder layer": _encoder,
    "decoder layer": _decoder,
    "encoder": _stack,
    "recurrent": Recurrent,
    "nested": lambda: nn.Sequential(Recurrent(), nn.Sequential(_encoder())),
}


def _compare(model, x, names, dim, **options):
    """The outputs and gradients of the batch, and of its samples one by one."""
    found = []
    for mixed in (True, False):
        leaf = x.clone().requires_grad_()
        if mixed:
            with mm.using_task(model, names, **options):
                y = model(leaf)
        else:
            outputs = []
            for index, name in enumerate(names):
                with mm.using_task(model, name):
                    outputs.append(model(leaf.narrow(dim, index, 1)))
            y = torch.cat(outputs, 0 if y.shape[0] == len(names) and y.dim() < x.dim() else dim)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@each_length
@pytest.mark.parametrize("name", SEQUENCE_FIRST)
def test_below_a_module_with_batch_first_false_the_second_dimension_is_the_batch(name, length):
    model = with_tasks(SEQUENCE_FIRST[name]())
    x = torch.randn(length, 4, 4, dtype=torch.float64)
    _compare(model, x, NAMES, 1)
    _compare(model, x, ["c"] * 4, 1)
    _compare(model, x, NAMES, 1, batch_dim=1)
    with mm.using_task(model, NAMES):
        assert model(x).is_contiguous()


@each_length
def test_batch_first_true_and_no_such_attribute_mean_the_first_dimension(length):
    x = torch.randn(4, length, 4, dtype=torch.float64)
    for model in (_encoder(batch_first=True), Recurrent(batch_first=True), nn.Sequential(MaskedLinear(4, 4), nn.Tanh())):
        _compare(with_tasks(model), x, NAMES, 0)
        _compare(model, x, NAMES, 0, batch_dim=0)


@each_length
def test_one_batch_dim_for_all_layers(length):
    model = with_tasks(nn.Sequential(MaskedLinear(4, 4), nn.Tanh(), MaskedLinear(4, 2)))
    _compare(model, torch.randn(length, 4, 4, dtype=torch.float64), NAMES, 1, batch_dim=1)
    _compare(model, torch.randn(length, 4, 2, 4, dtype=torch.float64), NAMES, 1, batch_dim=1)
    _compare(with_tasks(Recurrent(batch_first=True)), torch.randn(4, length, 4, dtype=torch.float64), NAMES, 0, batch_dim=0)
    slots = [mm.slots(model).index(name) for name in NAMES]
    _compare_slots(model, slots, torch.randn(length, 4, 4, dtype=torch.float64))


def _compare_slots(model, slots, x):
    with mm.using_task(model, slots, batch_dim=1):
        y = model(x)
    with mm.using_task(model, NAMES, 1):
        assert torch.equal(model(x), y)


class TestBothInOneModel:
    def _model(self):
        return with_tasks(Turned(Recurrent()))

    @pytest.mark.parametrize("length", [1, 3, 6])
    def test_layers_elsewhere_have_the_batch_first(self, length):
        _compare(self._model(), torch.randn(4, length, 4, dtype=torch.float64), NAMES, 0)

    def test_what_may_be_either_is_refused_and_blocks_of_its_own_settle_it(self):
        model, x = self._model(), torch.randn(4, 4, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match=r"\[4, 4, 4\].* may be the batch's.*batch_dim"):
            model(x)
        wanted = []
        for index, name in enumerate(NAMES):
            with mm.using_task(model, name):
                wanted.append(model(x[index : index + 1]))
        with mm.using_task(model, NAMES, batch_dim=0), mm.using_task(model.inner, NAMES):
            torch.testing.assert_close(model(x), torch.cat(wanted))
        with mm.using_task(model, ["c"] * 4):
            model(x)  # one task: it does not matter

    def test_a_sequence_first_layer_outside_is_refused_at_any_length_and_right_with_batch_dim(self):
        model = with_tasks(nn.Sequential(MaskedLinear(4, 4), _encoder(), MaskedLinear(4, 2)))
        for length in (1, 3, 4, 6):
            x = torch.randn(length, 4, 4, dtype=torch.float64)
            with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match="batch_dim=1"):
                model(x)
            _compare(model, x, NAMES, 1, batch_dim=1)

    def test_a_head_over_the_last_step_may_have_as_many_features_as_samples(self):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.head = nn.LSTM(4, 4), MaskedLinear(4, 2)

            def forward(self, x):
                return self.head(self.rnn(x)[0][-1])

        model = with_tasks(Last())
        _compare(model, torch.randn(4, 4, 4, dtype=torch.float64), NAMES, 1)

    def test_attention_marks_the_model_and_layers_beside_it_are_not_guessed(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.fc = nn.MultiheadAttention(4, 2), MaskedLinear(4, 4)

            def forward(self, x):
                return self.fc(self.attention(x, x, x)[0])

        model = with_tasks(Block())
        for length in (3, 4):
            x = torch.randn(length, 4, 4, dtype=torch.float64)
            with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match="batch_dim"):
                model(x)
            _compare(model, x, NAMES, 1, batch_dim=1)

    def test_the_nearest_module_counts(self):
        class Outer(nn.Sequential):
            batch_first = False

        inner = Recurrent(batch_first=True)
        model = with_tasks(Outer(inner))
        _compare(model, torch.randn(4, 3, 4, dtype=torch.float64), NAMES, 0)
        Outer.batch_first, inner.batch_first = True, False
        try:
            _compare(model, torch.randn(4, 4, 4, dtype=torch.float64), NAMES, 1)
        finally:
            Outer.batch_first = False

    def test_a_layer_in_two_places_is_refused_where_the_block_is_made(self):
        model = Turned(Recurrent())
        model.before = model.inner.gates = MaskedLinear(4, 4)
        model.inner.out = MaskedLinear(4, 4)
        model = with_tasks(model)
        with pytest.raises(ValueError, match="batch_dim must be 0 or 1, got None.*elsewhere, 'before'"):
            mm.using_task(model, NAMES)
        mm.using_task(model, NAMES, batch_dim=1)
        mm.using_task(model, "a")

    def test_one_layer_under_two_names_below_such_modules(self):
        model = Recurrent()
        model.gates = model.out = MaskedLinear(4, 4)
        _compare(with_tasks(model), torch.randn(4, 4, 4, dtype=torch.float64), NAMES, 1)

    def test_a_module_that_holds_its_parent(self):
        model = with_tasks(Recurrent())
        model.gates.up = model
        with mm.using_task(model, NAMES):
            model(torch.randn(4, 4, 4, dtype=torch.float64))


class TestRefused:
    @pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 4)], ids=str)
    def test_too_few_dimensions(self, shape):
        model = with_tasks(Recurrent())
        for options in ({}, {"batch_dim": 1}):
            with (
                mm.using_task(model, NAMES, **options),
                pytest.raises(RuntimeError, match="second dimension.*must have at least .* dimensions.*batch_dim=0"),
            ):
                model.gates(torch.randn(shape, dtype=torch.float64))

    def test_another_size_there(self):
        model = with_tasks(Recurrent())
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match=r"5 samples .* each of 4: the second .*\[4, 5, 4\]"):
            model(torch.randn(4, 5, 4, dtype=torch.float64))
        with mm.using_task(model, NAMES, batch_dim=0), pytest.raises(RuntimeError, match="5 samples .* each of 4: the first"):
            model(torch.randn(5, 4, 4, dtype=torch.float64))

    def test_steps_of_a_cell_are_refused_and_right_with_batch_dim_0(self):
        model = with_tasks(PerStep())
        x = torch.randn(4, 4, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match="batch_dim=0"):
            model(x)
        _compare(model, x, NAMES, 1, batch_dim=0)

    def test_images_have_the_batch_first(self):
        model = with_tasks(nn.Sequential(MaskedConv2d(4, 3, 1), TaskBatchNorm2d(3)))
        x = torch.randn(4, 4, 2, 2, dtype=torch.float64)
        for layer, given in zip(model, (x, x[:, :3])):
            with mm.using_task(model, NAMES, batch_dim=1), pytest.raises(RuntimeError, match="must have at least"):
                layer(given)
        with mm.using_task(model, NAMES):
            model(x)

    @pytest.mark.parametrize("given", [2, -1, True, False, 0.5, "1", [1]], ids=repr)
    def test_another_batch_dim(self, given):
        model = MaskedLinear(2, 2)
        for task in (["default"], "default"):
            with pytest.raises(ValueError, match="batch_dim must be None, 0 or 1, got"):
                mm.using_task(model, task, batch_dim=given)


class TestOtherThings:
    @each_length
    def test_packed_tasks_and_those_with_logits(self, length):
        model = with_tasks(Recurrent())
        bank = mm.MaskBank(model)
        x = torch.randn(length, 4, 4, dtype=torch.float64)
        for task in "ba":
            bank.pack(task)
            _compare(model, x, NAMES, 1)
        bank.pack("c")
        _compare(model, x, NAMES, 1)

    @each_length
    def test_what_else_belongs_to_tasks(self, length):
        class Heads(nn.Module):
            batch_first = False

            def __init__(self):
                super().__init__()
                self.masked, self.norm, self.head = MaskedLinear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

            def forward(self, x):
                return self.head(self.norm(self.masked(x)))

        model = Heads()
        mm.MaskBank(model, per_task=["norm.*", "head.*"])
        model = with_tasks(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "per_task" in name:
                    parameter.normal_()
        x = torch.randn(length, 4, 4, dtype=torch.float64)
        _compare(model, x, NAMES, 1)
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match="must have at least"):
            model.head(torch.randn(4, 4, dtype=torch.float64))

    def test_a_head_for_each_task_beside_sequence_first_modules_may_be_as_wide_as_the_batch(self):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.head = Recurrent(), nn.Linear(4, 4)

            def forward(self, x):
                return self.head(self.rnn(x)[-1])

        model = Last()
        mm.MaskBank(model, per_task="head.*")
        _compare(with_tasks(model), torch.randn(4, 4, 4, dtype=torch.float64), NAMES, 1)

    def test_embeddings_for_each_task_of_tokens_sequence_first(self):
        class Tokens(nn.Module):
            batch_first = False

            def __init__(self):
                super().__init__()
                self.embed, self.fc = nn.Embedding(10, 4), MaskedLinear(4, 4)

            def forward(self, x):
                return self.fc(self.embed(x))

        model = Tokens()
        mm.MaskBank(model, per_task="embed.*")
        model = with_tasks(model)
        for task in "abc":
            nn.init.normal_(model.embed.per_task["weight"][task])
        x = torch.randint(10, (4, 4))
        with mm.using_task(model, NAMES):
            y = model(x)
        for index, name in enumerate(NAMES):
            with mm.using_task(model, name):
                torch.testing.assert_close(model(x[:, index : index + 1]), y[:, index : index + 1])

    def test_copies_and_blocks_that_are_entered_again(self):
        model = with_tasks(Recurrent())
        twin = copy.deepcopy(model)
        x = torch.randn(4, 4, 4, dtype=torch.float64)
        block = mm.using_task(model, NAMES)
        with block:
            y = model(x)
        with block, mm.using_task(twin, NAMES):
            assert torch.equal(model(x), y) and torch.equal(twin(x), y)
        _compare(twin, x, NAMES, 1)

    def test_checkpoints_recompute_along_the_same_dimension(self):
        model = with_tasks(Recurrent())
        x = torch.randn(4, 4, 4, dtype=torch.float64, requires_grad=True)
        grads = []
        for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
            with mm.using_task(model, NAMES):
                y = run(x)
            y.square().sum().backward()
            grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
            x.grad = None
            model.zero_grad()
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs)

    def test_an_empty_batch(self):
        model = with_tasks(Recurrent())
        with mm.using_task(model, []):
            assert model(torch.randn(3, 0, 4, dtype=torch.float64)).shape == (3, 0, 4)

    def test_a_meta_learners_batch_is_the_first_dimension_as_before(self):
        model = mm.convert(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), mask_init="normal")
        model.batch_first = False
        x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
        losses = []
        for learner in (model, copy.deepcopy(model)):
            losses.append(MAML(learner, 0.1)(nn.functional.mse_loss, (x, y), (x, y)))
            model.batch_first = True
        assert torch.equal(*losses)
