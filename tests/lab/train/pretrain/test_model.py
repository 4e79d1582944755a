"""Models of one's own: configurations, weights to start from, and the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from normuon_lab.errors import InputError
from normuon_lab.train.loop import evaluate
from normuon_lab.train.model import build_named_model, layers_of, next_token_loss
from normuon_lab.train.pretrain.config import ModelConfig
from normuon_lab.train.pretrain.parallel import spread
from normuon_lab.train.ranks import Ranks

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    """A model of a user's, in bfloat16 as they often are."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def test_a_users_configuration_is_built_with_the_seeds_weights(
    saved: tuple[Path, LlamaForCausalLM],
) -> None:
    path, _ = saved
    state = torch.get_rng_state()
    first = build_named_model(str(path), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert same(first, build_named_model(str(path / "config.json"), seed=3))
    assert not same(first, build_named_model(str(path), seed=4))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert len(layers_of(first)) == 3


def test_pretrained_weights_are_taken_in_float32(saved: tuple[Path, LlamaForCausalLM]) -> None:
    path, model = saved
    found = build_named_model(str(path), pretrained=True, seed=3)
    assert same(found, model.float())


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="vit is not a causal language model"):
        build_named_model(str(config), seed=0)
    config.write_text(json.dumps({"model_type": "llama", **SIZES}))
    with pytest.raises(InputError, match="--model"):
        build_named_model(str(tmp_path), pretrained=True, seed=0)


def test_the_loss_is_that_of_transformers(saved: tuple[Path, LlamaForCausalLM]) -> None:
    _, model = saved
    model = model.float()
    tokens = torch.randint(50, (3, 9))
    expected = model(input_ids=tokens, labels=tokens).loss
    # Both are means of the same 24 cross-entropies, in float32.
    found = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_score_is_the_mean_over_sequences_of_all_batches() -> None:
    """Batches of other sizes count by their sequences; the model's mode is put back."""
    model = nn.Linear(1, 1).train()
    batches = [(torch.full((4, 2), value), torch.full((4, 2), 0)) for value in (1, 1)]
    batches.append((torch.full((2, 2), 6), torch.full((2, 2), 5)))
    modes = []

    def scores(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor):
        modes.append(module.training)
        return inputs.float().mean(), targets.float().mean()

    found = evaluate(model, batches, scores, ranks=Ranks(), sequence_length=2)
    assert found == [2.0, 1.0]
    assert modes == [False] * 3
    assert model.training


def test_compiling_needs_the_compiler_that_torch_would_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch calls what CXX names, g++ or clang++; another compiler, such as `c++`, is of no use."""
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    config = ModelConfig(model="llama-tiny", compile=True)
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler, and none was found"):
        spread(build_named_model("llama-tiny", seed=0), config, Ranks())
