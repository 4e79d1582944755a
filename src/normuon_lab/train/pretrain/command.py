"""`normuon train`: options and presets. A value is a flag's, else --config's, else the preset's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from normuon_lab.atomic_files import read_toml
from normuon_lab.errors import flag, require
from normuon_lab.train.pretrain.config import Hardware, PretrainConfig, merged

DEFAULT_PRESET = "llama-tiny"

PRETRAIN_PRESETS = read_toml(Path(__file__).with_name("presets.toml"))


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
    values = {**PRETRAIN_PRESETS[name], "preset": name}
    base = values.pop("base", None)
    start = PretrainConfig() if base is None else pretrain_preset(base)
    return merged(start, values, source="presets.toml")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a language model, on one process or, under torchrun, on many.

    Values come from flags, then from --config, then from --preset: llama-tiny and llama-small run
    on a CPU; gpt2-124m, gpt2-350m, llama-1.1b and llama-5.4b are the paper's.
    """

    settings: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=PretrainConfig
    )
    config: Path | None = None
    """TOML file of settings, such as the config.toml that every run saves."""
    out: Path = Path("runs/train")
    """Folder of the run: config.toml, metrics.jsonl, checkpoints and TensorBoard's files."""
    resume: str = "never"
    """auto: continue from the newest complete checkpoint of --out, if any. Or a checkpoint's
    folder. never: --out must be new."""
    dry_run: bool = False
    """Train nothing; print model, tokens, FLOPs, memory, plan and time on the hardware given."""
    json: bool = False
    """--dry-run: print it as JSON."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)

    def run(self) -> int:
        """Run the command and return its exit code."""
        require(self.dry_run or not self.json, "--json goes with --dry-run")
        for given in fields(Hardware):
            is_default = getattr(self.hardware, given.name) == given.default
            require(
                self.dry_run or is_default,
                f"{flag(given.name)} goes with --dry-run"
                + ("; torchrun starts the ranks of a run" if given.name == "num_ranks" else ""),
            )
        from rich.console import Console

        if self.dry_run:
            from normuon_lab.train.pretrain.dry_run import dry_run, print_dry_run

            contents = dry_run(self.settings, self.hardware)
            if self.json:
                print(json.dumps(contents))
            else:
                print_dry_run(contents, Console())
            return 0
        from normuon_lab.train.pretrain.training import train

        train(self.settings, self.out, resume=self.resume, console=Console())
        return 0


def default_command(words: Sequence[str]) -> Train:
    """The command from the preset and the file, before the other flags are read.

    Raises:
        InputError: an unknown preset, or a file that cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--preset", nargs="?")
    given, _ = parser.parse_known_args(words)
    values = {}
    if given.config is not None:
        values = read_toml(Path(given.config), what=f"--config {given.config}")
    preset = given.preset or values.get("preset", DEFAULT_PRESET)
    require(isinstance(preset, str), f"--config {given.config}: preset is not a name")
    settings = merged(pretrain_preset(preset), values, source=f"--config {given.config}")
    return Train(settings=settings)
