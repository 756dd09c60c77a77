"""merge: one task of a masked model becomes a plain torch model."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import kinds, masks_on, randomize_masks, small_cnn, small_input
from torch import nn

import metamask_ext
from metamask_ext import add_task, convert, merge, using_task
from metamask_ext.nn import MaskedLinear


class TestMerge:
    def _model(self):
        model = convert(small_cnn())
        add_task(model, "b")
        return randomize_masks(model).eval()

    @pytest.mark.parametrize("task", ["default", "b"])
    def test_is_the_plain_model_of_one_task(self, task):
        model = self._model()
        merged = merge(model, task)
        assert [type(module) for module in merged] == [type(module) for module in small_cnn()]
        assert list(merged.state_dict()) == list(small_cnn().state_dict())
        x = small_input()
        with using_task(model, task):
            torch.testing.assert_close(merged(x), model(x))
        small_cnn().load_state_dict(merged.state_dict(), strict=True)

    def test_weights_worked_out_by_hand(self):
        layer = MaskedLinear(2, 1, mask_init=0.0)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[2.0, -4.0]]))
            layer.bias.fill_(3.0)
            layer.masks["default"][0, 1] = 100.0
        merged = merge(layer, "default")
        assert type(merged) is nn.Linear
        assert (merged.weight.tolist(), merged.bias.tolist()) == ([[1.0, -4.0]], [1.5])

    def test_leaves_the_original_and_shares_no_memory(self):
        model = self._model()
        before = kinds(model)
        values = copy.deepcopy(model.state_dict())
        merged = merge(model, "b")
        assert kinds(model) == before
        addresses = {parameter.data_ptr() for parameter in model.parameters()}
        assert not addresses & {parameter.data_ptr() for parameter in merged.parameters()}
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.zero_()
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())

    def test_logits_at_plus_100_share_no_memory_either(self):
        layer = masks_on(MaskedLinear(3, 2))
        merged = merge(layer, "default")
        assert torch.equal(merged.weight, layer.weight) and merged.weight.data_ptr() != layer.weight.data_ptr()

    def test_keeps_requires_grad_mode_hooks_buffers_and_attributes(self):
        model = self._model()
        model[0].weight.requires_grad_(False)
        model[0].note = "kept"
        model[3].register_buffer("steps", torch.tensor(3))
        calls = []
        model[3].register_forward_hook(lambda module, *_: calls.append(type(module)))
        merged = merge(model, "b")
        assert not merged[0].weight.requires_grad and merged[3].weight.requires_grad
        assert not any(module.training for module in merged.modules())
        assert merged[0].note == "kept" and merged[3].steps.item() == 3
        assert not hasattr(merged[0], "masks") and not hasattr(merged[0], "gate")
        merged(small_input())
        assert calls == [nn.Linear]

    def test_a_hook_bound_to_the_model_is_bound_to_the_copy(self):
        class Recorder(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 2)
                self.seen = 0
                self.fc.register_forward_hook(self.record)

            def record(self, *_):
                self.seen += 1

            def forward(self, x):
                return self.fc(x)

        model = convert(Recorder())
        merged = merge(model, "default")
        merged(torch.randn(1, 3))
        assert (merged.seen, model.seen) == (1, 0)

    @pytest.mark.parametrize("gate", [{"gate": "hard", "threshold": 0.3}, {"temperature": 0.5}], ids=["hard", "temperature"])
    def test_bakes_the_gate_in(self, gate):
        layer = MaskedLinear(4, 3, **gate)
        x = torch.randn(2, 4)
        torch.testing.assert_close(merge(layer, "default")(x), layer(x))

    def test_wants_no_active_task_and_ignores_one(self):
        model = self._model()
        x = small_input()
        with using_task(model, "b"):
            wanted = model(x)
        with using_task(model, "default"):
            merged = merge(model, "b")
        torch.testing.assert_close(merged(x), wanted)

    def test_merged_and_masked_again_is_the_same_function(self):
        model = self._model()
        x = small_input()
        merged = merge(model, "b")
        wanted = merged(x)
        torch.testing.assert_close(masks_on(convert(merged))(x), wanted)

    @pytest.mark.parametrize(("task", "error"), [("c", ValueError), ("", ValueError), (None, TypeError)])
    def test_an_unknown_task_is_refused(self, task, error):
        with pytest.raises(error, match="task"):
            merge(self._model(), task)

    def test_a_model_without_masks_is_refused(self):
        with pytest.raises(ValueError, match="no masked layer"):
            merge(small_cnn(), "default")

    def test_sixteen_bit_and_channels_last_models_keep_dtype_and_layout(self):
        model = convert(nn.Conv2d(4, 3, 3).bfloat16().to(memory_format=torch.channels_last))
        merged = metamask_ext.merge(model, "default")
        assert merged.weight.dtype == torch.bfloat16
        assert merged.weight.is_contiguous(memory_format=torch.channels_last)
