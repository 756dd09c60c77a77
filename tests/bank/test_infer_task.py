"""infer_task sees what the masks are now, from several threads, and refuses what it cannot tell; -inf is a probability of 0."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from support.bank_changes import CHANGES, INPUT, new_bank, tensor_of
from support.bank_numbers import entropy_gradients
from support.streams import Recorder
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, using_task
from metamask_ext.bank.counts import Sums, count_bits
from metamask_ext.bank.inference import Snapshot, entropy_gradient
from metamask_ext.nn import MaskedLinear

each_method = pytest.mark.parametrize("method", ["one_shot", "binary"])


def gradient(bank, x, sums=None):
    return entropy_gradient(bank.model, bank.tasks, x, True, Snapshot(bank.model, sums))


class TestCounts:
    @pytest.mark.parametrize("shape", [(5, 9), (3, 2, 3, 3), (17,), (4, 64), (1, 1)], ids=str)
    @pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 8, 9, 63, 64, 65, 255, 256, 300])
    def test_are_the_sums_of_the_masks(self, shape, tasks, monkeypatch):
        for block in (1 << 22, 40):
            monkeypatch.setattr("metamask_ext.bank.counts._BLOCK", block)
            for fill in (0.0, 2.0, -2.0):
                logits = torch.randn(tasks, *shape) + fill
                packed = torch.stack([mm.pack_mask(mask) for mask in logits])
                got = count_bits(packed, logits[0])
                assert got.dtype == torch.float32 and torch.equal(got, (logits > 0).sum(0).float())
                assert torch.equal(count_bits(~packed, logits[0]), (logits <= 0).sum(0).float()), (
                    "set bits of a row's padding do not count"
                )

    def test_what_is_kept_is_used_while_the_bits_are_the_same(self):
        sums, owner, like = Sums(), nn.Identity(), torch.empty(5, 9)
        masks = [mm.pack_mask(torch.randn(5, 9)) for _ in range(70)]
        kept = sums.of(owner, masks, like)
        assert sums.of(owner, [mask.clone() for mask in masks], like) is kept
        for row in (0, 69):
            for byte in (0, 9):
                changed = [mask.clone() for mask in masks]
                changed[row].view(-1)[byte] ^= 1
                assert sums.of(owner, changed, like) is not kept
                kept = sums.of(owner, masks, like)
        assert sums.of(owner, masks[:-1], like) is not kept and sums.of(owner, masks[::-1], like) is not kept
        assert copy.deepcopy(sums).of(owner, masks, like) is not kept


class TestWhatChanged:
    @pytest.mark.parametrize("key", ["0.masks.a", "4.masks.b", "0.bias_masks.a", "4.masks.c", "0.weight"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_seen(self, change, key):
        bank, x, sums = new_bank(), torch.randn(6, *INPUT), Sums()
        before = gradient(bank, x, sums)
        bank.infer_task(x), bank.infer_task(x, "binary")
        CHANGES[change](bank.model, key, tensor_of(bank.model, key))
        after = gradient(bank, x, sums)
        assert torch.equal(after, gradient(bank, x)) and (change == "one_element" or not torch.equal(after, before))
        for method in ("one_shot", "binary"):
            assert bank.infer_task(x, method) == MaskBank(bank.model).infer_task(x, method)

    def test_tasks_that_change_places(self):
        bank, x, sums = new_bank(), torch.randn(6, *INPUT), Sums()
        before = gradient(bank, x, sums)
        for layer in (bank.model[0], bank.model[4]):
            for masks in (layer.masks, layer.bias_masks):
                a, b = masks["a"].clone(), masks["b"].clone()
                masks["a"].copy_(b), masks["b"].copy_(a)
        torch.testing.assert_close(gradient(bank, x, sums), before[:, [1, 0, 2]])

    def test_tasks_that_are_added_packed_removed_loaded_and_moved(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        state = copy.deepcopy(bank.model.state_dict())
        for change in (
            lambda: bank.pack("c"),
            lambda: (bank.add_task("d"), bank.pack("d")),
            lambda: bank.remove_task("a"),
            lambda: (bank.remove_task("d"), bank.add_task("d"), bank.pack("d")),
            lambda: bank.model.load_state_dict(state, strict=False),
            lambda: MaskBank.load(tmp_path, bank.model),
            lambda: bank.model.double(),
            lambda: bank.model.float(),
            lambda: bank.model[0].masks.__setitem__("b", mm.pack_mask(torch.randn(3, 1, 3, 3))),
            lambda: setattr(bank.model[4], "threshold", 0.3),
            lambda: bank.model[4].weight.data.mul_(2),
        ):
            change()
            x = torch.randn(6, *INPUT, dtype=bank.model[0].weight.dtype)
            assert bank.infer_task(x) == MaskBank(bank.model).infer_task(x)
            assert torch.equal(gradient(bank, x, bank._sums), gradient(bank, x))

    def test_a_copy_of_a_bank_goes_its_own_way(self):
        bank, x = new_bank(), torch.randn(6, *INPUT)
        wanted = bank.infer_task(x)
        twin = copy.deepcopy(bank)
        twin.model[4].masks["a"].data ^= 1
        assert twin.infer_task(x) == MaskBank(twin.model).infer_task(x) and bank.infer_task(x) == wanted


class TestStreams:
    def test_sums_are_ready_for_every_stream(self, monkeypatch):
        """On a GPU the next inference may run on a stream that does not wait for the one that made them."""
        log = []
        Recorder(monkeypatch, log)
        bank = new_bank()
        bank.infer_task(torch.randn(4, *INPUT))
        made = len(log)
        assert made > 0 and set(log) == {"the host waits for A"}
        bank.infer_task(torch.randn(4, *INPUT))
        assert len(log) == made  # only where one was made


class TestThreads:
    def test_that_infer_after_tasks_were_added(self):
        """Each adds the same new bits to what is kept."""
        bank = MaskBank(nn.Sequential(MaskedLinear(300, 100, bias=False, gate="hard")))
        x = torch.randn(64, 300)
        for number in range(9):
            bank.add_task(f"t{number}"), bank.pack(f"t{number}")
        bank.pack("default")
        for round in range(5):
            bank.infer_task(x)
            bank.add_task(f"n{round}"), bank.pack(f"n{round}")
            found, barrier = [], threading.Barrier(6)
            threads = [
                threading.Thread(target=lambda barrier=barrier, found=found: (barrier.wait(), found.append(bank.infer_task(x))))
                for _ in range(6)
            ]
            [thread.start() for thread in threads], [thread.join() for thread in threads]
            wanted = MaskBank(bank.model).infer_task(x)
            assert found == [wanted] * 6 and bank.infer_task(x) == wanted

    def test_that_infer_while_others_change_the_tasks(self):
        """The answer is one of the tasks of a moment, or an error in words; afterwards nothing is left of the race."""
        bank, done, errors, answers = new_bank(), threading.Event(), [], []
        x = torch.randn(4, *INPUT)

        def infer():
            while not done.is_set():
                try:
                    answers.append(bank.infer_task(x))
                except RuntimeError as error:
                    if "removed" not in str(error):
                        errors.append(error)
                except Exception as error:
                    errors.append(error)

        def change():
            try:
                for number in range(40):
                    bank.add_task(f"n{number}")
                    bank.pack(f"n{number}")
                    bank.model[4].masks[f"n{number}"].data ^= 1
                    if number % 3:
                        bank.remove_task(f"n{number}")
            except Exception as error:
                errors.append(error)
            finally:
                done.set()

        threads = [threading.Thread(target=target) for target in (infer, infer, infer, change)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert errors == [] and answers
        known = {"a", "b", "c", *(f"n{number}" for number in range(40))}
        assert all(set(answer) <= known for answer in answers)
        assert torch.equal(gradient(bank, x, bank._sums), gradient(bank, x))


class Classes(nn.Module):
    """Logits of some classes that the model gives, and of two that are not there yet."""

    def __init__(self, fill, gate="hard"):
        super().__init__()
        self.layer, self.fill = MaskedLinear(16, 8, gate=gate), fill

    def forward(self, x):
        return torch.cat([self.layer(x), x.new_full((len(x), 2), self.fill)], 1)


class TestInfinity:
    @each_method
    @pytest.mark.parametrize("packed", ["", "bd", "abcd"])
    @pytest.mark.parametrize("gate", ["hard", "sigmoid"])
    def test_a_class_of_minus_inf_is_a_class_of_probability_0(self, gate, packed, method):
        found = []
        for fill in (-torch.inf, -1e4):
            torch.manual_seed(0)
            bank = MaskBank(Classes(fill, gate).double())
            for task in "abcd":
                bank.add_task(task)
            for task in packed:
                bank.pack(task)
            x = torch.randn(30, 16, dtype=torch.float64)
            found.append((bank.infer_task(x, method), bank.infer_task(x, method, per_sample=False), gradient(bank, x)))
        assert found[0][:2] == found[1][:2] and len(set(found[0][0])) > 1
        torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=1e-12)

    def test_a_mask_of_classes_per_sample(self):
        """As for tasks with classes of their own: masked_fill with -inf."""

        class Masked(nn.Sequential):
            def forward(self, x):
                return super().forward(x).masked_fill(off[: len(x)], -torch.inf)

        off = torch.rand(12, 6) < 0.4
        off[:, 0] = False
        bank = MaskBank(Masked(MaskedLinear(5, 6)).double())
        bank.add_task("a"), bank.add_task("b"), bank.pack("a")
        x = torch.randn(12, 5, dtype=torch.float64)
        got = gradient(bank, x)
        amounts = torch.full((12, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
        layer = bank.model[0]
        thetas, biases = [], []
        for task in bank.tasks:
            with using_task(layer, task):
                thetas.append(layer._read("weight", task).detach()), biases.append(layer._read("bias", task).detach())
        y = torch.einsum("bt,toi,bi->bo", amounts, torch.stack(thetas), x) + amounts @ torch.stack(biases)
        p = y.masked_fill(off, -1e5).softmax(1)
        entropy = -torch.special.xlogy(p, p.clamp_min(1e-300)).sum()
        torch.testing.assert_close(got, torch.autograd.grad(entropy, amounts)[0])

    @pytest.mark.parametrize(("fill", "words"), [(torch.nan, "without NaN"), (torch.inf, r"or \+inf")], ids=["nan", "inf"])
    @each_method
    def test_nan_and_plus_inf_are_refused(self, fill, words, method):
        bank = MaskBank(Classes(fill))
        bank.add_task("a")
        for per_sample in (True, False):
            with pytest.raises(ValueError, match=words):
                bank.infer_task(torch.randn(3, 16), method, per_sample)

    def test_the_samples_of_nan_are_named(self):
        bank = new_bank()
        x = torch.randn(5, *INPUT)
        x[3, 0, 2, 2] = torch.nan
        with pytest.raises(ValueError, match=r"NaN .* \(samples 3\)"):
            bank.infer_task(x)

    def test_no_class_at_all(self):
        bank = MaskBank(Classes(-torch.inf))
        bank.add_task("a")
        with torch.no_grad():
            bank.model.layer.weight.zero_(), bank.model.layer.bias.fill_(-torch.inf)
        with pytest.raises(ValueError, match="NaN"):
            bank.infer_task(torch.randn(3, 16))

    def test_logits_of_infinity_are_gates_of_0_and_1(self):
        bank, x = new_bank(packed="", gate="sigmoid"), torch.randn(8, *INPUT)
        with torch.no_grad():
            for name, tensor in bank.model.named_parameters():
                if "masks.a" in name or "masks.b" in name:
                    tensor.copy_(torch.where(tensor > 0, torch.inf, -torch.inf))
        got, names = gradient(bank, x), bank.infer_task(x)
        assert got.isfinite().all() and names == [bank.tasks[index] for index in got.argmin(1)]
        bank.pack("a"), bank.pack("b")
        torch.testing.assert_close(gradient(bank, x), got)


class TestNaN:
    @pytest.mark.parametrize("gate", ["sigmoid", "hard"])
    @pytest.mark.parametrize("key", ["0.masks.c", "4.masks.c", "4.bias_masks.c"])
    def test_of_a_mask_is_refused_by_task_and_layer(self, key, gate):
        bank, x = new_bank(gate=gate), torch.randn(2, *INPUT)
        bank.add_task("d")
        with torch.no_grad():
            tensor_of(bank.model, key).view(-1)[-1] = torch.nan
        layer, kind, _ = key.split(".")
        before = copy.deepcopy(bank.model.state_dict())
        for done, act in {
            "inferred": lambda: bank.infer_task(x),
            "packed": lambda: bank.pack("c"),
            "superposed": lambda: bank.superpose({"a": 0.5, "c": 0.5}),
            "combined": lambda: bank.add_task("e", init={"b": 0.5, "c": 0.5}),
        }.items():
            with pytest.raises(ValueError, match=f"task 'c' cannot be {done}: its {kind} in layer '{layer}' hold NaN"):
                act()
        bank.remove_task("a"), bank.remove_task("b")
        with pytest.raises(ValueError, match="task 'c' cannot be combined"):
            bank.add_task("e", init="mean")
        after = bank.model.state_dict()
        assert not bank.is_packed("c")
        kept = [name for name in after if not name.endswith("_extra_state")]  # it has the number of tasks
        assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in kept)
        with bank.superpose({"d": 1.0}):
            bank.model(x)  # others are used as ever
        bank.pack("d")

    def test_of_a_head_shows_in_the_output(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(4, 3), nn.Linear(3, 2)), per_task="1.*")
        bank.add_task("a")
        with torch.no_grad():
            bank.model[1].per_task["weight"]["a"].fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            bank.infer_task(torch.randn(2, 4))
        with pytest.raises(ValueError, match="init gives NaN for task 'b' in layer '1'"):
            bank.add_task("b", init="mean")
        with bank.superpose({"default": 0.5, "a": 0.5}):
            assert bank.model(torch.randn(2, 4)).isnan().all()

    def test_that_comes_from_infinite_logits_is_refused(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(4, 3)))
        bank.add_task("a")
        with torch.no_grad():
            bank.model[0].masks["default"].fill_(torch.inf), bank.model[0].masks["a"].fill_(-torch.inf)
        with pytest.raises(ValueError, match="init gives NaN for task 'b' in layer '0'"):
            bank.add_task("b", init="mean")
        assert bank.tasks == ["default", "a"]
        bank.add_task("b", init={"default": 0.5, "a": 0.5})
        assert bank.model[0].masks["b"].abs().max() < 1e-6
        bank.add_task("c", init="copy:a"), bank.pack("c")
        assert not bank.model[0].masks["c"].any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_coefficient_is_finite(self, bad):
        bank = new_bank()
        for amount in (bad, torch.tensor(bad), torch.tensor([bad], dtype=torch.float64, requires_grad=True)):
            mixture = {"a": 0.5, "b": amount}
            for act in (lambda m=mixture: bank.superpose(m), lambda m=mixture: bank.add_task("e", init=m)):
                with pytest.raises(ValueError, match=r"\['b'\] must be finite, got -?(nan|inf)"):
                    act()


class TestNothingToTell:
    def test_one_class(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(4, 1)))
        assert bank.infer_task(torch.randn(2, 4)) == ["default"] * 2
        bank.add_task("a")
        with pytest.raises(ValueError, match=r"at least two classes .* \[2, 1\]"):
            bank.infer_task(torch.randn(2, 4))

    def test_no_masked_layer_that_is_called(self):
        class Unused(nn.Sequential):
            def forward(self, x):
                return x

        bank = MaskBank(Unused(MaskedLinear(4, 3)))
        bank.add_task("a")
        with pytest.raises(RuntimeError, match="output of Unused depends on no masked layer"):
            bank.infer_task(torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", ["", "b", "abcdefgh"])
def test_in_16_bits_the_tasks_are_told_apart_as_in_float64(dtype, packed):
    """The derivative is summed in float32: in 16 bits near tasks would be ties, and the first of them taken."""
    torch.manual_seed(0)
    exact = MaskBank(nn.Sequential(MaskedLinear(64, 32), nn.Tanh(), MaskedLinear(32, 10)).to(dtype).double())
    for task in "abcdefgh":
        exact.add_task(task)
    exact.remove_task("default")
    rounded = MaskBank(copy.deepcopy(exact.model).to(dtype))
    exact.model.load_state_dict({name: value.double() for name, value in rounded.model.state_dict().items()})
    for task in packed:
        exact.pack(task), rounded.pack(task)
    x = torch.randn(64, 64).to(dtype)
    wanted, got = gradient(exact, x.double()), gradient(rounded, x)
    assert got.dtype == torch.float32
    # As far as the activations, which are of 16 bits, allow.
    scale = wanted.abs().max()
    torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.02)
    agree = (got.argmin(1) == wanted.argmin(1)).float().mean()
    assert agree > 0.9
    assert len(got.unique()) > 0.9 * got.numel(), "no ties of 8 bits"


def test_autograd_agrees_and_autocast_runs():
    """Statistics of tasks are held fixed: they have no part in this."""
    bank = new_bank()
    bank.model[1] = nn.Identity()
    bank.model.double()
    x = torch.randn(5, *INPUT, dtype=torch.float64)
    torch.testing.assert_close(gradient(bank, x), entropy_gradients(bank, x, bank.tasks))
    with torch.autocast("cpu", torch.bfloat16):
        bank.model.float()
        assert bank.infer_task(x.float())


class Reads(nn.Module):
    """One layer is called, two are read by other code; of one of them only the dtype."""

    def __init__(self):
        super().__init__()
        self.first, self.read, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.first(x.to(self.last.weight.dtype)).tanh()
        return self.last(F.linear(x, self.read.weight, self.read.bias).tanh())


class OnlyReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(x, self.read.weight, self.read.bias)


class Attention(nn.Module):
    """torch's own reads the weight of its last layer."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        x = x[:, None] * torch.linspace(0.5, 1.5, 3, dtype=x.dtype)[:, None]
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("kind", [Reads, OnlyReads, Attention])
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
@pytest.mark.parametrize("packed", ["", "b", "abc"])
def test_layers_that_are_read_and_not_called_count(kind, gate, packed):
    bank = MaskBank(mm.convert(kind(), gate=gate, mask_init="normal").double().eval())
    for task in "abc":
        bank.add_task(task)
    for task in packed:
        bank.pack(task)
    x = torch.randn(5, 6, dtype=torch.float64)
    wanted = entropy_gradients(bank, x, bank.tasks)
    torch.testing.assert_close(gradient(bank, x), wanted)
    both = entropy_gradient(bank.model, bank.tasks, x, False, Snapshot(bank.model))
    torch.testing.assert_close(both[0], wanted.sum(0))
    assert bank.infer_task(x) == [bank.tasks[index] for index in wanted.argmin(1)]
    assert set(bank.infer_task(x, "binary")) <= set(bank.tasks)
