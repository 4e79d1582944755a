"""NorMuon on LoRA adapters: the two thin matrices of each adapter are hidden matrices like others.

$ python examples/peft_lora.py
"""

import argparse
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


def adapted_model() -> peft.PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    return peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))


def train(steps: int, out: Path, resume: bool = False) -> list[float]:
    """Trains, saves in the middle, and returns every step's loss."""
    model = adapted_model()
    # Frozen weights are left out; lora_A [r, in] and lora_B [out, r] take NorMuon. An adapter is
    # small and starts at zero, so its learning rate is larger than a whole model's.
    optimizer = normuon.NorMuon(normuon.param_groups(model), lr=1e-2, weight_decay=0.0)
    middle, first = steps // 2, 0
    if resume:
        adapter = peft.utils.load_peft_weights(str(out))
        peft.set_peft_model_state_dict(model, adapter)
        optimizer.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
        first = middle
    losses = []
    for step in range(first, steps):
        tokens = (torch.arange(8 * step, 8 * step + 8)[:, None] + torch.arange(32)) % 64
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == middle:
            model.save_pretrained(out)
            torch.save(optimizer.state_dict(), out / "optimizer.pt")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/peft_lora"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    arguments = parser.parse_args()
    for step, loss in enumerate(train(arguments.steps, arguments.out, arguments.resume)):
        print(f"step {step} loss {loss:.4f}")
