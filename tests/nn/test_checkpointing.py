"""using_task and activation checkpoints: a recomputation uses the task of its forward, or is refused."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
import torch
from support.models import assert_same_gradients, assert_uses, expected, gradients, mlp, reference_gradients, two_task_model
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from metamask_ext import add_task, remove_task, using_task
from metamask_ext.nn import MaskedLinear


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64)


def _once(model, x):
    return checkpoint(model, x, use_reentrant=False)


def _each_layer(model, x):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def _nested(model, x):
    def inner(given):
        return checkpoint(model[2:], given, use_reentrant=False)

    return checkpoint(lambda given: inner(model[:2](given)), x, use_reentrant=False)


def _nested_with_all_layers_inside(model, x):
    return checkpoint(
        lambda given: checkpoint(lambda g: checkpoint(model, g, use_reentrant=False), given, use_reentrant=False),
        x,
        use_reentrant=False,
    )


def _sequential(model, x):
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


def _keyword(model, x):
    return checkpoint(lambda *, given: model(given), given=x, use_reentrant=False)


def _no_early_stop(model, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def _nested_without_early_stop(model, x):
    # The outer recomputation then runs the inner layers too.
    with set_checkpoint_early_stop(False):
        return _nested_with_all_layers_inside(model, x)


def _saved_on_cpu_inside(model, x):
    def run(given):
        with torch.autograd.graph.save_on_cpu():
            return model(given)

    return checkpoint(run, x, use_reentrant=False)


def _selective(model, x):
    context = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
    return checkpoint(model, x, use_reentrant=False, context_fn=context)


CHECKPOINTS = pytest.mark.parametrize(
    "run",
    [
        _once,
        _each_layer,
        _nested,
        _nested_with_all_layers_inside,
        _sequential,
        _keyword,
        _no_early_stop,
        _nested_without_early_stop,
        _selective,
    ],
    ids=lambda run: run.__name__.strip("_").replace("_", "-"),
)


class TestNonReentrantCheckpoints:
    @CHECKPOINTS
    @pytest.mark.parametrize("where", ["inside", "after", "under-another-task", "under-another-model"])
    def test_the_gradient_is_that_without_a_checkpoint_wherever_backward_runs(self, model, x, run, where):
        wanted = reference_gradients(model, x, "a")
        with using_task(model, "a"):
            loss = run(model, x.requires_grad_()).square().sum()
            if where == "inside":
                loss.backward()
        if where == "after":
            loss.backward()
        elif where == "under-another-task":
            with using_task(model, "b"):
                loss.backward()
                assert_uses(model, "b", x)  # the block is as it was
        elif where == "under-another-model":
            with using_task(mlp(), "b"):
                loss.backward()
        assert_same_gradients(gradients(model), wanted)

    @CHECKPOINTS
    def test_two_tasks_losses_are_summed_and_differentiated_at_once(self, model, x, run):
        wanted = reference_gradients(model, x, "a", "b")
        losses = []
        for task in "ab":
            with using_task(model, task):
                losses.append(run(model, x.detach().requires_grad_()).square().sum())
        sum(losses).backward()
        assert_same_gradients(gradients(model), wanted)

    @CHECKPOINTS
    def test_a_second_backward_through_a_retained_graph_is_right_again(self, model, x, run):
        wanted = reference_gradients(model, x, "a")
        with using_task(model, "a"):
            loss = run(model, x.requires_grad_()).square().sum()
        loss.backward(retain_graph=True)
        assert_same_gradients(gradients(model), wanted)
        with using_task(model, "b"):
            if run is _selective:  # torch allows one backward only
                with pytest.raises(RuntimeError, match="backward an extra time"):
                    loss.backward()
                return
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_a_block_opened_inside_the_function_is_opened_again(self, model, x):
        wanted = reference_gradients(model, x, "a", "b")

        def run(given):
            return sum(_under(model, task, given).square().sum() for task in "ab")

        checkpoint(run, x, use_reentrant=False).backward()
        assert_same_gradients(gradients(model), wanted)
        with using_task(model, "b"):  # around the forward, and none around the backward
            loss = checkpoint(run, x, use_reentrant=False)
        loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_layers_under_an_outer_and_an_inner_block_each_recompute_under_their_own(self, model, x):
        def run(given):
            hidden = model[:2](given)  # the outer block's task
            with using_task(model, "b"):
                hidden = model[2:4](hidden)
            return model[4](hidden)

        with using_task(model, "a"):
            run(x).square().sum().backward()
            wanted = gradients(model)
            loss = checkpoint(run, x, use_reentrant=False).square().sum()
        with using_task(model, "b"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)
        assert wanted["2.masks.b"] is not None and wanted["2.masks.a"] is None

    def test_nested_checkpoints_under_blocks_of_their_own(self, model, x):
        def inner(given):
            return model(given).square().sum()

        def outer(given):
            total = given.new_zeros(())
            for task in "ab":
                with using_task(model, task):
                    total = total + checkpoint(inner, given, use_reentrant=False)
            return total

        wanted = reference_gradients(model, x, "a", "b")
        loss = checkpoint(outer, x.requires_grad_(), use_reentrant=False)
        with using_task(model, "a"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_hooks_of_another_kind_inside_the_checkpoint(self, model, x):
        wanted = reference_gradients(model, x, "a")
        with using_task(model, "a"):
            loss = _saved_on_cpu_inside(model, x.requires_grad_()).square().sum()
        with using_task(model, "b"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_the_stack_of_hooks_is_left_as_it_was(self, model, x):
        packed = []

        def pack(tensor):
            packed.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with using_task(model, "a"):
                _once(model, x.requires_grad_())
            before = len(packed)
            (x * x).sum()
        assert len(packed) > before
        after = len(packed)
        (x * x).sum()
        assert len(packed) == after

    def test_a_task_removed_before_backward_is_an_error_not_the_other_tasks_gradient(self, model, x):
        with using_task(model, "a"):
            loss = _once(model, x).square().sum()
        remove_task(model, "a")
        with pytest.raises(RuntimeError, match="the active task was removed"):
            loss.backward()
        assert all(grad is None for name, grad in gradients(model).items() if name.endswith(".b"))

    def test_tasks_added_before_backward_to_a_model_that_had_one_do_not_change_the_gradient(self, x):
        model = nn.Sequential(MaskedLinear(4, 3)).double()
        expected(model, "default", x).square().sum().backward()
        wanted = gradients(model)
        loss = _once(model, x).square().sum()
        add_task(model, "b")
        with using_task(model, "b"):
            loss.backward()
        assert_same_gradients(gradients(model), {**wanted, "0.masks.b": None, "0.bias_masks.b": None})

    def test_the_only_task_exchanged_for_another_before_backward_is_an_error(self, x):
        model = nn.Sequential(MaskedLinear(4, 3)).double()
        loss = _once(model, x).square().sum()
        add_task(model, "b")
        remove_task(model, "default")
        with pytest.raises(RuntimeError, match="the active task was removed"):
            loss.backward()
        assert all(grad is None for grad in gradients(model).values())

    def test_an_exception_in_the_recomputation_leaves_the_block_as_it_was(self, model, x):
        calls = []

        def run(given):
            calls.append(1)
            if len(calls) == 2:
                raise ArithmeticError("recomputed")
            return model(given)

        with using_task(model, "a"):
            loss = checkpoint(run, x, use_reentrant=False).sum()
        with using_task(model, "b"):
            with pytest.raises(ArithmeticError, match="recomputed"):
                loss.backward()
            assert_uses(model, "b", x)

    def test_backward_in_another_thread_recomputes_under_the_task_of_the_forward(self, model, x):
        wanted = reference_gradients(model, x, "a")
        with using_task(model, "a"):
            loss = _once(model, x).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert_same_gradients(gradients(model), wanted)

    def test_a_checkpoint_does_not_keep_the_model_alive(self, x):
        model = mlp()
        with using_task(model, "a"):
            loss = _once(model, x).square().sum()
        loss.backward()
        layer = weakref.ref(model[0])
        del model, loss
        gc.collect()
        assert layer() is None


def _under(model, task, x):
    with using_task(model, task):
        return model(x)


class TestReentrantCheckpoints:
    @pytest.mark.parametrize("where", ["inside", "after", "under-another-task"])
    def test_with_several_tasks_the_recomputation_is_refused_with_advice(self, model, x, where):
        with using_task(model, "a"):
            loss = checkpoint(model, x.requires_grad_(), use_reentrant=True).square().sum()
            if where == "inside":
                with pytest.raises(RuntimeError, match="use_reentrant=False"):
                    loss.backward()
        if where == "after":
            with pytest.raises(RuntimeError, match="none is active"):
                loss.backward()
        if where == "under-another-task":
            with using_task(model, "b"), pytest.raises(RuntimeError, match="use_reentrant=False"):
                loss.backward()
        assert all(grad is None for grad in gradients(model).values())

    def test_a_block_opened_inside_the_function_is_right(self, model, x):
        wanted = reference_gradients(model, x, "a")
        loss = checkpoint(lambda given: _under(model, "a", given), x.requires_grad_(), use_reentrant=True).square().sum()
        with using_task(model, "b"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_a_block_of_another_model_inside_the_function_does_not_let_the_outer_one_through(self, model, x):
        # The recomputation opens the inner block in the backward; the outer one, of the wrong task, stays what it was.
        other = mlp()

        def run(given):
            with using_task(other, "a"):
                return model(given) + other(given)

        with using_task(model, "a"):
            loss = checkpoint(run, x.requires_grad_(), use_reentrant=True).square().sum()
        with using_task(model, "b"), pytest.raises(RuntimeError, match="during a backward"):
            loss.backward()
        assert all(grad is None for grad in gradients(model).values())

    def test_a_non_reentrant_checkpoint_inside_a_reentrant_one_is_right(self, model, x):
        def run(given):
            with using_task(model, "a"):
                return checkpoint(model, given, use_reentrant=False)

        wanted = reference_gradients(model, x, "a")
        loss = checkpoint(run, x.requires_grad_(), use_reentrant=True).square().sum()
        with using_task(model, "b"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("block", [True, False], ids=["in-a-block", "no-block"])
    def test_a_model_with_one_task_is_right_in_every_variant(self, x, reentrant, block):
        model = nn.Sequential(MaskedLinear(4, 4), nn.Tanh(), MaskedLinear(4, 2)).double()
        expected(model, "default", x).square().sum().backward()
        wanted = gradients(model)
        x.requires_grad_()
        if block:
            with using_task(model, "default"):
                loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        else:
            loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        loss.backward()
        assert_same_gradients(gradients(model), wanted)
        loss = checkpoint_sequential(model, 2, x, use_reentrant=reentrant).square().sum()
        loss.backward()
        assert_same_gradients(gradients(model), wanted)


def test_a_forward_inside_a_backward_may_use_a_block_opened_there(model, x):
    seen = []

    class CallsModel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        def backward(ctx, grad):
            with pytest.raises(RuntimeError, match="during a backward"):
                model(x)
            with using_task(model, "b"):
                seen.append(model(x))
            return grad

    with using_task(model, "a"):
        CallsModel.apply(x.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(seen[0], expected(model, "b", x))


def test_second_order_gradients_through_a_block_that_has_closed(model, x):
    parameter = model[0].weight
    with using_task(model, "a"):
        loss = model(x).square().sum()
    (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
    first.square().sum().backward()
    got = gradients(model)
    (first,) = torch.autograd.grad(expected(model, "a", x).square().sum(), parameter, create_graph=True)
    first.square().sum().backward()
    assert_same_gradients(got, gradients(model))


def test_layers_with_one_task_need_no_block_inside_a_block_of_another_model(model, x):
    single = nn.Sequential(MaskedLinear(4, 3)).double()
    with using_task(model, "a"):
        torch.testing.assert_close(single(x), expected(single, "default", x))


def test_two_task_model_helper_makes_two_different_tasks():
    layer = two_task_model(MaskedLinear(3, 2))[0]
    assert list(layer.masks) == ["a", "b"] and not torch.equal(layer.masks["a"], layer.masks["b"])
