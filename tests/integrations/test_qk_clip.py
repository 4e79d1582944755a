"""QK-clip on transformers' own attention classes: eager attention's logits, and scaled weights."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from torch import Tensor, nn

from normuon import NorMuon, param_groups
from normuon.integrations import attention_logits
from normuon.integrations.attention_logits import Mask, mask_in_use, max_logits
from normuon.integrations.qk_clip import QKClip, scaling_factors

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options):
    sizes = {**SIZES, "intermediate_size": 24, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def qwen2_gqa(**options):
    """Two query heads for each key head, and biases on both."""
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, **options}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    for name, param in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(param.data, std=0.5)
    return model


def mistral_window(**options):
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "sliding_window": 3}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **options))


def gpt_neox(**options):
    sizes = {**SIZES, "intermediate_size": 24, "rotary_pct": 0.5, **options}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def gpt2(**options):
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **dropout, **options))


def phi3(**options):
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **options))


def deepseek(q_lora_rank=6, **options):
    config = transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        intermediate_size=24,
        moe_intermediate_size=8,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=5,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=4,
        **options,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def deepseek_without_query_lora(**options):
    return deepseek(q_lora_rank=None, **options)


MODELS = [
    *(llama, qwen2_gqa, mistral_window, gpt_neox, gpt2, phi3),
    *(deepseek, deepseek_without_query_lora),
]


def build(make, attention="sdpa", **options) -> nn.Module:
    """A model in training mode with logits of some size."""
    torch.manual_seed(0)
    model = make(attn_implementation=attention, **options).train()
    for name, param in model.named_parameters():
        if param.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            param.data.normal_(std=0.4)
    return model


def batch(padding: str) -> dict[str, Tensor]:
    tokens = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padding == "right":
        mask[0, 5:] = mask[1, 3:] = 0
    elif padding == "left":
        mask[0, :2] = mask[1, :4] = 0
    elif padding == "none":
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": mask}


class EagerLogits:
    """Every logit that the model's own eager attention adds its mask to, in place of its maximum.

    It stands where transformers calls a modeling file's ``eager_attention_forward``.
    """

    def __init__(self, monkeypatch, model: nn.Module, padding: dict[str, Tensor]) -> None:
        self.largest: dict[int, Tensor] = {}
        file = sys.modules[type(model).__module__]
        plain = file.eager_attention_forward
        real = padding.get("attention_mask", torch.ones(1)).bool()

        def eager(module, query, key, value, attention_mask, scaling, **options):
            groups = query.shape[1] // key.shape[1]
            logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
            # Padding as a query is nobody's logit; as a key the model's own mask hides it.
            seen = logits + attention_mask
            if real.ndim == 2:
                seen = seen.masked_fill(~real[:, None, :, None], -torch.inf)
            largest = seen.detach().amax(dim=(0, 2, 3))
            before = self.largest.get(module.layer_idx, largest)
            self.largest[module.layer_idx] = torch.maximum(before, largest)
            return plain(module, query, key, value, attention_mask, scaling=scaling, **options)

        monkeypatch.setattr(file, "eager_attention_forward", eager)


def eager_logits(make, inputs, monkeypatch, state=None) -> list[Tensor]:
    """The largest logits of every head, layer after layer, from eager attention alone."""
    with monkeypatch.context() as patch:
        model = build(make, "eager")
        if state is not None:
            model.load_state_dict(state)
        recorder = EagerLogits(patch, model, inputs)
        model(**inputs)
    return [recorder.largest[layer] for layer in sorted(recorder.largest)]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", MODELS)
def test_the_largest_logits_are_those_of_eager_attention(make, attention, padding, monkeypatch):
    inputs = batch(padding)
    expected = eager_logits(make, inputs, monkeypatch)
    model = build(make, attention)
    clip = QKClip(model, tau=1e9)
    model(**inputs)
    clip.step()
    assert len(clip.max_logits) == 2
    for found, wanted in zip(clip.max_logits.values(), expected, strict=True):
        # float32 products of at most 16 terms, in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert transformers.AttentionInterface.get_interface.__name__ == "get_interface"


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("make", MODELS)
def test_each_heads_logits_scale_by_its_own_gamma(make, alpha, monkeypatch):
    """In the first layer, whose inputs stay: heads above tau come down to it, the others stay."""
    inputs = batch("right")
    model = build(make)
    before = eager_logits(make, inputs, monkeypatch)[0]
    tau = float(before.median())
    clip = QKClip(model, tau=tau, alpha=alpha)
    model(**inputs)
    clip.step()
    after = eager_logits(make, inputs, monkeypatch, state=model.state_dict())[0]
    assert (before > tau).any()
    assert (before < tau).any()
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_nothing_but_queries_and_keys_is_touched(make):
    """Bit by bit: values, whatever layer they share with keys, and heads under tau."""
    model = build(make)
    clip = QKClip(model, tau=1e-3)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model(**batch("none"))
    clip.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    makers = ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "query_key_value", "c_attn", "qkv_proj")
    assert changed
    assert all(name.split(".")[-2] in makers for name in changed)
    params = dict(model.named_parameters())
    for name in changed:
        kept = (params[name] == before[name]).view(params[name].shape)
        for values in values_of(make, name):
            assert kept[values].all(), name


def values_of(make, name: str):
    """Where the values are in a fused projection of these small models."""
    if make is gpt2:
        return [(..., slice(32, 48))]
    if make is gpt_neox:
        return [slice(12 * head + 8, 12 * head + 12) for head in range(4)]
    if make is phi3:
        return [slice(24, 32)]
    if "kv_b_proj" in name:
        return [slice(7 * head + 3, 7 * head + 7) for head in range(4)]
    return []


def test_weights_scale_as_kimi_k2_says():
    """gamma ** alpha for queries and gamma ** (1 - alpha) for keys, in blocks of head_dim rows."""
    model = build(llama)
    layer = model.model.layers[0].self_attn
    query, key = layer.q_proj.weight.detach().clone(), layer.k_proj.weight.detach().clone()
    clip = QKClip(model, tau=0.5, alpha=0.3)
    model(**batch("none"))
    clip.step()
    gamma = (0.5 / clip.max_logits["model.layers.0.self_attn"]).clamp(max=1)
    scaled = query.view(4, 4, 16) * gamma.view(4, 1, 1) ** 0.3
    torch.testing.assert_close(layer.q_proj.weight.view(4, 4, 16), scaled, rtol=1e-6, atol=0)
    scaled = key.view(4, 4, 16) * gamma.view(4, 1, 1) ** 0.7
    torch.testing.assert_close(layer.k_proj.weight.view(4, 4, 16), scaled, rtol=1e-6, atol=0)


def test_latent_attentions_rotary_parts():
    """Rotary queries take gamma whole, since the rotary key belongs to all heads and stays."""
    model = build(deepseek)
    layer = model.model.layers[0].self_attn
    names = ("q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa")
    before = {name: layer.get_submodule(name).weight.detach().clone() for name in names}
    clip = QKClip(model, tau=0.5)
    model(**batch("none"))
    clip.step()
    gamma = (0.5 / clip.max_logits["model.layers.0.self_attn"]).clamp(max=1).view(4, 1, 1)
    query = before["q_b_proj"].view(4, 5, 6)
    scaled = torch.cat([query[:, :3] * gamma.sqrt(), query[:, 3:] * gamma], dim=1)
    torch.testing.assert_close(layer.q_b_proj.weight.view(4, 5, 6), scaled, rtol=1e-6, atol=0)
    assert torch.equal(layer.kv_a_proj_with_mqa.weight, before["kv_a_proj_with_mqa"])


def test_micro_batches_add_up_and_evaluation_does_not_count():
    model = build(llama)
    clip = QKClip(model, tau=1e9)
    inputs = batch("none")
    for row in range(3):
        model(input_ids=inputs["input_ids"][row : row + 1])
    model.eval()
    model.model.embed_tokens.weight.data.mul_(100)
    model(input_ids=torch.arange(32)[None])
    model.model.embed_tokens.weight.data.div_(100)
    model.train()
    clip.step()
    found = clip.max_logits["model.layers.1.self_attn"]
    model(**inputs)
    clip.step()
    torch.testing.assert_close(
        found, clip.max_logits["model.layers.1.self_attn"], rtol=1e-5, atol=0
    )


def test_every_third_step_is_measured_and_a_resumed_run_keeps_count():
    model = build(llama)
    clip = QKClip(model, tau=1e-3, every=3)
    weight = model.model.layers[0].self_attn.q_proj.weight
    moved = []
    for step in range(5):
        before = weight.detach().clone()
        if step == 2:
            resumed = QKClip(model, tau=1e-3, every=3)
            resumed.load_state_dict(clip.state_dict())
            clip.remove()
            clip = resumed
        model(**batch("none"))
        clip.step()
        moved.append(not torch.equal(weight, before))
    assert moved == [True, False, False, True, False]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_measures_once(use_reentrant, monkeypatch):
    """Its second pass sees the same logits again."""
    counted = []
    monkeypatch.setattr(
        "normuon.integrations.qk_clip.max_logits",
        lambda *arguments, **options: counted.append(1) or max_logits(*arguments, **options),
    )
    model = build(llama)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    clip = QKClip(model, tau=1e9)
    inputs = batch("none")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    clip.step()
    assert len(counted) == 2


def test_a_head_with_an_infinite_or_missing_number_is_left_alone():
    """Otherwise tau / inf would erase its weights, and a NaN would spread."""
    logits = torch.tensor([torch.inf, 400.0])
    assert scaling_factors(logits, 2, tau=100.0, alpha=0.5)[1:3].tolist() == [1.0, 0.5]
    model = build(llama)
    clip = QKClip(model, tau=1e-3)
    layer = model.model.layers[1].self_attn
    layer.q_proj.weight.data[0] = torch.nan
    before = layer.q_proj.weight.detach().clone()
    model(**batch("none"))
    clip.step()
    assert clip.max_logits["model.layers.1.self_attn"][0] == torch.inf
    assert torch.equal(layer.q_proj.weight[1:4], before[1:4])
    assert not torch.equal(layer.q_proj.weight[4:], before[4:])


def test_blocks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 3), torch.randn(2, 2, 9, 3)
    mask = Mask(causal=True, window=4, real=torch.rand(2, 9) > 0.3)
    whole = max_logits(query, key, scaling=0.5, mask=mask)
    monkeypatch.setattr(attention_logits, "BLOCK_ELEMENTS", 2 * 4 * 9 * 2)
    torch.testing.assert_close(max_logits(query, key, scaling=0.5, mask=mask), whole)


def test_half_precision_is_multiplied_in_float32_even_under_autocast():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    expected = (query.double() @ key.double().mT).amax((0, 2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = max_logits(query, key, scaling=1.0, mask=Mask())
    # Products of bfloat16 numbers are exact in float32, and eight of them are added.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["ends", "positions"])
def test_documents_that_flash_attention_packs_do_not_see_each_other(how):
    torch.manual_seed(0)
    query = key = torch.randn(1, 2, 9, 4)
    packed = (
        {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
        if how == "ends"
        else {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    )
    module = nn.Module()
    mask = mask_in_use("a", module, query, key, None, packed, "flash_attention_2")
    found = max_logits(query, key, scaling=1.0, mask=mask)
    document = torch.tensor([0] * 4 + [1] * 5)
    allowed = (document[:, None] == document) & torch.ones(9, 9).tril().bool()
    logits = (query @ key.mT).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(found, logits.amax((0, 2, 3)))


def test_it_follows_the_optimizers_step_and_leaves_its_state():
    """By a hook of the optimizer, which every framework runs; momentum is as without QK-clip."""

    def trained(tau):
        model = build(llama)
        optimizer = NorMuon(param_groups(model), lr=1e-2)
        clip = QKClip(model, tau=tau)
        optimizer.register_step_post_hook(lambda *_: clip.step())
        inputs = batch("none")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        weight = model.model.layers[0].self_attn.q_proj.weight
        return weight, optimizer.state[weight], clip

    clipped, state, clip = trained(0.5)
    plain, expected, _ = trained(1e9)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    gamma = (0.5 / clip.max_logits["model.layers.0.self_attn"]).clamp(max=1)
    scaled = plain.view(4, 4, 16) * gamma.view(4, 1, 1).sqrt()
    torch.testing.assert_close(clipped.view(4, 4, 16), scaled, rtol=1e-6, atol=0)


def test_in_the_trainer_a_callback_of_two_lines_serves(tmp_path):
    pytest.importorskip("accelerate")
    from normuon.integrations.transformers import trainer_optimizer

    class ClipQK(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.clip = QKClip(model, tau=0.05)

        def on_optimizer_step(self, args, state, control, **_):
            self.clip.step()

    tokens = torch.arange(16)
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = ClipQK()
    model = build(llama)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 16,
        optimizer_cls_and_kwargs=trainer_optimizer(args, quiet=True),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.clip.state_dict() == {"num_steps": 3}
    assert all(bool((logits <= 0.1).all()) for logits in callback.clip.max_logits.values())


def with_lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build(llama), peft.LoraConfig(target_modules=["q_proj"]))


def frozen():
    model = build(llama)
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    return model


def tied():
    model = build(llama)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    return model


def of_class(name, **options):
    config = getattr(transformers, f"{name}Config")(
        **SIZES, intermediate_size=24, num_key_value_heads=2, **options
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


REFUSED = {
    "queries are normalised": (
        lambda: of_class("Qwen3"),
        r"^model\.layers\.0\.self_attn\.q_norm \(Qwen3RMSNorm\) normalises queries or keys",
    ),
    "logits are capped": (
        lambda: of_class("Gemma2", head_dim=4),
        r"^model\.layers\.0\.self_attn: config\.attn_logit_softcapping=50\.0 bounds the logits",
    ),
    "queries are clamped": (
        lambda: of_class("Olmo", clip_qkv=3.0),
        r"^model\.layers\.0\.self_attn: config\.clip_qkv=3\.0 bounds the logits already",
    ),
    "adapters": (with_lora, r"q_proj: QK-clip scales Linear and Conv1D layers, not a Linear; mer"),
    "frozen weights": (frozen, r"^model\.layers\.1\.self_attn\.k_proj\.weight is frozen and QK-"),
    "tied weights": (
        tied,
        r"^model\.layers\.1\.self_attn\.q_proj\.weight is also model\.layers\.0\.self_attn\.q_proj",
    ),
    "no attention": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        r"^QKClip finds no attention in Sequential: QK-clip knows q_proj and k_proj",
    ),
    "another attention": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=24)),
        r"^encoder\.layer\.0\.attention\.self|^encoder\.layer\.0\.attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case):
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        QKClip(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"^tau=0\.0 must be positive$"),
        ({"alpha": 1.5}, r"^alpha=1\.5 must be between 0 and 1$"),
        ({"every": 0}, r"^every=0 must be a positive whole number of steps$"),
        (
            {"only": "vision.*"},
            r"^QKClip finds no attention among 'vision\.\*' in LlamaForCausalLM",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        QKClip(build(llama), **options)


def test_a_step_without_a_training_pass_is_refused():
    model = build(llama).eval()
    clip = QKClip(model)
    model(**batch("none"))
    with pytest.raises(ValueError, match=r"has seen no training pass: call mod"):
        clip.step()


def test_a_mask_that_cannot_be_read_is_refused():
    model = build(llama, "flex_attention")
    clip = QKClip(model)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn: QK-clip cannot read a Blo"
    ):
        model(**batch("none"))
    assert transformers.AttentionInterface.get_interface.__name__ == "get_interface"
    clip.remove()


def test_cross_attention_is_refused():
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.BartModel(transformers.BartConfig(**sizes, **heads)).train()
    QKClip(model)
    with pytest.raises(
        ValueError, match=r"^decoder\.layers\.0\.encoder_attn is cross-attention, whose"
    ):
        model(**batch("none"))


def test_a_class_that_computes_its_own_logits_is_refused():
    """Nothing would be measured, and nothing clipped."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim = 4
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return (self.q_proj(x) @ self.k_proj(x).mT).softmax(-1) @ x

    model = nn.Sequential(Attention())
    QKClip(model)
    with pytest.raises(
        ValueError, match=r"^0: Attention is compiled, or does not call transformers"
    ):
        model(torch.ones(1, 3, 8))


def test_only_leaves_modules_out():
    model = build(llama)
    clip = QKClip(model, tau=1e-3, only="model.layers.1.*")
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model(**batch("none"))
    clip.step()
    assert set(clip.max_logits) == {"model.layers.1.self_attn"}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
