"""What QK-clip adds to the FLOPs of a training step, counted on models without memory.

    python benchmarks/qk_clip.py --out benchmarks/results/qk_clip.json

Counts the products of one forward and backward pass of Llama-like models, with and without the
measurement, on the meta device. QK-clip's other work, one multiplication of the query and key
weights, has no products. The optimizer's step is left out of both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from normuon.integrations.qk_clip import QKClip

COMMAND = "python benchmarks/qk_clip.py --out benchmarks/results/qk_clip.json"
MODELS = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8),
}
"""Width, MLP's width, layers, heads, key heads; as their published configurations."""

LENGTHS = (2048, 8192)


def pass_flops(name: str, length: int, clips: bool) -> int:
    """Products of one forward and backward pass of one sequence."""
    width, mlp_width, layers, heads, key_heads = MODELS[name]
    eager = {"attn_implementation": "eager"}  # Not in the signature that type checkers see.
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=max(LENGTHS),
        **eager,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
        tokens = torch.zeros(1, length, dtype=torch.long)
    if clips:
        QKClip(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        for length in LENGTHS:
            plain, clipped = (pass_flops(name, length, clips) for clips in (False, True))
            row = {"model": name, "length": length, "flops": plain, "added": clipped - plain}
            rows.append(row)
            print(f"{name}, {length} tokens: QK-clip adds {row['added'] / plain:.2%} of the FLOPs")
    if arguments.out:
        result = {
            "command": COMMAND,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
