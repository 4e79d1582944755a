"""`param_groups` and a few steps on the real classes of transformers, from tiny configs."""

from __future__ import annotations

import pytest
import torch

from normuon import MatrixView, NorMuon, describe_groups, param_groups

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def build(name: str, **changes):
    t = transformers
    configs = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            **changes,
        ),
        "llama": lambda: t.LlamaConfig(**GATED, **changes),
        "qwen3": lambda: t.Qwen3Config(**GATED, head_dim=8, **changes),
        "mixtral": lambda: t.MixtralConfig(**GATED, num_local_experts=4, **changes),
        "gpt_oss": lambda: t.GptOssConfig(**GATED, head_dim=8, num_local_experts=4, **changes),
        "bert": lambda: t.BertConfig(**SMALL, intermediate_size=48, **changes),
    }
    return t.AutoModelForCausalLM.from_config(configs[name]())


def algorithms(model, **kwargs) -> dict[str, tuple[str, MatrixView | None]]:
    return {
        name: (group["algorithm"], group.get("view"))
        for group in param_groups(model, **kwargs)
        for name, _ in group["params"]
    }


LINEAR, TRANSPOSED = ("normuon", MatrixView.linear()), ("normuon", MatrixView.transposed())
EXPERTS, ADAMW = ("normuon", MatrixView.experts()), ("adamw", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gpt2",
            {
                "transformer.wte.weight": ADAMW,
                "transformer.wpe.weight": ADAMW,
                "transformer.h.0.ln_1.weight": ADAMW,
                "transformer.h.1.attn.c_attn.weight": TRANSPOSED,
                "transformer.h.1.attn.c_attn.bias": ADAMW,
                "transformer.h.1.attn.c_proj.weight": TRANSPOSED,
                "transformer.h.0.mlp.c_fc.weight": TRANSPOSED,
                "transformer.h.0.mlp.c_proj.weight": TRANSPOSED,
            },
        ),
        (
            "llama",
            {
                "model.embed_tokens.weight": ADAMW,
                "model.layers.0.self_attn.q_proj.weight": LINEAR,
                "model.layers.0.self_attn.k_proj.weight": LINEAR,
                "model.layers.1.mlp.gate_proj.weight": LINEAR,
                "model.layers.1.mlp.down_proj.weight": LINEAR,
                "model.layers.1.input_layernorm.weight": ADAMW,
                "model.norm.weight": ADAMW,
                "lm_head.weight": ADAMW,
            },
        ),
        (
            "qwen3",
            {
                "model.layers.0.self_attn.q_norm.weight": ADAMW,
                "model.layers.0.self_attn.o_proj.weight": LINEAR,
                "lm_head.weight": ADAMW,
            },
        ),
        (
            "mixtral",
            {
                "model.layers.0.mlp.gate.weight": ADAMW,
                "model.layers.0.mlp.experts.gate_up_proj": EXPERTS,
                "model.layers.1.mlp.experts.down_proj": EXPERTS,
                "model.layers.1.self_attn.v_proj.weight": LINEAR,
            },
        ),
        (
            "gpt_oss",
            {
                "model.layers.0.mlp.experts.gate_up_proj": (
                    "normuon",
                    MatrixView.experts(transposed=True),
                ),
                "model.layers.0.mlp.experts.gate_up_proj_bias": ADAMW,
                "model.layers.0.mlp.router.weight": ADAMW,
            },
        ),
    ],
)
def test_each_parameter_takes_its_algorithm(name, expected):
    model = build(name)
    found = algorithms(model)
    assert {key: found[key] for key in expected} == expected
    assert set(found) == {key for key, _ in model.named_parameters()}


GROUPED_QUERIES = {"q_proj": 4, "k_proj": 2, "v_proj": 2}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"c_attn": 12}),
        ("llama", GROUPED_QUERIES),
        ("qwen3", GROUPED_QUERIES),
        ("mixtral", GROUPED_QUERIES),
        ("gpt_oss", GROUPED_QUERIES),
        ("bert", {"query": 4, "key": 4, "value": 4}),
    ],
)
def test_every_attention_head_can_be_a_matrix_of_its_own(name, expected):
    """Heads of 8 neurons, counted per projection; everything else is placed as without."""
    model = build(name)
    whole, split = algorithms(model), algorithms(model, split_heads=True)
    heads = {
        key.split(".")[-2]: view.heads
        for key, (_, view) in split.items()
        if view is not None and view != whole[key][1]
    }
    assert heads == expected
    assert {key: split[key][0] for key in split} == {key: whole[key][0] for key in whole}
    dims = {key: view.neuron_dim for key, (_, view) in whole.items() if view is not None}
    assert dims == {key: view.neuron_dim for key, (_, view) in split.items() if view is not None}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_go_to_adamw_once(name, tied):
    model = build(name, tie_word_embeddings=tied)
    found = algorithms(model)
    head = model.get_output_embeddings().weight
    names = [key for key, param in model.named_parameters() if param is head]
    assert len(names) == 1
    assert found[names[0]] == ADAMW
    assert len(found) == len(list(model.parameters()))


def test_a_classifiers_head_goes_to_adamw():
    config = transformers.LlamaConfig(**GATED, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert algorithms(model)["score.weight"] == ADAMW


def test_a_masked_model_is_placed_whole():
    """BERT's inner `output` layers are hidden matrices, its decoder is tied to the embedding."""
    config = transformers.BertConfig(**SMALL, intermediate_size=48)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    found = algorithms(model)
    assert found["bert.encoder.layer.0.output.dense.weight"] == LINEAR
    assert found["bert.embeddings.word_embeddings.weight"] == ADAMW


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mixtral"])
def test_the_loss_of_a_tiny_model_falls(name):
    model = build(name)
    optimizer = NorMuon(param_groups(model), lr=3e-3)
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_split_qkv_of_gpt2_equals_three_linear_layers():
    """Blocks of a Conv1D against separate nn.Linear weights that hold the same numbers."""
    model = build("gpt2")
    overrides = {"*.c_attn.weight": MatrixView.fused(32, 32, 32, neuron_dim=1)}
    optimizer = NorMuon(param_groups(model, overrides=overrides), lr=1e-2, ns_dtype=torch.float32)
    fused = model.transformer.h[0].attn.c_attn.weight
    separate = [torch.nn.Parameter(part.T.clone()) for part in fused.detach().chunk(3, dim=1)]
    twin = NorMuon(separate, lr=1e-2, ns_dtype=torch.float32)
    tokens = torch.randint(0, 64, (2, 16))
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for part, grad in zip(separate, fused.grad.chunk(3, dim=1), strict=True):
            part.grad = grad.T.clone()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
    for part, expected in zip(fused.detach().chunk(3, dim=1), separate, strict=True):
        torch.testing.assert_close(part.T, expected.detach(), rtol=0, atol=1e-6)


def test_the_table_names_every_parameter_of_a_model():
    model = build("mixtral")
    table = describe_groups(param_groups(model))
    assert all(name in table for name, _ in model.named_parameters())
    assert "4 of 96x32" in table
    assert "router: MixtralTopKRouter" in table


ADAPTERS = {
    "modules_to_save": (
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"lora_A": "normuon", "lora_B": "normuon", "lm_head.modules_to_save": "adamw"},
    ),
    "LoRA on embeddings": (
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"lora_A": "normuon", "lora_embedding_A": "adamw", "lora_embedding_B": "adamw"},
    ),
    "trainable tokens": (
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1]}},
        {"lora_B": "normuon", "trainable_tokens_delta": "adamw"},
    ),
    "DoRA": (
        {"r": 4, "target_modules": ["q_proj"], "use_dora": True},
        {"lora_A": "normuon", "lora_magnitude_vector": "adamw"},
    ),
}


@pytest.mark.parametrize(("options", "expected"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_peft_are_placed(options, expected):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    found = algorithms(model)
    for part, algorithm in expected.items():
        placed = {found[name][0] for name in found if part in name}
        assert placed == {algorithm}, part


def test_the_scales_of_ia3_are_vectors():
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = peft.get_peft_model(build("llama"), peft.IA3Config(**targets))
    found = algorithms(model, hidden_required=False)
    assert {algorithm for algorithm, _ in found.values()} == {"adamw"}
