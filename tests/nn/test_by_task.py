"""split_by_task, and mixed-task batches whose samples a model repeats by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.models import randomize_masks
from torch import fx, nn

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear, split_by_task


class Windows(nn.Module):
    """Cuts a sequence into windows, which its layers see as samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(MaskedLinear(4, 4), nn.Tanh(), MaskedLinear(4, 4))

    def forward(self, x, scale=None, *, shift=None):
        y = self.inner(x.reshape(-1, 2, x.shape[-1])).reshape(x.shape)
        y = y if scale is None else y * scale
        return y if shift is None else (y, {"shifted": y + shift, "kind": "windows"})


def with_tasks(model):
    mm.add_task(model, "b")
    mm.add_task(model, "c")
    return randomize_masks(model.double())


NAMES = ["b", "default", "c", "b"]


class TestSplit:
    def test_the_samples_of_each_task_run_by_themselves(self):
        model = with_tasks(nn.Sequential(MaskedLinear(4, 4), Windows(), MaskedLinear(4, 2)))
        x = torch.randn(4, 6, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match="names a task for each of 4"):
            model(x)
        assert split_by_task(model[1]) is model[1] and split_by_task(model[1]) is model[1]
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with mm.using_task(other, NAMES):
                y = other(x)
            for index, task in enumerate(NAMES):
                with mm.using_task(other, task):
                    torch.testing.assert_close(other(x[index : index + 1]), y[index : index + 1])
        merged = mm.merge(model, "b")
        assert type(merged[1]) is Windows
        with mm.using_task(model, "b"):
            torch.testing.assert_close(merged(x), model(x))

    def test_other_arguments_and_outputs_have_their_samples(self):
        model = split_by_task(with_tasks(Windows()))
        x, scale, shift = (torch.randn(4, 6, 4, dtype=torch.float64) for _ in range(3))
        with mm.using_task(model, NAMES):
            y, found = model(x, scale, shift=shift)
        assert found["kind"] == "windows"
        for index, task in enumerate(NAMES):
            own = slice(index, index + 1)
            with mm.using_task(model, task):
                alone, alone_found = model(x[own], scale[own], shift=shift[own])
            torch.testing.assert_close((y[own], found["shifted"][own]), (alone, alone_found["shifted"]))

    def test_arguments_without_samples_are_refused(self):
        model = split_by_task(with_tasks(Windows()))
        x = torch.randn(4, 6, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES):
            with pytest.raises(RuntimeError, match="argument 1: dimension 0"):
                model(x, x[0])
            with pytest.raises(RuntimeError, match="argument 'shift': dimension 0"):
                model(x, shift=x[:1])
            with pytest.raises(RuntimeError, match="inside another argument"):
                model(x, (x,))
            with pytest.raises(RuntimeError, match="names a task for each of 4"):
                model(x[:3])
            with pytest.raises(RuntimeError, match="samples as its first argument"):
                model(scale=x)

    def test_a_module_with_tensors_of_its_own_for_each_task_or_with_masks(self):
        class Scaled(Windows):
            def __init__(self):
                super().__init__()
                self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

            def forward(self, x):
                return super().forward(x * self.scale) + self.shift

        for own in (
            lambda model: mm.MaskBank(model, per_task="0.shift"),
            lambda model: mm.mask_parameter(model, "0.scale"),
        ):
            model = nn.Sequential(split_by_task(Scaled()))
            own(model)
            with_tasks(model)
            x = torch.randn(4, 6, 4, dtype=torch.float64)
            with mm.using_task(model, NAMES):
                y = model(x)
            merged = mm.merge(model, "b")
            assert type(merged[0]) is Scaled
            torch.testing.assert_close(merged(x)[::3], y[::3])

    def test_it_is_a_leaf_of_a_traced_graph(self):
        model = with_tasks(nn.Sequential(MaskedLinear(4, 4), split_by_task(Windows())))
        traced = fx.symbolic_trace(model)
        x = torch.randn(4, 6, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES, batch_dim=0), mm.using_task(traced, NAMES, batch_dim=0):
            torch.testing.assert_close(traced(x), model(x))

    def test_one_graph_for_all_tasks(self):
        model = split_by_task(with_tasks(Windows()))
        x = torch.randn(4, 6, 4, dtype=torch.float64)
        torch.compiler.reset()
        compiled = mm.compile(copy.deepcopy(model), backend="eager")
        for task in ("b", NAMES, "c", NAMES[::-1]):
            with mm.using_task(model, task), mm.using_task(compiled, task):
                torch.testing.assert_close(compiled(x), model(x))

    def test_what_cannot_be_split(self):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            split_by_task("model")
        with pytest.raises(ValueError, match="it has tasks itself"):
            split_by_task(MaskedLinear(2, 2))
        module = Windows()
        module.forward = lambda x: x
        with pytest.raises(ValueError, match="replaced on the object"):
            split_by_task(module)


class Encoder(nn.Module):
    """An encoder that sees each sample once, and a decoder that sees every beam."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = MaskedLinear(4, 4), MaskedLinear(4, 4)
        self.head = mm.nn.MaskedConv1d(3, 2, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x, beams):
        y = self.encode(x).repeat_interleave(beams, 0)
        y = self.norm(self.decode(y))
        return self.head(self.attention(y, y, y)[0])


class TestRepeat:
    def model(self):
        model = mm.convert(Encoder())
        mm.MaskBank(model, per_task="norm.*")
        return with_tasks(model)

    def test_each_name_is_that_of_its_copies(self):
        model, x = self.model(), torch.randn(4, 3, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES, repeat=3):
            y = model(x, 3)
        with mm.using_task(model, NAMES, repeat=3):
            torch.testing.assert_close(model(x, 1), y[::3])
        for index, task in enumerate(NAMES):
            with mm.using_task(model, task):
                torch.testing.assert_close(model(x[index : index + 1], 3), y[3 * index : 3 * index + 3])
        mm.MaskBank(model).pack("c")
        with mm.using_task(model, NAMES[:1], repeat=2):
            torch.testing.assert_close(model(x[:1], 2), y[:2])

    def test_second_dimensions_too(self):
        model, x = self.model(), torch.randn(5, 2, 4, dtype=torch.float64)
        with mm.using_task(model.decode, ["b", "c"], 1, repeat=2):
            y = model.decode(x.repeat_interleave(2, 1))
        with mm.using_task(model.decode, ["b", "c"], 1):
            torch.testing.assert_close(model.decode(x), y[:, ::2])

    def test_compiled(self):
        model, x = self.model(), torch.randn(4, 3, 4, dtype=torch.float64)
        torch.compiler.reset()
        compiled = mm.compile(copy.deepcopy(model), backend="eager")
        with mm.using_task(model, NAMES, repeat=2), mm.using_task(compiled, NAMES, repeat=2):
            torch.testing.assert_close(compiled(x, 2), model(x, 2))

    def test_without_it_repeated_samples_are_refused_in_words_that_name_it(self):
        model, x = self.model(), torch.randn(4, 3, 4, dtype=torch.float64)
        with mm.using_task(model, NAMES), pytest.raises(RuntimeError, match=r"using_task\(model, tasks, repeat=3\)"):
            model(x, 3)
        with mm.using_task(model, NAMES, repeat=2), pytest.raises(RuntimeError, match=r"names a task for each of 4"):
            model(x, 3)

    @pytest.mark.parametrize("repeat", [0, -1, 1.5, True, "2", None])
    def test_what_is_no_number_of_copies(self, repeat):
        with pytest.raises(ValueError, match="repeat must be an integer of at least 1"):
            mm.using_task(self.model(), NAMES, repeat=repeat)
