"""Models with adapters, as PEFT's: their base layers are masked, adapters stay, and nothing is merged below a mask."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, add_task, conversion_report, convert, merge, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLayer, MaskedLinear, TaskBatchNorm2d


class _Adapter(nn.Module):
    """As PEFT's LoRA layers: ``base_layer``, and beside it what ``adapter_layer_names`` names."""

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        inputs, outputs = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})

    def forward(self, input):
        return self.base_layer(input) + self.lora_B["default"](self.lora_A["default"](input))

    def delta(self):
        return self.lora_B["default"].weight @ self.lora_A["default"].weight

    def merge(self):
        self.base_layer.weight.data += self.delta()

    def safe_merge(self):
        weight = self.base_layer.weight.data.clone()
        self.base_layer.weight.data = weight + self.delta()


class _ModulesToSave(nn.Module):
    """As PEFT's: the module of the model, and a copy that is trained in its place."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, input):
        return self.modules_to_save["default"](input)


class _WithPrompts(nn.Module):
    """As PEFT's models for prompt learning; also as SAM, which has a prompt encoder of its own."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base
        self.prompt_encoder = nn.ModuleDict({"default": nn.Sequential(nn.Embedding(2, 3), nn.Linear(3, 3))})


def _adapted():
    return nn.Sequential(_Adapter(nn.Linear(4, 5)), nn.ReLU(), _Adapter(nn.Linear(5, 3)))


def _masked_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, MaskedLayer)]


class TestConvert:
    def test_base_layers_are_masked_and_adapters_stay(self):
        model, x = _adapted(), torch.randn(6, 4)
        plain = copy.deepcopy(model)
        convert(model, mask_init=100.0)
        assert _masked_names(model) == ["0.base_layer", "2.base_layer"]
        assert torch.allclose(model(x), plain(x), atol=1e-6)
        reasons = {left.name: left.reason for left in conversion_report(model).left}
        assert set(reasons.values()) == {"an adapter of PEFT, which convert leaves alone"}
        assert sorted(reasons) == [f"{layer}.lora_{which}.default" for layer in "02" for which in "AB"]

    def test_adapters_are_no_reason_to_refuse(self):
        assert _masked_names(convert(_adapted(), on_unsupported="error")) == ["0.base_layer", "2.base_layer"]

    def test_names_of_adapters(self):
        with pytest.raises(ValueError, match="matches no Linear"):
            convert(_adapted(), include="*.lora_A.*")
        assert _masked_names(convert(_adapted(), exclude=["*lora*", "0.*"])) == ["2.base_layer"]

    def test_names_that_an_object_has_added(self):
        model = _adapted()
        model[0].adapter_layer_names = (*_Adapter.adapter_layer_names, "lora_magnitude")
        model[0].lora_magnitude = nn.ModuleDict({"default": nn.Linear(2, 2)})
        assert _masked_names(convert(model)) == ["0.base_layer", "2.base_layer"]

    def test_copies_to_save_and_prompts(self):
        saved = convert(nn.Sequential(_ModulesToSave(nn.Linear(4, 5)), nn.Linear(5, 2)))
        assert _masked_names(saved) == ["0.original_module", "1"]
        assert _masked_names(convert(_WithPrompts(nn.Sequential(nn.Linear(3, 3))))) == ["base_model.0", "prompt_encoder.default.1"]
        of_peft = type("PeftModel", (_WithPrompts,), {"__module__": "peft.peft_model"})(nn.Sequential(nn.Linear(3, 3)))
        assert _masked_names(convert(of_peft)) == ["base_model.0"]

    def test_an_adapter_that_is_given_itself(self):
        assert isinstance(convert(_adapted()[0].lora_A["default"]), MaskedLinear)

    def test_a_layer_that_is_base_and_adapter(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"adapted": _Adapter(nn.Linear(4, 4)), "shared": shared})
        model["adapted"].lora_A["other"] = shared
        assert isinstance(convert(model)["shared"], MaskedLinear)


def _over_masked(several=False):
    """Adapters over a model that is masked before."""
    torch.manual_seed(1)
    base = convert(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), mask_init="normal")
    if several:
        add_task(base, "b")
    return nn.Sequential(_Adapter(base[0]), nn.ReLU(), _Adapter(base[2]))


@pytest.mark.parametrize("make", [_over_masked, lambda: convert(_adapted(), mask_init="normal")], ids=["masked", "adapted"])
@pytest.mark.parametrize("how", ["merge", "safe_merge"])
def test_nothing_is_merged_below_a_mask(make, how):
    model, x = make(), torch.randn(6, 4)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"a write to it is lost.*metamask_ext.merge\(model, task\)"):
        getattr(model[0], how)()
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_merged_model_takes_its_adapters():
    model, x = _over_masked(several=True), torch.randn(6, 4)
    for task in tasks(model):
        with using_task(model, task):
            expected = model(x)
        plain = merge(model, task)
        assert type(plain[0].base_layer) is nn.Linear and torch.allclose(plain(x), expected, atol=1e-6)
        plain[0].merge()
        assert torch.allclose(plain[0].base_layer(x), merge(model, task)[0](x), atol=1e-6)


def test_what_an_adapter_reads_is_the_masked_weight():
    model = _over_masked()
    layer = model[0].base_layer
    shared = dict(layer.named_parameters())["weight"]
    assert torch.allclose(layer.weight, shared * layer.mask_logits.sigmoid())
    assert isinstance(layer, MaskedLinear) and "weight" in layer.state_dict()
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, layer.weight)


def test_mixed_task_batch_and_bank():
    model = _over_masked(several=True)
    x, names = torch.randn(6, 4), ["default", "b", "b", "default", "b", "default"]
    bank = MaskBank(model)
    for packed in (False, True):
        singles = {}
        for task in bank.tasks:
            if packed:
                bank.pack(task)
            with using_task(model, task):
                singles[task] = model(x)
        with using_task(model, names):
            mixed = model(x)
        assert torch.allclose(mixed, torch.stack([singles[name][row] for row, name in enumerate(names)]), atol=1e-6)


def test_gradients_reach_masks_and_adapters():
    model = _over_masked()
    model(torch.randn(6, 4)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())


class TestLayersThatCannotBeABase:
    def test_with_tensors_of_each_task(self):
        class Plain(nn.Module):
            adapter_layer_names = ("lora_A",)

        with pytest.raises(RuntimeError, match="cannot be the base of an adapter"):
            Plain().base_layer = TaskBatchNorm2d(3)
        head = convert(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(5, 3)), include="0")
        MaskBank(head, per_task="1.*")
        with pytest.raises(RuntimeError, match="PerTaskLinear cannot be the base of an adapter"):
            _Adapter(head[1])

    def test_subclass_of_a_user(self):
        class Own(MaskedLinear):
            pass

        layer = _Adapter(Own(4, 3)).base_layer
        assert isinstance(layer, Own) and torch.allclose(layer.weight, layer.state_dict()["weight"] * layer.mask_logits.sigmoid())

    def test_other_modules_with_that_attribute(self):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.base_layer = MaskedLinear(4, 3)

        assert type(Holder().base_layer) is MaskedLinear


class TestExchangedLayers:
    """Tools for quantised training put a layer of their own, over the same parameters, in the place of each Linear."""

    @pytest.mark.parametrize(
        ("masked", "plain"), [(MaskedLinear(4, 3), nn.Linear(4, 3)), (MaskedConv2d(2, 3, 1), nn.Conv2d(2, 3, 1))]
    )
    def test_masks_are_not_dropped(self, masked, plain):
        model = nn.Sequential(masked)
        plain.weight = masked.weight
        with pytest.raises(RuntimeError, match="the masks would be lost"):
            model[0] = plain
        assert model[0] is masked

    def test_others_take_its_place(self):
        model = nn.Sequential(MaskedLinear(4, 3))
        model[0] = nn.Linear(4, 3)
        model[0] = merge(nn.Sequential(MaskedLinear(4, 3)), "default")[0]
        model[0] = MaskedLinear(4, 3)
        model[0] = nn.Sequential(model[0])
        assert isinstance(model[0][0], MaskedLinear)
