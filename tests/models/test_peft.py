"""PEFT: adapters over masked layers, masks below adapters, and what merges."""

from __future__ import annotations

import copy

import pytest
import torch
from support.model_zoo import ZOO, rows  # before peft: it sees to torchvision

from peft import IA3Config, LoraConfig, PromptEncoderConfig, TaskType, get_peft_model  # isort: skip

from metamask_ext import MaskBank, add_task, conversion_report, convert, merge, remove_task, using_task
from metamask_ext.nn import MaskedLayer

ENTRIES = {entry.name.split()[1]: entry for entry in ZOO}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def _lora(**options):
    return LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", **options)


def _with_tasks(model, tasks):
    for task in tasks:
        add_task(model, task)
    remove_task(model, "default")
    return model


def _spread(logits):
    logits.uniform_(1, 4)


def _inputs(entry, count=4):
    torch.manual_seed(3)
    return {name: x.double() if x.is_floating_point() else x for name, x in entry.inputs(count).items()}


def _masked_first(entry, config, tasks="ab"):
    """Adapters over a model that is masked."""
    model = _with_tasks(convert(entry.build().double(), mask_init=_spread), tasks)
    return get_peft_model(model, config).eval()


def _adapted_first(entry, config, tasks="ab"):
    """Masks in a model that has adapters."""
    return _with_tasks(convert(get_peft_model(entry.build().double(), config).eval(), mask_init=_spread), tasks)


BOTH = pytest.mark.parametrize("make", [_masked_first, _adapted_first])
MODELS = pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])


@MODELS
def test_convert_leaves_adapters_alone(name):
    entry = ENTRIES[name]
    model = get_peft_model(entry.build(), _lora())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert(model)
    masked = [key for key, module in model.named_modules() if isinstance(module, MaskedLayer)]
    assert masked and not any("lora_" in key for key in masked)
    assert sum(key.endswith("base_layer") for key in masked) == sum(
        key.endswith("lora_A.default") for key, _ in model.named_modules()
    )
    assert all("adapter of PEFT" in left.reason for left in conversion_report(model).left if "lora_" in left.name)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


@MODELS
@BOTH
class TestLora:
    def test_computes_base_and_adapter(self, name, make):
        entry = ENTRIES[name]
        model, inputs = make(entry, _lora()), _inputs(entry)
        for task in "ab":
            with torch.no_grad(), using_task(model, task):
                found = entry.run(model, inputs)
                with model.disable_adapter():
                    assert not torch.allclose(entry.run(model, inputs), found)
            plain = merge(model, task)
            assert not any(isinstance(module, MaskedLayer) for module in plain.modules())
            with torch.no_grad():
                torch.testing.assert_close(entry.run(plain, inputs), found, **CLOSE)

    def test_merges_into_a_merged_task(self, name, make):
        entry = ENTRIES[name]
        model, inputs = make(entry, _lora()), _inputs(entry)
        with torch.no_grad(), using_task(model, "b"):
            found = entry.run(model, inputs)
        for safe in (False, True):
            unloaded = merge(model, "b").merge_and_unload(safe_merge=safe)
            assert not any("lora" in key for key in unloaded.state_dict())
            with torch.no_grad():
                torch.testing.assert_close(entry.run(unloaded, inputs), found, **CLOSE)

    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    def test_refuses_to_merge_below_masks(self, name, make, how):
        entry = ENTRIES[name]
        model, inputs = make(entry, _lora()), _inputs(entry)
        before = copy.deepcopy(model.state_dict())
        for safe in (False, True):
            with using_task(model, "a"), pytest.raises(RuntimeError, match=r"metamask_ext.merge\(model, task\)"):
                getattr(model, how)(safe_merge=safe)
            with pytest.raises(RuntimeError):
                getattr(model, how)(safe_merge=safe)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with torch.no_grad(), using_task(model, "a"):
            entry.run(model, inputs)

    def test_mixed_task_batch(self, name, make):
        entry = ENTRIES[name]
        model, inputs = make(entry, _lora()), _inputs(entry)
        names = ["b", "a", "a", "b"]
        with torch.no_grad():
            alone = []
            for row, task in enumerate(names):
                with using_task(model, task):
                    alone.append(entry.run(model, rows(inputs, slice(row, row + 1))))
            with using_task(model, names):
                torch.testing.assert_close(entry.run(model, inputs), torch.cat(alone), **CLOSE)
        MaskBank(model).pack("a")
        with torch.no_grad(), using_task(model, names):
            entry.run(model, inputs)

    def test_trains_adapters_of_a_task(self, name, make):
        entry = ENTRIES[name]
        model, inputs = make(entry, _lora()), _inputs(entry)
        with using_task(model, "a"):
            entry.run(model, inputs).square().sum().backward()
        grads = {key: parameter.grad for key, parameter in model.named_parameters() if "lora_" in key and "pooler" not in key}
        assert grads and all(grad is not None for grad in grads.values())
        assert not any(parameter.grad is not None for key, parameter in model.named_parameters() if "masks.b" in key)


@BOTH
def test_weight_decomposed_lora_reads_the_masked_weight(make):
    entry = ENTRIES["BERT"]
    model, inputs = make(entry, LoraConfig(r=2, target_modules=["query"], use_dora=True), tasks="a"), _inputs(entry)
    with torch.no_grad(), using_task(model, "a"):
        found = entry.run(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(entry.run(merge(model, "a"), inputs), found, **CLOSE)


@BOTH
def test_ia3(make):
    entry = ENTRIES["BERT"]
    config = IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], init_ia3_weights=False)
    model, inputs = make(entry, config), _inputs(entry)
    with torch.no_grad(), using_task(model, "a"):
        found = entry.run(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(entry.run(merge(model, "a").merge_and_unload(), inputs), found, **CLOSE)
    with using_task(model, "a"), pytest.raises(RuntimeError, match="a write to it is lost"):
        model.merge_and_unload()


def test_modules_to_save_and_prompts():
    entry = ENTRIES["BERT"]
    saved = convert(get_peft_model(entry.build(), LoraConfig(target_modules=["query"], modules_to_save=["pooler"])))
    masked = [key for key, module in saved.named_modules() if isinstance(module, MaskedLayer)]
    assert any("original_module" in key for key in masked) and not any("modules_to_save" in key for key in masked)
    prompts = PromptEncoderConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=2, encoder_hidden_size=4)
    prompted = convert(get_peft_model(entry.build(), prompts))
    masked = [key for key, module in prompted.named_modules() if isinstance(module, MaskedLayer)]
    assert masked and not any("prompt_encoder" in key for key in masked)


def test_adapters_of_a_batch():
    """PEFT's own mixed batch, of adapters, over a mixed-task batch."""
    entry = ENTRIES["BERT"]
    model = _masked_first(entry, _lora())
    model.add_adapter("other", _lora())
    inputs, names = _inputs(entry), ["a", "b", "b", "a"]
    adapters = ["default", "other", "default", "other"]
    with torch.no_grad():
        alone = []
        for row, (task, adapter) in enumerate(zip(names, adapters)):
            model.set_adapter(adapter)
            with using_task(model, task):
                alone.append(entry.run(model, rows(inputs, slice(row, row + 1))))
        with using_task(model, names):
            mixed = entry.output(model(**inputs, adapter_names=adapters))
    torch.testing.assert_close(mixed, torch.cat(alone), **CLOSE)
