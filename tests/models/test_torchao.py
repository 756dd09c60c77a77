"""torchao: a quantised weight is not masked, a masked one is not quantised, and a merged task is."""

from __future__ import annotations

import copy

import pytest
import torch
from support.model_zoo import ZOO
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from metamask_ext import add_task, conversion_report, convert, merge, tasks
from metamask_ext.nn import MaskedLayer

CONFIGS = {
    "int8": Int8WeightOnlyConfig,
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
}
BERT = next(entry for entry in ZOO if entry.name.endswith("BERT"))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


def test_quantised_layers_stay_as_they_are(config):
    model = BERT.build()
    quantize_(model, config)
    inputs = BERT.inputs(3)
    before = BERT.run(model, inputs)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with pytest.raises(ValueError, match="its weight is quantised"):
        convert(model, on_unsupported="error", exclude="embeddings.*")
    convert(model)
    assert not any(isinstance(module, MaskedLayer) for module in model.modules())
    reasons = {left.name: left.reason for left in conversion_report(model).left}
    assert all("its weight is quantised" in reasons[name] for name in linear)
    assert torch.equal(BERT.run(model, inputs), before)


def test_masked_model_is_not_quantised(config):
    model = convert(BERT.build())
    add_task(model, "b")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"cannot be quantised .* below its masks"):
        quantize_(model, config)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_masked_model_is_not_prepared_for_quantised_training():
    model = convert(BERT.build())
    with pytest.raises(RuntimeError, match="the masks would be lost"):
        quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=8), step="prepare"))
    assert tasks(model) == ["default"]


def test_a_merged_task_is_quantised(config):
    torch.manual_seed(0)
    model, inputs = convert(BERT.build(), mask_init="normal"), BERT.inputs(3)
    plain = merge(model, "default")
    quantised = copy.deepcopy(plain)
    quantize_(quantised, config)
    with torch.no_grad():
        expected, found = BERT.run(plain, inputs), BERT.run(quantised, inputs)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().mean() < 0.2 * expected.abs().mean()
    assert not any(isinstance(module, MaskedLayer) for module in quantised.modules())
