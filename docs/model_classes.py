"""Small models of real classes, of which `make_model_table.py` says what goes where.

transformers' classes are built from its own configs; the others are written as those of
torchvision, timm and well-known repositories are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY = 32, 4, 50
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "num_experts": 4}
_EXPERTS |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 7,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": WIDTH}
_GPT2 |= {"n_layer": 2, "n_head": HEADS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48}
_T5 |= {"num_layers": 2, "num_heads": HEADS, "pad_token_id": 0, "eos_token_id": 1}
_T5 |= {"decoder_start_token_id": 0}
_BART: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": WIDTH, "max_position_embeddings": 16}
_BART |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
_BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
_BART |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_SPEECH: dict[str, Any] = {
    **{key: _TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
_SWITCH = {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", _GPT2),
    "GPT2DoubleHeadsModel": ("GPT2Config", _GPT2),
    "GPT2ForSequenceClassification": ("GPT2Config", _GPT2),
    "LlamaForCausalLM": ("LlamaConfig", _GROUPED),
    "LlamaForSequenceClassification": ("LlamaConfig", _GROUPED),
    "MistralForCausalLM": ("MistralConfig", _GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", _GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "MixtralForCausalLM": ("MixtralConfig", _EXPERTS),
    "GptOssForCausalLM": ("GptOssConfig", {**_EXPERTS, "head_dim": 8}),
    "JetMoeForCausalLM": (
        "JetMoeConfig",
        {**_EXPERTS, "kv_channels": 8, "num_key_value_heads": 2},
    ),
    "SwitchTransformersForConditionalGeneration": ("SwitchTransformersConfig", _SWITCH),
    "NllbMoeForConditionalGeneration": (
        "NllbMoeConfig",
        {**_BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
    "GemmaForCausalLM": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "Phi3ForCausalLM": ("Phi3Config", _GROUPED),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _TEXT),
    "FalconForCausalLM": ("FalconConfig", _TEXT),
    "OPTForCausalLM": (
        "OPTConfig",
        {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    ),
    "BloomForCausalLM": ("BloomConfig", {**_TEXT, "n_layer": 2, "n_head": HEADS}),
    "MambaForCausalLM": ("MambaConfig", {**_TEXT, "state_size": 4}),
    "XLNetLMHeadModel": (
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": HEADS, "d_inner": 48},
    ),
    "BertForMaskedLM": ("BertConfig", _TEXT),
    "BertForPreTraining": ("BertConfig", _TEXT),
    "BertForNextSentencePrediction": ("BertConfig", _TEXT),
    "BertForSequenceClassification": ("BertConfig", _TEXT),
    "BertForQuestionAnswering": ("BertConfig", _TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", _TEXT),
    "RobertaForSequenceClassification": ("RobertaConfig", _TEXT),
    "RobertaForTokenClassification": ("RobertaConfig", _TEXT),
    "ElectraForPreTraining": ("ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "ElectraForMaskedLM": ("ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "ElectraForSequenceClassification": ("ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**_TEXT, "cls_token_id": 0, "sep_token_id": 0}),
    "T5ForConditionalGeneration": ("T5Config", _T5),
    "T5ForSequenceClassification": ("T5Config", _T5),
    "T5ForTokenClassification": ("T5Config", _T5),
    "BartForConditionalGeneration": ("BartConfig", _BART),
    "BartForSequenceClassification": ("BartConfig", _BART),
    "ViTForImageClassification": ("ViTConfig", _IMAGE),
    "BeitForImageClassification": ("BeitConfig", _IMAGE),
    "Dinov2ForImageClassification": ("Dinov2Config", _IMAGE),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
        | {"num_heads": [2, 2], "window_size": 2, "num_labels": 7},
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 7},
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 7},
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2]}
        | {"mlp_ratios": [2, 2], "decoder_hidden_size": 24, "num_labels": 7},
    ),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", _SPEECH),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", _SPEECH),
    "HubertForCTC": ("HubertConfig", _SPEECH),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
}
"""Class, its config's class, and the config."""


def transformers_model(name: str) -> nn.Module:
    """A transformers model with meta tensors."""
    import transformers

    config_class, options = TRANSFORMERS[name]
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(config)
    return model


class Block(nn.Module):
    """A transformer block as nanoGPT, timm and most hand-written models have it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )


class TopKRouter(nn.Linear):
    """A router that is a Linear."""


class MoeBlock(nn.Module):
    """Experts in a list, each chosen by `gate`; one shared expert behind its own gate."""

    def __init__(self, router: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = (TopKRouter if router else nn.Linear)(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.shared_expert_gate = nn.Linear(WIDTH, 1)


class PatchEmbed(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 4, 4)


class FinalLayer(nn.Module):
    """DiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, 16)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))


class LoraLinear(nn.Module):
    """A frozen matrix with low-rank factors beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(4, WIDTH))
        self.lora_B = nn.Parameter(torch.zeros(WIDTH, 4))


class Outer(nn.Module):
    """What a training class puts around a model, with a loss or metrics beside it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss()


def _model(**parts: nn.Module | Tensor) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
    return model


def _blocks() -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(2))


def _convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _nanogpt(head: str) -> nn.Module:
    parts = {"wte": nn.Embedding(VOCABULARY, WIDTH), "h": _blocks(), "ln_f": nn.LayerNorm(WIDTH)}
    return _model(transformer=nn.ModuleDict(parts), **{head: nn.Linear(WIDTH, VOCABULARY)})


def _resnet() -> nn.Module:
    return _model(
        conv1=nn.Conv2d(3, 8, 7), bn1=nn.BatchNorm2d(8), layer1=_convolutions(8, 8, 16),
        layer2=_convolutions(16, 16), fc=nn.Linear(16, 10),
    )  # fmt: skip


def _vgg() -> nn.Module:
    classifier = nn.Sequential(
        nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)
    )
    return _model(features=_convolutions(3, 8, 16), classifier=classifier)


def _vit(head: nn.Module) -> nn.Module:
    return _model(
        stem=PatchEmbed(), cls_token=torch.zeros(1, 1, WIDTH), pos_embed=torch.zeros(1, 5, WIDTH),
        blocks=_blocks(), norm=nn.LayerNorm(WIDTH), head=head,
    )  # fmt: skip


def _simple_vit() -> nn.Module:
    to_patches = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, WIDTH), nn.LayerNorm(WIDTH))
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
    return _model(to_patch_embedding=to_patches, blocks=_blocks(), mlp_head=head)


def _dit() -> nn.Module:
    return _model(x_embedder=PatchEmbed(), blocks=_blocks(), final_layer=FinalLayer())


def _unet() -> nn.Module:
    return _model(
        down=_convolutions(3, 8, 16), up=nn.ConvTranspose2d(16, 8, 2),
        merge=_convolutions(16, 8), last=nn.Conv2d(8, 3, 1),
    )  # fmt: skip


def _actor_critic() -> nn.Module:
    body = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return _model(body=body, policy_head=nn.Linear(64, 6), value_head=nn.Linear(64, 1))


def _autoencoder() -> nn.Module:
    return _model(
        encoder=nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 8)),
        decoder=nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 784)),
    )


def _lstm() -> nn.Module:
    return _model(
        encoder=nn.Embedding(VOCABULARY, WIDTH), rnn=nn.LSTM(WIDTH, 40, 2),
        decoder=nn.Linear(40, VOCABULARY),
    )  # fmt: skip


def _moe(router: bool) -> nn.Module:
    blocks = nn.ModuleList(MoeBlock(router) for _ in range(2))
    return _model(
        embed=nn.Embedding(VOCABULARY, WIDTH), blocks=blocks, to_logits=nn.Linear(WIDTH, VOCABULARY)
    )


def _weight_norm() -> nn.Module:
    hidden = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return _model(inner=nn.Linear(8, WIDTH), hidden=hidden, out=nn.Linear(WIDTH, 10))


def _lora() -> nn.Module:
    return _model(layers=nn.ModuleList(LoraLinear() for _ in range(2)), head=nn.Linear(WIDTH, 10))


HAND_WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": lambda: _nanogpt("lm_head"),
    "GPT with a head called `out`": lambda: _nanogpt("out"),
    "ResNet (torchvision's names)": _resnet,
    "ResNet inside a training class": lambda: Outer(_resnet()),
    "VGG (torchvision's names)": _vgg,
    "VisionTransformer (timm's names)": lambda: _vit(nn.Linear(WIDTH, 10)),
    "VisionTransformer with a linear patch layer": _simple_vit,
    "DiT": _dit,
    "U-Net": _unet,
    "actor and critic": _actor_critic,
    "autoencoder": _autoencoder,
    "LSTM language model": _lstm,
    "mixture of experts, `gate` a Linear": lambda: _moe(False),
    "mixture of experts, `gate` a TopKRouter(nn.Linear)": lambda: _moe(True),
    "weight norm": _weight_norm,
    "hand-written LoRA": _lora,
}


def all_models() -> Iterator[tuple[str, nn.Module]]:
    """Every model of the table, by name."""
    for name in TRANSFORMERS:
        yield name, transformers_model(name)
    for name, build in HAND_WRITTEN.items():
        yield name, build()
