"""using_task: which mask a forward uses, in blocks, threads, coroutines, wrappers and activation checkpoints."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_gradients, gradients, mlp, two_task_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from metamask_ext import add_task, remove_task, using_task
from metamask_ext.nn import MaskedLinear


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64)


def expected(model, task, x):
    """The output computed with torch alone."""
    for layer in model:
        if isinstance(layer, MaskedLinear):
            theta = layer.weight * layer.masks[task].sigmoid()
            x = nn.functional.linear(x, theta, layer.bias * layer.bias_masks[task].sigmoid())
        else:
            x = layer(x)
    return x


def assert_uses(model, task, x, call=None):
    """The call's output is ``task``'s, and differs from the other's."""
    got = (call or model)(x)
    torch.testing.assert_close(got, expected(model, task, x))
    assert not torch.allclose(got, expected(model, "b" if task == "a" else "a", x))


class TestBlocks:
    def test_the_block_chooses_the_task_and_ends(self, model, x):
        for task in ("a", "b", "a"):
            with using_task(model, task) as entered:
                assert entered is model
                assert_uses(model, task, x)
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_inner_block_wins_and_the_outer_comes_back(self, model, x):
        with using_task(model, "a"):
            with using_task(model, "b"):
                assert_uses(model, "b", x)
                with using_task(model, "a"):
                    assert_uses(model, "a", x)
                assert_uses(model, "b", x)
            assert_uses(model, "a", x)

    def test_blocks_of_two_models_do_not_touch_each_other(self, model, x):
        other = mlp()
        with using_task(model, "a"), using_task(other, "b"):
            assert_uses(model, "a", x)
            assert_uses(other, "b", x)
            with using_task(model, "b"):
                assert_uses(other, "b", x)
            assert_uses(model, "a", x)
        with using_task(model, "a"), pytest.raises(RuntimeError, match="none is active"):
            other(x)

    def test_a_block_over_one_layer_changes_that_layer_only(self, model, x):
        with using_task(model, "a"), using_task(model[2], "b"):
            assert [layer.mask_logits is layer.masks["a"] for layer in (model[0], model[2], model[4])] == [True, False, True]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_an_exception_closes_the_block_and_passes(self, model, x, error):
        with using_task(model, "a"):
            with pytest.raises(error), using_task(model, "b"):
                raise error
            assert_uses(model, "a", x)

    def test_one_object_can_be_entered_again_also_inside_itself(self, model, x):
        block = using_task(model, "a")
        for _ in range(2):
            with block:
                with using_task(model, "b"), block:
                    assert_uses(model, "a", x)
                assert_uses(model, "a", x)
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_an_object_made_before_its_task_was_removed_is_refused_at_entry(self, model):
        block = using_task(model, "a")
        remove_task(model, "a")
        with pytest.raises(ValueError, match="'b', got 'a'"):
            block.__enter__()

    def test_a_task_added_inside_a_block_does_not_end_it(self, x):
        model = nn.Sequential(MaskedLinear(4, 3)).double()
        with using_task(model, "default"):
            add_task(model, "b")
            torch.testing.assert_close(model(x), expected(model, "default", x))
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_closing_a_block_that_is_not_open_is_an_error_and_leaves_the_open_ones(self, model, x):
        with using_task(model, "a"):
            with pytest.raises(RuntimeError, match="closed"):
                using_task(model, "b").__exit__(None, None, None)
            assert_uses(model, "a", x)

    def test_a_second_copy_of_the_model_is_not_in_the_block(self, model, x):
        with using_task(model, "a"):
            twin = copy.deepcopy(model)
            with pytest.raises(RuntimeError, match="none is active"):
                twin(x)

    def test_generators_closed_out_of_order_leave_nothing_active(self, model, x):
        def block(task):
            with using_task(model, task):
                yield model(x)

        first, second = block("a"), block("b")
        torch.testing.assert_close(next(first), expected(model, "a", x))
        torch.testing.assert_close(next(second), expected(model, "b", x))
        first.close()
        assert_uses(model, "b", x)
        second.close()
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)


class TestDecorator:
    def test_each_call_runs_under_the_task(self, model, x):
        @using_task(model, "a")
        def run(given):
            return model(given)

        assert run.__name__ == "run"
        with using_task(model, "b"):
            assert_uses(model, "a", x, run)
            assert_uses(model, "b", x)

    def test_a_decorated_function_may_recurse(self, model, x):
        @using_task(model, "a")
        def run(depth):
            return model(x) if depth == 0 else run(depth - 1)

        torch.testing.assert_close(run(3), expected(model, "a", x))
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_a_decorated_function_may_run_in_many_threads_at_once(self, model, x):
        barrier = threading.Barrier(2, timeout=60)

        @using_task(model, "a")
        def run(_):
            barrier.wait()
            output = model(x)
            barrier.wait()
            return output

        with ThreadPoolExecutor(2) as pool:
            for output in pool.map(run, range(8)):
                torch.testing.assert_close(output, expected(model, "a", x))

    def test_coroutines_and_generators_are_refused_since_their_bodies_run_later(self, model):
        async def coroutine():
            pass

        async def asynchronous_generator():
            yield

        def generator():
            yield

        for function in (coroutine, asynchronous_generator, generator):
            with pytest.raises(TypeError, match=function.__name__):
                using_task(model, "a")(function)


class TestThreadsAndCoroutines:
    def test_a_thread_does_not_inherit_the_block_it_is_started_in(self, model, x):
        caught = []

        def run():
            try:
                model(x)
            except RuntimeError as error:
                caught.append(str(error))

        with using_task(model, "a"):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert len(caught) == 1 and "none is active" in caught[0]

    def test_two_threads_use_two_tasks_at_the_same_time_forward_and_backward(self, model, x):
        barrier = threading.Barrier(2, timeout=60)
        parameters = [parameter for name, parameter in model.named_parameters() if "masks" in name]

        def run(task):
            with using_task(model, task):
                barrier.wait()  # both blocks are open
                output = model(x)
                barrier.wait()
            grads = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
            return output, [grad is not None for grad in grads]

        with ThreadPoolExecutor(2) as pool:
            for task, (output, has_grad) in zip("abab", pool.map(run, "abab")):
                torch.testing.assert_close(output, expected(model, task, x))
                assert has_grad == [name.endswith(task) for name, _ in model.named_parameters() if "masks" in name]

    def test_one_object_may_be_open_in_two_threads(self, model, x):
        block, barrier = using_task(model, "a"), threading.Barrier(2, timeout=60)

        def run(first):
            barrier.wait()
            with block:
                barrier.wait()
                output = model(x)
                barrier.wait()
            return output

        with ThreadPoolExecutor(2) as pool:
            for output in pool.map(run, (True, False)):
                torch.testing.assert_close(output, expected(model, "a", x))

    def test_coroutines_that_take_turns_keep_their_own_task(self, model, x):
        block = using_task(model, "a")  # one object, shared by several coroutines

        async def run(task):
            with block if task == "a" else using_task(model, task):
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert_uses(model, task, x)
            with pytest.raises(RuntimeError, match="none is active"):
                model(x)
            return task

        async def main():
            return await asyncio.gather(*map(run, "abab"))

        assert asyncio.run(main()) == list("abab")

    def test_asyncio_to_thread_takes_the_task_along(self, model, x):
        async def main():
            with using_task(model, "b"):
                return await asyncio.to_thread(model, x)

        torch.testing.assert_close(asyncio.run(main()), expected(model, "b", x))


class _Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestWrappers:
    @pytest.mark.parametrize("over", ["wrapper", "model"])
    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(_Wrapper, id="users"),
            pytest.param(lambda model: torch.compile(model, backend="eager"), id="torch-compile"),
        ],
    )
    def test_a_wrapper_and_the_model_inside_name_the_same_layers(self, model, x, wrap, over):
        wrapped = wrap(model)
        for task in "abab":
            with using_task(wrapped if over == "wrapper" else model, task):
                assert_uses(model, task, x, wrapped)
        with pytest.raises(RuntimeError, match="none is active"):
            wrapped(x)

    def test_distributed_data_parallel_gives_the_tasks_gradients(self, model, x, gloo):
        twin = copy.deepcopy(model)  # DDP's hooks see every backward through the parameters it wraps
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for task in "aba":
            with using_task(wrapped, task):
                wrapped(x).square().sum().backward()
            assert_same_gradients(gradients(model), _reference_gradients(twin, x, task))


def _reference_gradients(model, x, *tasks):
    """Without any checkpoint, from torch alone."""
    sum(expected(model, task, x).square().sum() for task in tasks).backward()
    return gradients(model)


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
        wanted = _reference_gradients(model, x, "a")
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
        wanted = _reference_gradients(model, x, "a", "b")
        losses = []
        for task in "ab":
            with using_task(model, task):
                losses.append(run(model, x.detach().requires_grad_()).square().sum())
        sum(losses).backward()
        assert_same_gradients(gradients(model), wanted)

    @CHECKPOINTS
    def test_a_second_backward_through_a_retained_graph_is_right_again(self, model, x, run):
        wanted = _reference_gradients(model, x, "a")
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
        wanted = _reference_gradients(model, x, "a", "b")

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

        wanted = _reference_gradients(model, x, "a", "b")
        loss = checkpoint(outer, x.requires_grad_(), use_reentrant=False)
        with using_task(model, "a"):
            loss.backward()
        assert_same_gradients(gradients(model), wanted)

    def test_hooks_of_another_kind_inside_the_checkpoint(self, model, x):
        wanted = _reference_gradients(model, x, "a")
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
        wanted = _reference_gradients(model, x, "a")
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
        wanted = _reference_gradients(model, x, "a")
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

        wanted = _reference_gradients(model, x, "a")
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
