"""using_task with a task for each sample: a mixed-task batch is each sample alone under its own task."""

from __future__ import annotations

import asyncio
import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gpu import DEVICES
from support.mixed_task_models import MIXED, MODELS, alone, compare, make, three_task_mlp, together
from support.models import assert_same_gradients, expected, gradients, mlp, randomize_masks
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import metamask_ext
from metamask_ext import add_task, remove_task, slots, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.optim import FusedMaskedSGD

each_device = pytest.mark.parametrize("device", DEVICES)
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.every_device(emulated_if=lambda names, **_: names is MIXED)
@each_device
@each_model
@pytest.mark.parametrize(
    "names",
    [MIXED, ["a"] * 5, ["c", "c", "c", "c", "a"], ["a", "a", "b", "b", "c"]],
    ids=["mixed", "one-task", "one-other", "sorted"],
)
def test_a_mixed_batch_is_each_sample_alone_forward_and_gradients(name, names, device):
    model, x = make(name, device=device)
    grads = compare(model, x, names)
    unused = {task for task in tasks(model) if task not in names}
    for parameter, grad in grads.items():
        if "masks." in parameter:
            assert (grad is None) == (parameter.rpartition(".")[2] in unused), parameter


@each_device
@each_model
def test_slots_in_a_list_and_in_a_tensor_mean_the_names_at_them(name, device):
    model, x = make(name, device=device)
    by_name = {task: slot for slot, task in enumerate(slots(model)) if task is not None}
    given = [by_name[task] for task in MIXED]
    assert min(given) == 1  # slot 0 was that of "default"
    wanted = together(model, x, MIXED)
    for form in (given, tuple(given), torch.tensor(given), [torch.tensor(slot) for slot in given], tuple(MIXED)):
        torch.testing.assert_close(together(model, x, form), wanted, rtol=0, atol=0)


@pytest.mark.every_device
@each_device
def test_second_derivatives_are_those_of_the_samples_alone(device):
    model, x = make("mlp", device=device)
    found = []
    for run in (lambda: together(model, x, MIXED), lambda: alone(model, x, MIXED)):
        first = torch.autograd.grad(run().square().sum(), model[0].weight, create_graph=True)[0]
        first.square().sum().backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


class TestBlocks:
    def test_nested_blocks_of_both_forms(self):
        model, x = make("mlp")
        with using_task(model, "a"):
            with using_task(model, MIXED) as entered:
                assert entered is model
                torch.testing.assert_close(model(x), alone(model, x, MIXED))
                with using_task(model, "b"):
                    torch.testing.assert_close(model(x), expected(model, "b", x))
                with using_task(model, MIXED[::-1]):
                    torch.testing.assert_close(model(x), alone(model, x, MIXED[::-1]))
                torch.testing.assert_close(model(x), alone(model, x, MIXED))
            torch.testing.assert_close(model(x), expected(model, "a", x))
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_a_block_over_one_layer_mixes_that_layer_only(self):
        model, x = make("mlp")
        with using_task(model, "a"):
            with using_task(model[2], MIXED):
                got = model(x)
            hidden = model[1](model[0](x))
            with using_task(model[2], MIXED):
                hidden = model[2](hidden)
            torch.testing.assert_close(got, model[3:](hidden))
            assert not torch.allclose(got, model(x))

    def test_one_object_may_be_entered_again_and_decorates(self):
        model, x = make("mlp")
        block = using_task(model, MIXED)
        wanted = alone(model, x, MIXED)
        for _ in range(2):
            with block, block:
                torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(block(model)(x), wanted)

    def test_threads_and_coroutines_keep_their_own_mixture(self):
        model, x = make("mlp")
        barrier = threading.Barrier(2, timeout=60)
        mixtures = [MIXED, MIXED[::-1]]

        def run(names):
            with using_task(model, names):
                barrier.wait()
                output = model(x)
                barrier.wait()
            return output

        with ThreadPoolExecutor(2) as pool:
            for names, output in zip(mixtures * 2, pool.map(run, mixtures * 2)):
                torch.testing.assert_close(output, alone(model, x, names))

        async def coroutine(names):
            with using_task(model, names):
                await asyncio.sleep(0)
                return model(x)

        async def main():
            return await asyncio.gather(*map(coroutine, mixtures))

        for names, output in zip(mixtures, asyncio.run(main())):
            torch.testing.assert_close(output, alone(model, x, names))

    def test_a_model_with_one_task_takes_a_batch_of_it_and_checks_the_samples(self):
        model = nn.Sequential(MaskedLinear(4, 3)).double()
        x = torch.randn(2, 4, dtype=torch.float64)
        with using_task(model, [0, "default"]):
            torch.testing.assert_close(model(x), expected(model, "default", x))
            with pytest.raises(RuntimeError, match="3 samples .* for each of 2"):
                model(torch.cat([x, x[:1]]))

    @pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 4), (2, 4), (1, 2, 4)], ids=str)
    def test_one_sample_with_and_without_a_batch_dimension(self, shape):
        model = mlp()
        x = torch.randn(shape, dtype=torch.float64)
        with using_task(model, ["b"]):
            if len(shape) > 1 and shape[0] != 1:
                with pytest.raises(RuntimeError, match=f"with {shape[0]} samples .* for each of 1"):
                    model(x)
            else:
                torch.testing.assert_close(model(x), expected(model, "b", x))

    @pytest.mark.parametrize("given", [[], (), torch.empty(0, dtype=torch.int64)], ids=["list", "tuple", "tensor"])
    @each_model
    def test_a_batch_of_no_sample_is_empty_and_moves_nothing(self, name, given):
        model, x = make(name, samples=0)
        output = together(model, x, given)
        with using_task(model, "a"):
            assert output.shape == model(x).shape
        output.sum().backward()
        assert all(grad is None or not grad.any() for grad in gradients(model).values())


class TestSamples:
    @pytest.mark.parametrize("names", [MIXED, ["a"] * 5], ids=["mixed", "one-task"])
    @pytest.mark.parametrize("samples", [0, 1, 4, 6])
    @pytest.mark.parametrize("name", ["mlp", "cnn"])
    def test_another_number_of_samples_is_refused_naming_both(self, name, samples, names):
        model, x = make(name, samples)
        with using_task(model, names), pytest.raises(RuntimeError, match=f"with {samples} samples .* for each of 5"):
            model(x)

    @pytest.mark.parametrize("names", [MIXED, ["a"] * 5], ids=["mixed", "one-task"])
    @pytest.mark.parametrize("name", ["mlp", "cnn"])
    def test_a_beam_search_which_gives_a_sample_several_rows_is_refused_with_the_way_out(self, name, names):
        model, x = make(name)
        rows = x.repeat_interleave(2, 0)
        with using_task(model, names), pytest.raises(RuntimeError, match="as in a beam search, name its task 2 times"):
            model(rows)
        wanted = together(model, x, names)
        torch.testing.assert_close(together(model, rows, [task for task in names for _ in range(2)])[::2], wanted)

    @pytest.mark.parametrize("names", [MIXED, ["a"] * 5], ids=["mixed", "one-task"])
    def test_what_there_is_not_one_of_cannot_be_read(self, names):
        model = three_task_mlp()
        for read in (lambda: model[0].mask_logits, lambda: model[0].bias_mask_logits):
            with using_task(model, names), pytest.raises(RuntimeError, match="is ambiguous in a mixed-task batch"):
                read()

    def test_a_layer_read_past_forward_is_refused_and_one_that_is_called_is_right(self):
        attention = metamask_ext.convert(nn.MultiheadAttention(4, 2, batch_first=True)).double()
        add_task(randomize_masks(attention), "b")
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        with using_task(attention, ["default", "b"]):
            for read in (
                lambda: attention.out_proj.weight + 1,
                lambda: attention.out_proj.bias.sum(),
                lambda: attention.in_proj_weight + 1,
            ):
                with pytest.raises(RuntimeError, match=r"(weight|bias) of \w+ is ambiguous in a mixed-task batch"):
                    read()
            got, attended = attention.out_proj(x), attention(x, x, x)[0]
        torch.testing.assert_close(got, alone(attention.out_proj, x, ["default", "b"]))
        for index, task in enumerate(["default", "b"]):
            own = x[index : index + 1]
            with using_task(attention, task):
                torch.testing.assert_close(attended[index : index + 1], attention(own, own, own)[0])


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            pytest.param(["a", "zz"], ValueError, r"one of 'a', 'b', 'c', got 'zz'", id="unknown-name"),
            pytest.param([1, 0], ValueError, r"task\[1\] must be the slot of a task, got 0, whose .* 'a', 'b', 'c'", id="removed"),
            pytest.param([1, 4], ValueError, r"task\[1\] must be a slot in 0 to 3, got 4", id="too-large"),
            pytest.param([-1], ValueError, r"task\[0\] must be a slot in 0 to 3, got -1", id="negative"),
            pytest.param(torch.tensor([1, -1]), ValueError, r"task\[1\] .* got -1", id="negative-tensor"),
            pytest.param(torch.tensor([2**40]), ValueError, r"task\[0\] .* got 1099511627776", id="too-large-tensor"),
            pytest.param(torch.tensor([1], dtype=torch.int32), TypeError, "must be int64 .* got torch.int32", id="int32"),
            pytest.param(torch.tensor([1.0]), TypeError, "must be int64 .* got torch.float32", id="float-tensor"),
            pytest.param(torch.tensor([True]), TypeError, "must be int64 .* got torch.bool", id="bool-tensor"),
            pytest.param(torch.tensor([[1]]), ValueError, r"must be \[B\].* got shape \[1, 1\]", id="matrix"),
            pytest.param(torch.tensor(1), ValueError, r"must be \[B\].* got shape \[\]", id="scalar-tensor"),
            pytest.param([True], TypeError, r"task\[0\] must be a name or a slot, got bool", id="bool"),
            pytest.param([1.0], TypeError, r"task\[0\] must be a name or a slot, got float", id="float"),
            pytest.param([None], TypeError, r"task\[0\] must be a name or a slot, got NoneType", id="none"),
            pytest.param([["a"], ["b"]], TypeError, r"task\[0\] must be a name or a slot, got list", id="nested"),
            pytest.param([torch.tensor([1, 2])], TypeError, r"task\[0\] must be a name or a slot, got Tensor", id="tensor-entry"),
            pytest.param([""], ValueError, "task name", id="empty-name"),
            pytest.param(b"\x01", TypeError, "got bytes", id="bytes"),
            pytest.param({"a": 1}, TypeError, "got dict", id="dict"),
            pytest.param(1, TypeError, "got int", id="one-slot"),
            pytest.param(None, TypeError, "got NoneType", id="nothing"),
        ],
    )
    def test_what_names_no_task_is_refused_where_the_block_is_made(self, given, error, words):
        model = three_task_mlp()
        with pytest.raises(error, match=words):
            using_task(model, given)

    def test_layers_that_count_their_tasks_differently_are_refused_by_slot_and_taken_by_name(self):
        model = nn.Sequential(MaskedLinear(4, 4), MaskedLinear(4, 2)).double()
        for layer, names in zip(model, ("ab", "ba")):
            for task in names:
                add_task(layer, task)
        x = torch.randn(2, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match="count their tasks differently: task 'a' is slot 1 of '0' and 2 of '1'"):
            using_task(model, [0, 1])
        torch.testing.assert_close(together(model, x, [0, 0]), alone(model, x, ["default"] * 2))
        torch.testing.assert_close(together(model, x, ["b", "a"]), alone(model, x, ["b", "a"]))


class TestRemoval:
    def test_a_task_of_an_open_mixed_block_cannot_be_removed(self):
        model = three_task_mlp()
        with using_task(model, ["a", "b"]):
            with pytest.raises(RuntimeError, match="active"):
                remove_task(model, "b")
            remove_task(model, "c")
        assert tasks(model) == ["a", "b"]

    def test_a_task_removed_by_another_thread_is_an_error(self):
        model, x = make("mlp")
        with using_task(model, MIXED):
            thread = threading.Thread(target=remove_task, args=(model, "c"))
            thread.start()
            thread.join()
            with pytest.raises(RuntimeError, match="the active task was removed"):
                model(x)

    def test_a_block_made_before_a_removal_is_refused_at_entry(self):
        model = three_task_mlp()
        block = using_task(model, [1, 3])
        remove_task(model, "c")
        with pytest.raises(ValueError, match="'a', 'b', got 'c'"):
            block.__enter__()


class TestSlots:
    def test_a_removed_slot_is_not_used_again(self):
        model = MaskedLinear(2, 2)
        for task in ("a", "b"):
            add_task(model, task)
        remove_task(model, "b")
        remove_task(model, "default")
        add_task(model, "b")
        assert slots(model) == [None, "a", None, "b"]
        assert tasks(model) == ["a", "b"]
        add_task(model, "default")
        assert slots(model) == [None, "a", None, "b", "default"]

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_slots_survive_a_state_dict_also_the_last_ones_that_are_empty(self, assign):
        model = nn.Sequential(MaskedConv2d(1, 2, 1), nn.Flatten(), MaskedLinear(2, 2))
        for task in ("z", "a", "gone", "m", "also gone"):
            add_task(model, task)
        for task in ("gone", "default", "also gone"):
            remove_task(model, task)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        other = nn.Sequential(MaskedConv2d(1, 2, 1), nn.Flatten(), MaskedLinear(2, 2))
        for task in ("m", "a"):  # in another order than there
            add_task(other, task)
        remove_task(other, "default")
        other.load_state_dict(state, assign=assign)
        assert slots(other) == slots(model) == [None, "z", "a", None, "m", None]
        assert tasks(other) == ["z", "a", "m"]
        add_task(other, "new")
        assert slots(other)[-1] == "new"
        x = torch.randn(3, 1, 1, 1)
        torch.testing.assert_close(together(other, x, [1, 4, 2]), alone(model, x, ["z", "m", "a"]))

    def test_a_state_without_all_tasks_of_the_layer_leaves_its_slots(self):
        model, other = MaskedLinear(2, 2), MaskedLinear(2, 2)
        for task in ("a", "b"):
            add_task(model, task)
        add_task(other, "b")
        model.load_state_dict(other.state_dict(), strict=False)
        assert slots(model) == ["default", "a", "b"]

    def test_a_slot_given_out_here_is_not_given_out_again_after_loading_an_older_state(self):
        model = MaskedLinear(2, 2)
        state = copy.deepcopy(model.state_dict())
        add_task(model, "a")
        remove_task(model, "a")
        model.load_state_dict(state)
        assert slots(model) == ["default", None]

    def test_a_copy_of_the_model_counts_on_its_own(self):
        model = three_task_mlp()
        twin = copy.deepcopy(model)
        add_task(twin, "d")
        assert slots(model) == [None, "a", "b", "c"]
        assert slots(twin) == [None, "a", "b", "c", "d"]


class TestCheckpoints:
    @pytest.mark.parametrize("where", ["inside", "after", "under-another-task", "under-another-mixture"])
    @pytest.mark.parametrize("each_layer", [False, True], ids=["once", "each-layer"])
    def test_a_recomputation_uses_the_mixture_of_its_forward(self, where, each_layer):
        model, x = make("mlp")

        def run(given):
            for part in model if each_layer else [model]:
                given = checkpoint(part, given, use_reentrant=False)
            return given

        alone(model, x, MIXED).square().sum().backward()
        wanted = gradients(model)
        with using_task(model, MIXED):
            loss = run(x.clone().requires_grad_()).square().sum()
            if where == "inside":
                loss.backward()
        if where == "after":
            loss.backward()
        elif where != "inside":
            with using_task(model, "a" if where == "under-another-task" else ["c"] * 3):
                loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_a_block_inside_the_function_is_opened_again(self):
        model, x = make("mlp")
        alone(model, x, MIXED).square().sum().backward()
        wanted = gradients(model)
        with using_task(model, "a"):
            loss = checkpoint(lambda given: together(model, given, MIXED), x, use_reentrant=False).square().sum()
        loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_a_reentrant_checkpoint_is_refused_with_advice(self):
        model, x = make("mlp")
        with using_task(model, MIXED):
            loss = checkpoint(model, x.requires_grad_(), use_reentrant=True).square().sum()
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                loss.backward()
        assert all(grad is None for grad in gradients(model).values())

    def test_a_model_of_one_task_under_a_mixed_block_is_right_after_more_tasks_came(self):
        model = nn.Sequential(MaskedLinear(4, 3)).double()
        x = torch.randn(2, 4, dtype=torch.float64)
        expected(model, "default", x).square().sum().backward()
        wanted = gradients(model)
        with using_task(model, [0, 0]):
            loss = checkpoint(model, x, use_reentrant=False).square().sum()
        add_task(model, "b")
        loss.backward()
        assert_same_gradients(gradients(model), {**wanted, "0.masks.b": None, "0.bias_masks.b": None})


class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("name", ["mlp", "cnn"])
    def test_a_compiled_model_gives_each_mixture_its_own_output_and_gradients(self, name, backend):
        model, x = make(name)
        compiled = torch.compile(model, backend=backend)
        for given in (MIXED, ["a"] * 5, MIXED[::-1], [1, 2, 3, 1, 2]):
            names = [slots(model)[entry] if isinstance(entry, int) else entry for entry in given]
            compare(model, x, given, names, compiled)
        with using_task(model, "a"):
            torch.testing.assert_close(compiled(x), model(x))


class TestOptimisers:
    def test_steps_in_mixed_batches_are_those_of_torchs_sgd(self):
        ours = three_task_mlp()
        theirs = copy.deepcopy(ours)
        fused = FusedMaskedSGD(ours, 0.1, momentum=0.9)
        plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
        for seed, given in enumerate((MIXED, ["a"] * 5, MIXED[::-1], "b")):
            x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            fused.backward(together(ours, x, given).square().sum())
            plain.zero_grad()
            together(theirs, x, given).square().sum().backward()
            plain.step()
        for (name, ours_parameter), theirs_parameter in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(ours_parameter, theirs_parameter, msg=lambda text, name=name: f"{name}: {text}")

    def test_a_batch_of_one_task_runs_the_ordinary_op(self):
        model, x = make("mlp")
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            together(model, x, ["b"] * 5)
        names = [event.name for event in profiler.events() if event.name.startswith("metamask::")]
        assert names == ["metamask::masked_linear"] * 3
