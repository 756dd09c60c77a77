"""MaskBank in memory: packing, mixtures of tasks, task inference, tensors that belong to tasks."""

from __future__ import annotations

import copy

import pytest
import torch
from support.bank_numbers import entropy_gradients
from support.gpu import DEVICES
from support.mixed_task_models import MIXED, alone, cnn
from support.models import assert_same_gradients, gradients, mlp, randomize_masks
from torch import nn

import metamask_ext
from metamask_ext import MaskBank, add_task, merge, using_task
from metamask_ext.nn import MaskedLayer, MaskedLinear, TaskBatchNorm2d

SHAPES = {"mlp": (4,), "cnn": (2, 6, 6), "cnn-hard": (2, 6, 6)}
each_device = pytest.mark.parametrize("device", DEVICES)
each_model = pytest.mark.parametrize("name", SHAPES)
each_packed = pytest.mark.parametrize("packed", ["", "b", "abc"], ids=["logits", "b-packed", "all-packed"])


def make(name, packed="", samples=5, device="cpu"):
    """A bank with tasks a, b, c (two of them of the same kind in some tests), and inputs."""
    model = mlp() if name == "mlp" else cnn("hard" if name == "cnn-hard" else "sigmoid")
    if name == "mlp":
        add_task(model, "c")
    bank = MaskBank(model.eval().to(device))
    for task in packed:
        bank.pack(task)
    return bank, torch.randn(samples, *SHAPES[name], dtype=torch.float64).to(device)


def theta(layer, task, kind):
    masks = getattr(layer, "masks" if kind == "weight" else "bias_masks")[task]
    shared = getattr(layer, kind)
    if masks.dtype == torch.uint8:
        bits = (masks[..., None] >> torch.arange(8, dtype=torch.uint8, device=masks.device)) & 1
        flat = bits.flatten(-2)
        row = shared[0].numel() if shared.dim() > 1 else len(shared)
        return shared * flat[..., :row].reshape(shared.shape)
    return metamask_ext.masked_weight(shared, masks, gate=layer.gate, temperature=layer.temperature, threshold=layer.threshold)


class TestTasks:
    def test_the_tasks_are_the_models(self):
        bank, _ = make("mlp")
        assert bank.tasks == ["a", "b", "c"] and bank.slots == [None, "a", "b", "c"]
        bank.add_task("d", init="copy:a")
        bank.remove_task("b")
        assert metamask_ext.tasks(bank.model) == bank.tasks == ["a", "c", "d"]
        assert bank.slots == [None, "a", None, "c", "d"]

    def test_packing_with_a_hard_gate_keeps_the_output_and_frees_the_logits(self):
        bank, x = make("cnn-hard")
        with using_task(bank.model, "b"):
            before = bank.model(x)
        assert not bank.is_packed("b")
        bank.pack("b")
        assert bank.is_packed("b") and not bank.is_packed("a")
        with using_task(bank.model, "b"):
            torch.testing.assert_close(bank.model(x), before)
        assert not [name for name, _ in bank.model.named_parameters() if name.endswith(".b")]

    def test_unknown_tasks_are_refused(self):
        bank, _ = make("mlp")
        for act in (bank.pack, bank.remove_task, bank.bytes_per_task, bank.is_packed):
            with pytest.raises(ValueError, match="one of 'a', 'b', 'c', got 'z'"):
                act("z")

    def test_bytes_of_a_task(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(10, 3), MaskedLinear(3, 2, bias=False)))
        assert bank.bytes_per_task("default") == 4 * (30 + 3 + 6)
        bank.pack("default")
        assert bank.bytes_per_task("default") == 3 * 2 + 1 + 2

    def test_a_packed_task_of_lenet_with_500_outputs_takes_at_most_41000_bytes(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(784, 300), nn.ReLU(), MaskedLinear(300, 100), nn.ReLU(), MaskedLinear(100, 500)))
        bank.pack("default")
        assert bank.bytes_per_task("default") <= 41_000

    def test_what_is_no_masked_model_is_refused(self):
        with pytest.raises(ValueError, match="no masked layer"):
            MaskBank(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match="no masked layer"):
            MaskBank(nn.Sequential(TaskBatchNorm2d(2)))
        with pytest.raises(TypeError, match="Module"):
            MaskBank("model")


class TestSuperpose:
    @pytest.mark.every_device(emulated_if=lambda packed, **_: packed == "b")
    @each_device
    @each_model
    @each_packed
    def test_theta_is_the_combination_of_the_tasks_thetas(self, name, packed, device):
        bank, x = make(name, packed, device=device)
        alphas = {"a": 0.5, "c": -0.25, "b": 1.5}
        plain = merge(bank.model, "a")
        for layer, target in zip(bank.model, plain):
            if isinstance(layer, MaskedLayer):
                for kind in ("weight", "bias"):
                    if getattr(layer, kind) is not None:
                        value = sum(alpha * theta(layer, task, kind) for task, alpha in alphas.items())
                        getattr(target, kind).data = value.detach()
        with bank.superpose(alphas) as entered:
            assert entered is bank.model
            torch.testing.assert_close(bank.model(x), plain(x))
            assert not torch.allclose(bank.model(x), merge(bank.model, "a")(x))

    @each_packed
    def test_coefficients_weights_and_masks_get_gradients(self, packed):
        bank, x = make("cnn", packed, samples=2)
        alphas = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.4, 0.6)]

        def run(a, b):
            with bank.superpose({"a": a, "b": b}):
                return bank.model(x)

        assert torch.autograd.gradcheck(run, alphas)
        assert torch.autograd.gradgradcheck(run, alphas)
        run(*alphas).square().sum().backward()
        found = gradients(bank.model)
        for parameter in ("0.weight", "0.bias", "5.weight"):
            assert found[parameter].any()
        for task in set("ab") - set(packed):
            assert found[f"0.masks.{task}"].any()

    def test_one_task_with_coefficient_one_is_that_task(self):
        bank, x = make("mlp")
        with bank.superpose({"b": 1.0}):
            got = bank.model(x)
        with using_task(bank.model, "b"):
            torch.testing.assert_close(got, bank.model(x))

    def test_a_model_of_one_task_and_blocks_inside_one_another(self):
        bank = MaskBank(nn.Sequential(MaskedLinear(4, 3, bias=False)).double())
        x = torch.randn(2, 4, dtype=torch.float64)
        with bank.superpose({"default": 0.5}):
            half = bank.model(x)
            with using_task(bank.model, "default"):
                torch.testing.assert_close(bank.model(x), 2 * half)
            torch.testing.assert_close(bank.model(x), half)

    def test_checkpoints_recompute_the_superposition(self):
        bank, x = make("mlp")
        with bank.superpose({"a": 0.5, "b": 0.5}):
            bank.model(x).square().sum().backward()
            wanted = gradients(bank.model)
            loss = torch.utils.checkpoint.checkpoint(bank.model, x.clone().requires_grad_(), use_reentrant=False).square().sum()
        with using_task(bank.model, "a"):
            loss.backward()
        assert_same_gradients(gradients(bank.model), wanted)

    @pytest.mark.parametrize(
        ("alphas", "error", "words"),
        [
            ({}, ValueError, "at least one"),
            ({"z": 1.0}, ValueError, "'a', 'b', 'c', got 'z'"),
            ({"a": float("nan")}, ValueError, "finite"),
            ({"a": "much"}, TypeError, r"alphas\['a'\] must be a number, got str"),
            ({"a": torch.ones(2)}, ValueError, r"shape \[2\]"),
            ({"a": torch.tensor(1)}, ValueError, "torch.int64"),
            (["a"], TypeError, "mapping"),
        ],
        ids=str,
    )
    def test_bad_coefficients_are_refused(self, alphas, error, words):
        bank, _ = make("mlp")
        with pytest.raises(error, match=words):
            bank.superpose(alphas)

    def test_a_new_task_begins_from_a_superposition(self):
        bank, x = make("cnn-hard", "b")
        bank.add_task("new", init={"b": 1.0})
        results = []
        for task in ("b", "new"):
            with using_task(bank.model, task):
                results.append(bank.model(x))
        torch.testing.assert_close(*results)
        assert bank.model[0].masks["new"].requires_grad


def sharp(name, packed, samples, device="cpu"):
    """Weights so large, and biases so small, that the samples disagree about the task."""
    bank, x = make(name, packed, samples, device)
    with torch.no_grad():
        for layer in bank.model:
            if isinstance(layer, MaskedLayer):
                layer.weight *= 4
                if layer.bias is not None:
                    layer.bias *= 0.1
    return bank, x


class TestInference:
    @each_device
    @each_model
    @each_packed
    def test_one_shot_takes_the_largest_negative_gradient_for_each_sample(self, name, packed, device):
        bank, x = sharp(name, packed, 16, device)
        wanted = entropy_gradients(bank, x, bank.tasks)
        names = [bank.tasks[index] for index in wanted.argmin(1).tolist()]
        assert len(set(names)) > 1
        assert bank.infer_task(x) == names
        assert bank.infer_task(x, per_sample=False) == bank.tasks[int(wanted.sum(0).argmin())]

    @pytest.mark.every_device(emulated_if=lambda packed, **_: packed == "b")
    @each_device
    @each_model
    @each_packed
    def test_the_gradient_is_autograds(self, name, packed, device):
        from metamask_ext.bank.inference import Snapshot, entropy_gradient

        bank, x = make(name, packed, device=device)
        snapshot = Snapshot(bank.model)
        for names in (["a", "b", "c"], ["c", "a"], ["b", "c", "a"], ["b"]):
            got = entropy_gradient(bank.model, names, x, True, snapshot)
            torch.testing.assert_close(got.cpu(), entropy_gradients(bank, x, names))
            torch.testing.assert_close(entropy_gradient(bank.model, names, x, False, snapshot)[0], got.sum(0))
        assert all(grad is None for grad in gradients(bank.model).values())

    @pytest.mark.parametrize("per_sample", [True, False])
    def test_binary_halves_the_candidates(self, per_sample):
        bank, x = sharp("mlp", "bc", samples=6)
        for task in "defg":
            bank.add_task(task)

        def search(rows):
            names = bank.tasks
            while len(names) > 1:
                gradient = entropy_gradients(bank, rows, names).sum(0)
                kept = sorted(gradient.argsort()[: (len(names) + 1) // 2].tolist())
                names = [names[index] for index in kept]
            return names[0]

        wanted = [search(x[row : row + 1]) for row in range(len(x))] if per_sample else search(x)
        assert bank.infer_task(x, "binary", per_sample) == wanted
        assert not per_sample or len(set(wanted)) > 1

    def test_the_sure_task_is_found(self):
        # One class per task is sure where its input is on: task t lets through input t alone.
        model = nn.Sequential(MaskedLinear(3, 3, bias=False, gate="hard"))
        bank = MaskBank(model)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(3) * 4)
            for task in range(3):
                bank.add_task(f"t{task}")
                model[0].masks[f"t{task}"].fill_(-1.0)[:, task] = 1.0
        bank.remove_task("default")
        bank.pack("t1")
        x = torch.eye(3)[[2, 0, 1, 1]]
        for method in ("one_shot", "binary"):
            assert bank.infer_task(x, method) == ["t2", "t0", "t1", "t1"]
        assert bank.infer_task(x[2:], per_sample=False) == "t1"

    def test_what_was_added_up_before_follows_packed_added_and_removed_tasks(self):
        bank, x = make("mlp", "a", samples=8)
        for change in (
            lambda: bank.pack("b"),
            lambda: bank.add_task("d"),
            lambda: bank.pack("d"),
            lambda: bank.remove_task("a"),
            lambda: (bank.remove_task("d"), bank.add_task("d"), bank.pack("d")),
            lambda: bank.model.float(),
        ):
            change()
            given = x.to(bank.model[0].weight.dtype)
            assert bank.infer_task(given) == MaskBank(bank.model).infer_task(given)

    def test_layers_that_write_in_place_are_right(self):
        bank, x = make("mlp", "a")
        twin = MaskBank(copy.deepcopy(bank.model))
        for index in (1, 3):
            bank.model[index], twin.model[index] = nn.ReLU(inplace=True), nn.ReLU()
        from metamask_ext.bank.inference import Snapshot, entropy_gradient

        got, wanted = (entropy_gradient(each.model, each.tasks, x, True, Snapshot(each.model)) for each in (bank, twin))
        torch.testing.assert_close(got, wanted)

    def test_no_grad_and_inference_mode_around_do_not_matter(self):
        bank, x = make("cnn", "a")
        wanted = bank.infer_task(x)
        with torch.no_grad():
            assert bank.infer_task(x) == wanted
        with torch.inference_mode():
            assert bank.infer_task(x) == wanted

    def test_a_bank_with_one_task_gives_that(self):
        bank = MaskBank(MaskedLinear(3, 2))
        for method in ("one_shot", "binary"):
            assert bank.infer_task(torch.randn(2, 3), method) == ["default"] * 2

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            (("x",), TypeError, "x must be a tensor, got str"),
            ((torch.randn(0, 4).double(),), ValueError, "at least one sample"),
            ((torch.randn(2, 4).double(), "best"), ValueError, "method must be one of .* got 'best'"),
            ((torch.randn(2, 3, 4).double(),), ValueError, r"logits \[B, classes\] .* got \[2, 3, 3\]"),
        ],
        ids=["no-tensor", "empty", "method", "no-logits"],
    )
    def test_bad_input_is_refused(self, arguments, error, words):
        bank, _ = make("mlp")
        with pytest.raises(error, match=words):
            bank.infer_task(*arguments)


class TestPerTask:
    def model(self):
        body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4), nn.Tanh())
        model = nn.ModuleDict({"body": metamask_ext.convert(body), "head": nn.Linear(4, 2)}).double()
        model.forward = lambda x: model["head"](model["body"](x))
        return model

    def bank(self, patterns=("head.*", "body.1.*")):
        bank = MaskBank(self.model(), patterns)
        for task in ("a", "b"):
            bank.add_task(task)
        bank.remove_task("default")
        randomize_masks(bank.model)
        with torch.no_grad():
            for name, parameter in bank.model.named_parameters():
                if "per_task" in name:
                    parameter.normal_()
        return bank

    def test_each_task_has_its_own_and_trains_it_alone(self):
        bank = self.bank()
        head = bank.model["head"]
        x = torch.randn(5, 2, 5, 5, dtype=torch.float64)
        with using_task(bank.model, "a"):
            bank.model(x).square().sum().backward()
        found = gradients(bank.model)
        assert found["head.per_task.weight.a"].any() and found["head.per_task.weight.b"] is None
        with using_task(bank.model, "b"):
            assert head.weight is head.per_task["weight"]["b"]
        with pytest.raises(RuntimeError, match="none is active"):
            head(torch.randn(1, 4).double())
        assert type(bank.model["body"][1]) is TaskBatchNorm2d
        assert bank.model["body"][1].per_task["num_batches_tracked"]["b"] == 0

    @pytest.mark.parametrize("names", [["b", "a", "b", "b", "a"], ["b"] * 5], ids=["mixed", "one-task"])
    def test_a_mixed_batch_is_each_sample_alone(self, names):
        bank = self.bank()
        bank.model.eval()
        x = torch.randn(5, 2, 5, 5, dtype=torch.float64)
        results = []
        for run in (lambda: together(bank, x, names), lambda: alone(bank.model, x, names)):
            output = run()
            output.square().sum().backward()
            results.append((output.detach(), gradients(bank.model)))
        torch.testing.assert_close(results[0][0], results[1][0])
        assert_same_gradients(results[0][1], results[1][1])

    def test_an_empty_batch_is_empty(self):
        assert together(self.bank(), torch.randn(0, 2, 5, 5).double(), []).shape == (0, 2)

    def test_superposition_mixes_heads_and_refuses_to_train_statistics(self):
        bank = self.bank()
        x = torch.randn(5, 2, 5, 5, dtype=torch.float64)
        with bank.superpose({"a": 0.25, "b": 0.75}):
            with pytest.raises(RuntimeError, match="eval mode"):
                bank.model(x)
            bank.model.eval()
            head = bank.model["head"]
            wanted = 0.25 * head.per_task["weight"]["a"] + 0.75 * head.per_task["weight"]["b"]
            torch.testing.assert_close(head.weight, wanted)
            bank.model(x)

    def test_inference_and_merge_work_with_heads(self):
        bank = self.bank()
        bank.model.eval()
        x = torch.randn(5, 2, 5, 5, dtype=torch.float64)
        assert set(bank.infer_task(x)) <= {"a", "b"}
        body, head = merge(bank.model["body"], "b"), merge(bank.model["head"], "b")
        assert type(head) is nn.Linear and type(body[1]) is nn.BatchNorm2d
        with using_task(bank.model, "b"):
            torch.testing.assert_close(head(body(x)), bank.model(x))

    def test_new_tasks_begin_fresh_or_as_told(self):
        bank = self.bank()
        weights = bank.model["head"].per_task["weight"]
        bank.add_task("fresh")
        bank.add_task("copy", init="copy:b")
        assert torch.equal(weights["copy"], weights["b"])
        assert not torch.equal(weights["fresh"], weights["b"]) and weights["fresh"].abs().max() <= 0.5  # torch's bound
        assert bank.model["body"][1].per_task["weight"]["fresh"].tolist() == [1.0] * 3

    def test_bytes_count_what_belongs_to_a_task(self):
        bank = self.bank(("head.*",))
        for task in bank.tasks:
            bank.pack(task)
        bits = 3 * 3 + 1 + 4 * 4 + 1
        assert bank.bytes_per_task("a") == bits + 8 * (2 * 4 + 2)

    def test_the_first_task_keeps_the_tensor_that_is_there(self):
        model = self.model()
        weight = model["head"].weight
        MaskBank(model, "head.*")
        assert model["head"].weight is weight

    def test_part_of_a_module_may_belong_to_tasks(self):
        bank = MaskBank(self.model(), "head.bias")
        assert "head.weight" in dict(bank.model.named_parameters())
        assert list(bank.model["head"].per_task) == ["bias"]
        assert bank.per_task == ["head.bias"]

    @pytest.mark.parametrize(
        ("patterns", "error", "words"),
        [
            ("tail.*", ValueError, "matches no parameter"),
            (["head.*", "body.0.weight"], ValueError, "of a masked layer"),
            ([3], TypeError, "patterns of names, got int"),
        ],
        ids=str,
    )
    def test_patterns_that_cannot_be_change_nothing(self, patterns, error, words):
        model = self.model()
        before = list(model.state_dict())
        with pytest.raises(error, match=words):
            MaskBank(model, patterns)
        assert list(model.state_dict()) == before


def together(bank, x, names):
    with using_task(bank.model, names):
        return bank.model(x)


def test_mixed_batches_through_the_bank():
    bank, x = make("cnn", "a")
    torch.testing.assert_close(together(bank, x, MIXED), alone(bank.model, x, MIXED))
