"""The flags that say what is trained, shared by the subcommands that run small experiments."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from normuon_lab.errors import require
from normuon_lab.train.runs.config import Experiment, ModelConfig, TrainConfig

_MODEL = ModelConfig()
_TRAINING = TrainConfig()
_BPE_VOCAB_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What is trained, shared by subcommands."""

    data: tuple[str, ...] = ("stdlib",)
    """Text to train on: stdlib (the running Python's library), shakespeare, or text files."""
    tokenizer: str = "bytes"
    """Tokens: bytes, or bpe, made from the training part of the text."""
    vocab_size: int | None = None
    """Tokens of the BPE; 1024 unless given."""
    steps: int = _TRAINING.steps
    """Optimizer steps of each run."""
    batch_size: int = _TRAINING.batch_size
    """Sequences per step."""
    warmup_fraction: float = _TRAINING.warmup_fraction
    """Share of the steps over which the learning rate rises; it falls linearly to 0 after."""
    evals: int = _TRAINING.num_evals
    """Evaluations per run, evenly spread, besides the one before the first step."""
    eval_tokens: int = _TRAINING.eval_tokens
    """Held-out tokens that each evaluation reads, the same in every run."""
    model: str = _MODEL.family
    """Architecture: llama or gpt2."""
    layers: int = _MODEL.num_layers
    """Transformer layers."""
    width: int = _MODEL.width
    """Width of the residual stream."""
    heads: int = _MODEL.num_heads
    """Attention heads."""
    mlp_width: int = _MODEL.mlp_width
    """Width of the MLP."""
    sequence_length: int = _MODEL.sequence_length
    """Tokens per sequence."""
    weights: str = "float32"
    """Dtype in which the model is stored and computed: float32 or bfloat16."""
    compile: bool = False
    """Use torch.compile; needs a C++ compiler, and was no faster for the default model."""

    def experiment(self) -> Experiment:
        """The validated experiment."""
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        require(
            not self.compile or any(shutil.which(compiler) for compiler in compilers),
            "--compile needs a C++ compiler, and none was found: install g++ or leave it out",
        )
        return Experiment(
            model=ModelConfig(
                family=self.model,
                num_layers=self.layers,
                width=self.width,
                num_heads=self.heads,
                mlp_width=self.mlp_width,
                sequence_length=self.sequence_length,
                vocab_size=self._vocab_size(),
            ),
            training=TrainConfig(
                steps=self.steps,
                batch_size=self.batch_size,
                warmup_fraction=self.warmup_fraction,
                num_evals=self.evals,
                eval_tokens=self.eval_tokens,
            ),
            data=self.data,
            tokenizer=self.tokenizer,
            weights=self.weights,
            compile=self.compile,
        )

    def _vocab_size(self) -> int:
        if self.vocab_size is not None:
            return self.vocab_size
        return _BPE_VOCAB_SIZE if self.tokenizer == "bpe" else _MODEL.vocab_size
