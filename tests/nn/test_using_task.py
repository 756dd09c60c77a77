"""using_task: which mask a forward uses, in blocks, threads, coroutines, wrappers and activation checkpoints."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from support.models import assert_same_gradients, assert_uses, expected, gradients, mlp, reference_gradients
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metamask_ext import add_task, remove_task, using_task
from metamask_ext.nn import MaskedLinear


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64)


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
            assert_same_gradients(gradients(model), reference_gradients(twin, x, task))
