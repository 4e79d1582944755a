"""Named training runs: the paper's four models with its figures, and small ones that run anywhere.

The models' sizes are those of `normuon_lab.plan.presets`; here is how they are trained. Where the
paper says nothing, a comment does.
"""

from __future__ import annotations

import math

from normuon_lab.data.config import DataConfig
from normuon_lab.errors import require
from normuon_lab.train.pretrain.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)

DEFAULT_PRESET = "llama-tiny"

# modded-nanogpt's runs of 6,200 steps decay over the last 1,800 and do not warm up; the paper names
# the kind of the schedule and its length only.
_WSD_DECAY_FRACTION = 1800 / 6200

_LONG_RUN_CHECKPOINTS = CheckpointConfig(
    save_every=500, keep_last=3, keep_every=5000, async_checkpoint=True
)


def _paper_llama(name: str, *, depth: int, micro_batch_size: int) -> PretrainConfig:
    """50B tokens in batches of 2M, 1B of them warmup, linear decay; depth-muP's learning rate.

    The paper's rate is 4e-4 at depth 16, scaled by 1 / sqrt(depth).
    """
    sequence_length, batch_size = 4096, 512
    tokens_per_step = sequence_length * batch_size
    return PretrainConfig(
        preset=name,
        model=ModelConfig(model=name, activation_checkpointing=True),
        batch=BatchConfig(
            steps=round(50e9 / tokens_per_step),
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
        ),
        optimizer=OptimizerConfig(lr=4e-4 * math.sqrt(16 / depth)),
        schedule=ScheduleConfig(schedule="linear", warmup_steps=round(1e9 / tokens_per_step)),
        # The tokenizer is not the paper's word: an open copy of Llama's, of 32,000 tokens.
        data=DataConfig(
            source=("hub:cerebras/SlimPajama-627B",), tokenizer="TinyLlama/TinyLlama_v1.1"
        ),
        evaluation=EvaluationConfig(eval_every=250, eval_tokens=10 * 2**20),
        checkpoint=_LONG_RUN_CHECKPOINTS,
        metrics=MetricsConfig(log_every=10),
    )


def _paper_gpt2(name: str, *, steps: int, optimizer: OptimizerConfig) -> PretrainConfig:
    """512 sequences of 1,024 tokens, warmup-stable-decay."""
    return PretrainConfig(
        preset=name,
        model=ModelConfig(model=name),
        batch=BatchConfig(steps=steps, batch_size=512, micro_batch_size=32, sequence_length=1024),
        optimizer=optimizer,
        schedule=ScheduleConfig(schedule="wsd", warmup_steps=0, decay_fraction=_WSD_DECAY_FRACTION),
        data=DataConfig(source=("hub:HuggingFaceFW/fineweb:sample-10BT",), tokenizer="gpt2"),
        evaluation=EvaluationConfig(eval_every=125, eval_tokens=10 * 2**20),
        checkpoint=_LONG_RUN_CHECKPOINTS,
        metrics=MetricsConfig(log_every=10),
    )


PRETRAIN_PRESETS: dict[str, PretrainConfig] = {
    # A few seconds on one core: to try the command, and for tests.
    "llama-tiny": PretrainConfig(),
    # Minutes to hours on a CPU.
    "llama-small": PretrainConfig(
        preset="llama-small",
        model=ModelConfig(model="llama-small"),
        batch=BatchConfig(steps=2000, batch_size=16, micro_batch_size=8, sequence_length=256),
        optimizer=OptimizerConfig(lr=2e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        evaluation=EvaluationConfig(eval_every=250, eval_tokens=32_768),
        checkpoint=CheckpointConfig(save_every=250),
    ),
    "gpt2-124m": _paper_gpt2(
        "gpt2-124m", steps=6200, optimizer=OptimizerConfig(lr=3.6e-4, adam_lr=3.6e-3)
    ),
    # Norms and biases have no rate in the paper and take the head's. The model is transformers'
    # GPT-2, whose head is tied to the embedding: the one matrix takes the head's rate, since the
    # embedding's would be a hundred times too large for a head.
    "gpt2-350m": _paper_gpt2(
        "gpt2-350m",
        steps=7500,
        optimizer=OptimizerConfig(
            lr=7.5e-4, adam_lr=3e-3, embedding_lr=0.3, head_lr=3e-3, betas=(0.8, 0.95)
        ),
    ),
    "llama-1.1b": _paper_llama("llama-1.1b", depth=16, micro_batch_size=4),
    "llama-5.4b": _paper_llama("llama-5.4b", depth=28, micro_batch_size=2),
}


def pretrain_preset(name: str) -> PretrainConfig:
    """The configuration of a named run.

    Raises:
        InputError: there is no such preset; lists them.

    Example:
        >>> pretrain_preset("llama-1.1b").batch.tokens_per_step
        2097152
    """
    require(
        name in PRETRAIN_PRESETS,
        f"unknown preset {name}; known are {', '.join(PRETRAIN_PRESETS)}",
    )
    return PRETRAIN_PRESETS[name]
