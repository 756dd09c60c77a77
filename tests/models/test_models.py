"""Models of timm and transformers, masked: each computes what the plain one does, trains, mixes tasks, merges and comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.model_zoo import ZOO, Entry, rows
from support.models import LOGIT_ON, gradients

from metamask_ext import MaskBank, add_task, conversion_report, convert, merge, tasks, using_task
from metamask_ext.nn import MaskedLayer

MODELS = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name.split(maxsplit=1)[1].replace(" ", "-"))
TRANSFORMERS = pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if entry.library == "transformers"], ids=lambda entry: entry.name.split(maxsplit=1)[1]
)
BATCH = ("b", "a", "a", "c", "b")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def _double(entry: Entry, count: int = len(BATCH)):
    """The plain model and inputs, in float64."""
    model = entry.build().double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in entry.inputs(count).items()}
    return model, inputs


def _with_tasks(entry: Entry, **options):
    """The masked model in float64 with three tasks, and ``default``, of masks that differ, and inputs."""
    model, inputs = _double(entry)
    convert(model, mask_init=_spread, **options)
    for task in "abc":
        add_task(model, task)
    return model, inputs


def _spread(logits):
    # Gates of 0.73 to 0.98, so that signals reach the end of a deep model.
    logits.uniform_(1, 4)


def _of_task(model, make):
    """The parameters that ``make`` adds to the model."""
    before = set(model.parameters())
    make()
    return [parameter for parameter in model.parameters() if parameter not in before]


def _each_alone(entry, model, inputs, names=BATCH):
    """The output of each sample in the block of its task."""
    found = []
    for row, name in enumerate(names):
        with using_task(model, name):
            found.append(entry.run(model, rows(inputs, slice(row, row + 1))))
    return torch.cat(found)


@MODELS
class TestModel:
    def test_equals_the_plain_model(self, entry):
        plain, inputs = _double(entry)
        model = convert(copy.deepcopy(plain), mask_init=LOGIT_ON)
        assert conversion_report(model).masked > 0 and any(isinstance(module, MaskedLayer) for module in model.modules())
        expected, got = entry.run(plain, inputs), entry.run(model, inputs)
        torch.testing.assert_close(got, expected, **CLOSE)
        direction = torch.randn_like(expected)
        (expected * direction).sum().backward()
        (got * direction).sum().backward()
        wanted, found = gradients(plain), gradients(model)
        assert wanted.keys() <= found.keys()
        for name, grad in wanted.items():
            assert (grad is None) == (found[name] is None), name
            if grad is not None:
                torch.testing.assert_close(found[name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")

    def test_a_task_trains(self, entry):
        model, inputs = _double(entry, 4)
        convert(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(1)
        trained = _of_task(model, lambda: add_task(model, "b"))
        teacher = convert(copy.deepcopy(merge(model, "b")), mask_init="normal")
        model.train()
        with torch.no_grad():
            target = entry.run(teacher.train(), inputs)
        optimizer = torch.optim.Adam(trained, lr=0.2)
        losses = []
        for _ in range(12):
            with using_task(model, "b"):
                loss = (entry.run(model, inputs) - target).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        assert min(losses[-3:]) < 0.8 * losses[0], losses

    def test_mixed_task_batch_equals_each_task_alone(self, entry):
        model, inputs = _with_tasks(entry)
        alone = _each_alone(entry, model, inputs)
        direction = torch.randn_like(alone)
        (alone * direction).sum().backward()
        wanted = gradients(model)
        with using_task(model, list(BATCH)):
            mixed = entry.run(model, inputs)
        assert not torch.allclose(mixed[0], mixed[1])
        torch.testing.assert_close(mixed, alone, **CLOSE)
        (mixed * direction).sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, wanted[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")

    def test_packed_tasks(self, entry):
        model, inputs = _with_tasks(entry)
        for module in model.modules():
            if isinstance(module, MaskedLayer):
                for _, masks in module._groups():
                    for logits in masks.values():
                        logits.data[torch.rand_like(logits) < 0.1] = -1.0
        bank = MaskBank(model)
        bank.pack("a"), bank.pack("b")
        with torch.no_grad(), using_task(model, list(BATCH)):
            mixed = entry.run(model, inputs)
        with torch.no_grad():
            torch.testing.assert_close(mixed, _each_alone(entry, model, inputs), **CLOSE)
            torch.testing.assert_close(entry.run(merge(model, "a"), rows(inputs, [1, 2])), mixed[1:3], **CLOSE)

    def test_merged_model(self, entry):
        model, inputs = _with_tasks(entry)
        for task in tasks(model):
            plain = merge(model, task)
            assert not any(isinstance(module, MaskedLayer) for module in plain.modules())
            with torch.no_grad(), using_task(model, task):
                torch.testing.assert_close(entry.run(plain, inputs), entry.run(model, inputs), **CLOSE)

    def test_state_comes_back(self, entry):
        model, inputs = _with_tasks(entry)
        other, _ = _double(entry)
        convert(other).load_state_dict(model.state_dict())
        assert tasks(other) == tasks(model)
        for task in tasks(model):
            with torch.no_grad(), using_task(model, task), using_task(other, task):
                assert torch.equal(entry.run(model, inputs), entry.run(other, inputs))

    def test_gradient_checkpointing(self, entry):
        model, inputs = _with_tasks(entry)
        model.train()
        found = []
        for checkpoints in (False, True):
            if checkpoints:
                _checkpoint(model)
            with using_task(model, list(BATCH)):
                output = entry.run(model, inputs)
            output.square().sum().backward()  # behind the block
            found.append(gradients(model))
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def _checkpoint(model):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert model.is_activation_checkpointing


@TRANSFORMERS
class TestPretrained:
    def test_masked_model_is_saved_and_comes_back(self, entry, tmp_path):
        model, inputs = _with_tasks(entry)
        model.save_pretrained(tmp_path, save_original_format=False)
        other = convert(type(model).from_pretrained(tmp_path, dtype=torch.float64, **entry.loading))
        missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not unexpected and set(missing) <= set(getattr(model, "all_tied_weights_keys", ()) or ())
        for task in tasks(model):
            with torch.no_grad(), using_task(model, task), using_task(other, task):
                torch.testing.assert_close(entry.run(other, inputs), entry.run(model, inputs), **CLOSE)

    def test_merged_task_is_saved_and_comes_back(self, entry, tmp_path):
        model, inputs = _with_tasks(entry)
        plain = merge(model, "b")
        plain.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64, **entry.loading).eval()
        with torch.no_grad():
            torch.testing.assert_close(entry.run(again, inputs), entry.run(plain, inputs), **CLOSE)

    def test_attention(self, entry):
        model, inputs = _with_tasks(entry)
        outputs = []
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            with torch.no_grad(), using_task(model, list(BATCH)):
                outputs.append(entry.run(model, inputs))
        torch.testing.assert_close(*outputs, **CLOSE)


def test_experts_by_grouped_products():
    entry = next(entry for entry in ZOO if entry.name.endswith("Mixtral"))
    model, inputs = _with_tasks(entry)
    model.float()
    outputs = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad(), using_task(model, list(BATCH)):
            outputs.append(entry.run(model, inputs))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama tied", "T5"])
def test_embeddings_that_are_named(name):
    entry = next(entry for entry in ZOO if entry.name == f"transformers {name}")
    plain, inputs = _double(entry)
    every = sorted({key.rpartition(".")[0] for key, _ in plain.named_parameters() if "norm" not in key.lower()})
    table = [key for key in every if isinstance(plain.get_submodule(key), torch.nn.Embedding)]
    model = convert(copy.deepcopy(plain), mask_init=LOGIT_ON)
    share = conversion_report(model).share
    convert(model, include=table, mask_init=LOGIT_ON)
    assert conversion_report(model).share >= max(share, 0.9)  # a tied table was counted before
    torch.testing.assert_close(entry.run(model, inputs), entry.run(plain, inputs), **CLOSE)
    model, inputs = _with_tasks(entry)
    convert(model, include=table, mask_init=_spread)
    alone = _each_alone(entry, model, inputs)
    with using_task(model, list(BATCH)):
        torch.testing.assert_close(entry.run(model, inputs), alone, **CLOSE)


GENERATING = pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.generates], ids=lambda entry: entry.name.split()[1])
PROMPTS = 3


@GENERATING
class TestGenerate:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_list_of_tasks(self, entry, beams):
        model, _ = _with_tasks(entry)
        prompts = torch.randint(3, 30, (PROMPTS, 5))
        names = list(BATCH[:PROMPTS])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        alone = []
        for row, name in enumerate(names):
            with using_task(model, name):
                alone.append(model.generate(prompts[row : row + 1], **options))
        with using_task(model, names, repeat=beams):
            assert torch.equal(model.generate(prompts, **options), torch.cat(alone))

    def test_beams_that_were_not_named(self, entry):
        model, _ = _with_tasks(entry)
        with using_task(model, list(BATCH[:PROMPTS])), pytest.raises(RuntimeError, match=r"repeat=3"):
            model.generate(torch.randint(3, 30, (PROMPTS, 5)), max_new_tokens=2, num_beams=3, pad_token_id=0)
