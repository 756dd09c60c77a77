"""using_task(..., unknown="mark"): samples of unknown tasks are NaN, all others what they are alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support.gpu import DEVICES
from support.mixed_task_models import MODELS, alone, make
from support.models import assert_same_gradients, expected, gradients, mlp, randomize_masks
from support.sequence_models import Recurrent, Turned, with_tasks
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, remove_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.selection import Superposition
from metamask_ext.nn.tasks import pack_task

GIVEN = ["b", "no", "a", "", "b"]
KNOWN = [0, 2, 4]

each_device = pytest.mark.parametrize("device", DEVICES)


def marked(model, x, given, call=None, **options):
    with using_task(model, given, unknown="mark", **options) as unknown:
        return (call or model)(x), unknown


def check_rows(model, x, given, known, **options):
    """Rows of known tasks are those alone, and the others NaN."""
    y, unknown = marked(model, x, given, **options)
    others = [row for row in range(len(given)) if row not in known]
    assert unknown.samples == others
    assert bool(y[others].isnan().all())
    if known:
        torch.testing.assert_close(y[known], alone(model, x[known], [given[row] for row in known]))
    return y


@pytest.mark.every_device(emulated_if=lambda name, packed, **_: name != "mlp-more-dimensions" and packed == "b")
@each_device
@pytest.mark.parametrize("packed", ["", "b", "ab"])
@pytest.mark.parametrize("name", MODELS)
def test_known_samples_are_computed_and_the_others_nan(name, packed, device):
    model, x = make(name, device=device)
    for task in packed:
        pack_task(model, task)
    check_rows(model, x, GIVEN, KNOWN)
    check_rows(model, x, ["no", "no", "no", "c", "no"], [3])
    check_rows(model, x, ["x", "y", "z", "x", "y"], [])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_known_samples(name):
    model, x = make(name)
    results = []
    for run in (
        lambda leaf: marked(model, leaf, GIVEN)[0][KNOWN],
        lambda leaf: alone(model, leaf[KNOWN], [GIVEN[row] for row in KNOWN]),
    ):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append((leaf.grad, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


def test_the_list_names_each_unknown_one_once_in_order_and_where_its_samples_are():
    model = mlp()
    _, unknown = marked(model, torch.randn(6, 4, dtype=torch.float64), ["z", "a", "y", "z", "b", "y"])
    assert unknown == ["z", "y"] and unknown.samples == [0, 2, 3, 5]
    unknown.append("changed")
    block = using_task(model, ["a", "z"], unknown="mark")
    for _ in range(2):
        with block as unknown:
            assert unknown == ["z"] and unknown.samples == [1]
            unknown.clear()


def test_where_all_are_known_nothing_is_marked():
    model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    y, unknown = marked(model, x, ["b", "a", "b"])
    assert unknown == [] and unknown.samples == []
    torch.testing.assert_close(y, alone(model, x, ["b", "a", "b"]))
    y, unknown = marked(model, x, "a")
    assert unknown == []
    torch.testing.assert_close(y, expected(model, "a", x))
    y, unknown = marked(model, x[:0], [])
    assert unknown == [] and y.shape == (0, 3)
    y, unknown = marked(model, x, Superposition({"a": 1.0}))
    assert unknown == [] and not y.isnan().any()


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)], ids=str)
def test_one_unknown_name_for_the_whole_batch(shape):
    model = mlp()
    y, unknown = marked(model, torch.randn(shape, dtype=torch.float64), "no")
    assert unknown == ["no"] and unknown.samples == []
    assert y.shape == (*shape[:-1], 3) and bool(y.isnan().all())


def test_one_image_without_a_batch():
    model, x = make("cnn")
    for given in (["no"], "no"):
        with using_task(model, given, unknown="mark"):
            y = model[0](x[0])
        assert y.shape == (4, 6, 6) and bool(y.isnan().all())
    with using_task(model, ["b"], unknown="mark"):
        assert model[0](x[0]).isfinite().all()


def test_slots_that_no_task_has():
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)  # slot 0 was that of "default"
    given = [1, 0, 2, 7, -1]
    for form in (given, torch.tensor(given), ["a", 0, 2, 7, -1]):
        y, unknown = marked(model, x, form)
        assert unknown == [0, 7, -1] and unknown.samples == [1, 3, 4]
        torch.testing.assert_close(y[[0, 2]], alone(model, x[[0, 2]], ["a", "b"]))
        assert bool(y[[1, 3, 4]].isnan().all())
    for wrong in ([True, "a"], [1.0, "a"], torch.tensor([1.0]), torch.tensor([[1]]), b"a", 3):
        with pytest.raises((TypeError, ValueError), match="task"):
            using_task(model, wrong, unknown="mark")


def test_an_unknown_word_for_unknown():
    for given in ("Mark", None, True, "ignore"):
        with pytest.raises(ValueError, match="unknown must be 'raise' or 'mark', got"):
            using_task(mlp(), "a", unknown=given)
    with pytest.raises(ValueError, match="must be one of"):
        using_task(mlp(), ["no"], unknown="raise")


class TestSequencesFirst:
    @pytest.mark.parametrize("given", [["b", "no", "a", "c"], ["b", "no", "b", "b"], ["no"] * 4], ids=str)
    @pytest.mark.parametrize("options", [{}, {"batch_dim": 1}], ids=str)
    def test_the_second_dimension(self, given, options):
        model, x = with_tasks(Recurrent()), torch.randn(3, 4, 4, dtype=torch.float64)
        y, unknown = marked(model, x, given, **options)
        assert y.shape == x.shape
        for row, name in enumerate(given):
            if name == "no":
                assert bool(y[:, row].isnan().all()) and row in unknown.samples
            else:
                with using_task(model, name):
                    torch.testing.assert_close(y[:, row : row + 1], model(x[:, row : row + 1]))

    def test_both_in_one_model(self):
        model, x = with_tasks(Turned(Recurrent())), torch.randn(4, 3, 4, dtype=torch.float64)
        check_rows(model, x, ["b", "no", "a", "c"], [0, 2, 3])

    def test_what_may_be_either_is_refused_as_without_unknown_ones_also_with_one_known_task(self):
        model = with_tasks(Turned(Recurrent()))
        x = torch.randn(4, 4, 4, dtype=torch.float64)
        for given in (["b", "no", "a", "c"], ["b", "no", "b", "b"]):
            with pytest.raises(RuntimeError, match="first or the second dimension"):
                marked(model, x, given)
        # Two known samples of a batch of three are no reason.
        check_rows(model, torch.randn(3, 2, 4, dtype=torch.float64), ["b", "no", "a"], [0, 2])

    def test_a_layer_in_two_places_is_refused_where_the_block_is_made(self):
        model = Turned(Recurrent())
        model.before = model.inner.gates = MaskedLinear(4, 4)
        model.inner.out = MaskedLinear(4, 4)
        model = with_tasks(model)
        with pytest.raises(ValueError, match=r"batch_dim must be 0 or 1.*elsewhere, 'before'"):
            using_task(model, ["b", "no", "b", "b"], unknown="mark")

    def test_another_number_of_samples(self):
        model = mlp()
        with pytest.raises(RuntimeError, match="5 samples .* each of 2"):
            marked(model, torch.randn(5, 4, dtype=torch.float64), ["a", "no"])


def _with_norm(norm):
    model = nn.Sequential(MaskedConv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), MaskedLinear(48, 4), nn.Linear(4, 2)).double()
    bank = MaskBank(model, per_task=["5.*"] if isinstance(norm, TaskBatchNorm2d) else ["1.*", "5.*"])
    for task in "ab":
        bank.add_task(task)
    bank.remove_task("default")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return randomize_masks(model)


NORMS = {
    "task": lambda: TaskBatchNorm2d(3),
    "task-without-statistics": lambda: TaskBatchNorm2d(3, track_running_stats=False),
    "kept": lambda: nn.BatchNorm2d(3),
    "group": lambda: nn.GroupNorm(3, 3),
}


class TestWhatElseBelongsToTasks:
    @pytest.mark.parametrize("name", NORMS)
    def test_norms_and_heads_in_eval_mode(self, name):
        model = _with_norm(NORMS[name]()).eval()
        x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
        check_rows(model, x, GIVEN, KNOWN) if name != "task-without-statistics" else marked(model, x, GIVEN)
        check_rows(model, x, ["no"] * 5, [])
        y, _ = marked(model, x, "no")
        assert y.shape == (5, 2) and bool(y.isnan().all())

    @pytest.mark.parametrize("name", ["task", "kept", "task-without-statistics"])
    def test_statistics_are_those_of_the_known_samples(self, name):
        model = _with_norm(NORMS[name]()).train()
        twin, x = copy.deepcopy(model), torch.randn(5, 1, 6, 6, dtype=torch.float64)
        y, _ = marked(model, x, GIVEN)
        with using_task(twin, [GIVEN[row] for row in KNOWN]):
            wanted = twin(x[KNOWN])
        torch.testing.assert_close(y[KNOWN], wanted)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("name", ["task", "kept"])
    def test_no_statistics_of_unknown_samples_alone(self, name):
        model = _with_norm(NORMS[name]()).train()
        before = copy.deepcopy(model.state_dict())
        for given in (["no"] * 5, "no"):
            y, _ = marked(model, torch.randn(5, 1, 6, 6, dtype=torch.float64), given)
            assert bool(y.isnan().all())
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    def test_shared_batch_statistics_are_refused_before_anything_changes(self):
        model = nn.Sequential(MaskedConv2d(1, 3, 3), nn.BatchNorm2d(3))
        add_task(model, "a")
        x = torch.randn(3, 1, 6, 6)
        block = using_task(model, ["a", "no", "a"], unknown="mark")
        with pytest.raises(RuntimeError, match="BatchNorm2d '1' normalises all samples together: call model.eval"), block:
            model(x)
        assert model[1].num_batches_tracked == 0
        model.eval()
        with block:
            assert model(x).isnan().flatten(1).any(1).tolist() == [False, True, False]
        model[1] = nn.BatchNorm2d(3, track_running_stats=False).eval()
        with pytest.raises(RuntimeError, match="normalises all samples together"), block:
            model(x)
        model.train()
        with using_task(model, ["a"] * 3, unknown="mark"):
            model(x)

    def test_embeddings_of_tokens(self):
        model = nn.Sequential(nn.Embedding(7, 4), MaskedLinear(4, 2))
        bank = MaskBank(model, per_task="0.*")
        bank.add_task("a")
        tokens = torch.randint(7, (3, 5))
        y, _ = marked(model, tokens, ["a", "no", "default"])
        assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
        torch.testing.assert_close(y[[0, 2]], alone(model, tokens[[0, 2]], ["a", "default"]))

    def test_integers_cannot_be_marked(self):
        class Nearest(nn.Module):
            def __init__(self):
                super().__init__()
                self.centres = nn.Parameter(torch.randn(3, 4))

            def forward(self, x):
                return (x @ self.centres.T).argmax(1)

        model = nn.Sequential(MaskedLinear(4, 4), Nearest())
        bank = MaskBank(model, per_task="1.*")
        bank.add_task("a")
        with pytest.raises(RuntimeError, match="floating-point tensor, for unknown='mark' NaN, got torch.int64"):
            marked(model, torch.randn(3, 4), ["a", "no", "a"])


class _Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * 2
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize("packed", ["", "a"])
def test_layers_with_a_forward_of_their_own(packed):
    model = mm.convert(nn.Sequential(_Standardised(1, 3, 3), nn.Flatten(), _Doubled(48, 4)).double(), mask_init="normal")
    for task in "ab":
        add_task(model, task)
    for task in packed:
        pack_task(model, task)
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
    check_rows(model, x, GIVEN, KNOWN)
    check_rows(model, x, ["no"] * 5, [])
    assert bool(marked(model, x, "no")[0].isnan().all())


class _Attends(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("given", [["b", "no", "a"], ["no", "b", "no"], "no"], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(batch_first, given):
    model = mm.convert(_Attends(batch_first).double().eval(), mask_init="normal")
    for task in "ab":
        add_task(model, task)
    x = torch.randn((3, 2, 4) if batch_first else (2, 3, 4), dtype=torch.float64)
    options = {} if batch_first else {"batch_dim": 1}
    y, _ = marked(model, x, given, **options)
    for row in range(3):
        name, one = given if isinstance(given, str) else given[row], slice(row, row + 1)
        index = (one,) if batch_first else (slice(None), one)
        if name == "no":
            assert bool(y[index].isnan().all())
        else:
            with using_task(model, name):
                torch.testing.assert_close(y[index], model(x[index]))


def test_embeddings_and_modules_that_are_split_by_task():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MaskedLinear(4, 2)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))

    model = nn.Sequential(mm.nn.MaskedEmbedding(7, 4), mm.nn.split_by_task(Flat()))
    for task in "ab":
        add_task(model, task)
    randomize_masks(model)
    tokens = torch.randint(7, (3, 5))
    y, _ = marked(model, tokens, ["a", "no", "b"])
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
    torch.testing.assert_close(y[[0, 2]], alone(model, tokens[[0, 2]], ["a", "b"]))
    for given in (["no"] * 3, "no"):
        y, _ = marked(model, tokens, given)
        assert y.shape == (3, 5, 2) and bool(y.isnan().all())


def test_batches_that_a_model_repeats():
    model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    with using_task(model, ["a", "no", "b"], repeat=2, unknown="mark") as unknown:
        once, twice = model(x), model(x.repeat_interleave(2, 0))
    assert unknown.samples == [1] and once.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0), equal_nan=True)


def test_a_layer_of_one_task():
    model, x = nn.Sequential(MaskedLinear(4, 3)).double(), torch.randn(3, 4, dtype=torch.float64)
    check_rows(model, x, ["default", "no", "default"], [0, 2])
    check_rows(model, x, ["no"] * 3, [])
    assert bool(marked(model, x, "no")[0].isnan().all())


class TestTasksThatComeAndGo:
    def test_between_two_entries(self):
        model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
        block = using_task(model, ["a", "c", "b"], unknown="mark")
        for change, unknown in (
            (lambda: None, ["c"]),
            (lambda: add_task(model, "c"), []),
            (lambda: remove_task(model, "a"), ["a"]),
            (lambda: (remove_task(model, "c"), add_task(model, "a")), ["c"]),
        ):
            change()
            with block as found:
                y = model(x)
            assert found == unknown
            for row, name in enumerate(["a", "c", "b"]):
                if name in unknown:
                    assert bool(y[row].isnan().all())
                else:
                    torch.testing.assert_close(y[row], expected(model, name, x[row]))

    def test_inside_the_block_a_removed_task_is_refused_and_an_added_one_stays_nan(self):
        model, x = mlp(), torch.randn(2, 4, dtype=torch.float64)
        with using_task(model, ["a", "c"], unknown="mark"):
            add_task(model, "c")
            assert model(x).isnan().all(1).tolist() == [False, True]
            thread = threading.Thread(target=remove_task, args=(model, "a"))
            thread.start()
            thread.join()
            with pytest.raises(RuntimeError, match="removed"):
                model(x)

    def test_a_body_that_knows_it_put_in_past_torch(self):
        outer, x = nn.Sequential(mlp()), torch.randn(2, 4, dtype=torch.float64)
        block = using_task(outer, ["a", "c"], unknown="mark")
        with block as unknown:
            assert unknown == ["c"]
        other = mlp()
        add_task(other, "c")
        using_task(outer, ["a", "c"], unknown="mark")
        old = outer[0]  # it lives on
        outer._modules["0"] = other
        with block, pytest.raises(RuntimeError, match="'c' became known after the block was entered"):
            outer(x)
        del old
        with block as unknown:
            assert unknown == [] and not outer(x).isnan().any()

    def test_a_task_of_some_layers_only_is_refused(self):
        model = mlp()
        add_task(model[2], "c")
        with pytest.raises(ValueError, match="different tasks"):
            using_task(model, ["a", "c"], unknown="mark")
        using_task(model, ["a", "no"], unknown="mark")


def test_nested_blocks():
    model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    with using_task(model, ["a", "no", "b"], unknown="mark"):
        with using_task(model, ["b", "b", "no"], unknown="mark"):
            assert model(x).isnan().all(1).tolist() == [False, False, True]
        with using_task(model, "b"):
            torch.testing.assert_close(model(x), expected(model, "b", x))
        assert model(x).isnan().all(1).tolist() == [False, True, False]


def test_checkpoints_recompute_the_same_samples():
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    found = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        y, _ = marked(model, x, GIVEN, run)
        y[KNOWN].square().sum().backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_compiled_models():
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    wanted, _ = marked(model, x, GIVEN)
    for compiled in (torch.compile(model, backend="eager"), mm.compile(copy.deepcopy(model), backend="eager")):
        got, _ = marked(compiled, x, GIVEN)
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_what_is_read_past_a_layer_stays_ambiguous():
    model = mlp()
    with using_task(model, ["a", "no"], unknown="mark"), pytest.raises(RuntimeError, match="ambiguous"):
        _ = model[0].mask_logits


def test_a_replica_of_data_parallel_refuses():
    model = mlp()
    with using_task(model, ["a", "no"], unknown="mark"):
        replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="one task for the whole batch"):
        replica(torch.randn(1, 4, dtype=torch.float64))
