"""Where settings come from: flags, then a file, then the preset; and what of them may change."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from normuon_lab.cli import main, parse
from normuon_lab.errors import InputError
from normuon_lab.train.loop import learning_rate_factor
from normuon_lab.train.pretrain.checkpoint import begin
from normuon_lab.train.pretrain.command import PRETRAIN_PRESETS, Train, pretrain_preset
from normuon_lab.train.pretrain.config import (
    BatchConfig,
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    merged,
    trajectory,
)
from normuon_lab.train.pretrain.parallel import mesh_shape
from tests.lab.train.pretrain.processes import Job


def settings(*words: object) -> PretrainConfig:
    command = parse(["train", *map(str, words)])
    assert isinstance(command, Train)
    return command.settings


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "llama-small"\n[batch]\nsteps = 777\nbatch_size = 32\n[data]\nworkers = 0\n'
    )
    found = settings("--config", file, "--batch-size", 64, "--data.seed", 5)
    small = pretrain_preset("llama-small")
    assert found.batch.batch_size == 64
    assert found.batch.steps == 777
    assert found.batch.sequence_length == small.batch.sequence_length
    assert found.model == small.model
    assert (found.data.workers, found.data.seed, found.seed) == (0, 5, 0)
    # A flag names the preset before the file does.
    assert settings("--config", file, "--preset", "gpt2-124m").model.model == "gpt2-124m"


@pytest.mark.parametrize("name", PRETRAIN_PRESETS)
def test_what_a_run_saves_is_read_again_as_it_was(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(
        pretrain_preset(name),
        seed=3,
        metrics=MetricsConfig(trackers=("wandb",), diagnose="every=7", device_tflops=1.5),
        optimizer=dataclasses.replace(pretrain_preset(name).optimizer, betas=(0.7, 0.8)),
    )
    begin(tmp_path, config)
    assert settings("--config", tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[batch]\nstep = 3\n", "unknown key batch.step; known are steps, batch_size"),
        ("[bath]\nsteps = 3\n", "unknown key bath; known are preset, seed"),
        ("[batch]\nsteps = 3.5\n", "batch.steps = 3.5: give a value of type int"),
        ("[batch]\nsteps = true\n", "batch.steps = True: give a value of type int"),
        ("batch = 3\n", "batch is a section, not a value"),
        ("[schedule]\nschedule = 'cosine'\n", "choose from linear, wsd"),
        ("[optimizer]\nbetas = [0.9]\n", "optimizer.betas = [0.9]: give a list of 2 values"),
        ("[optimizer]\nlr = -1.0\n", "lr -1.0: give a positive number"),
        ("preset = 'gpt5'\n", "unknown preset gpt5"),
        ("steps = = 3", "is not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file, out = tmp_path / "bad.toml", tmp_path / "run"
    file.write_text(text)
    assert main(["train", "--config", str(file), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot read --config nowhere.toml: No such file"):
        settings("--config", "nowhere.toml")


def test_whole_numbers_are_taken_for_rates() -> None:
    found = merged(PretrainConfig(), {"optimizer": {"lr": 1, "adam_lr": 2}}, source="file")
    assert (found.optimizer.lr, found.optimizer.adam_lr) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchConfig(steps=0), "steps 0: give at least 1"),
        (lambda: OptimizerConfig(arm="sgd"), "unknown arm 'sgd': choose from adamw, muon"),
        (
            lambda: OptimizerConfig(arm="muon", equilibrate=True),
            "--equilibrate is an option of NorMuon: leave it out with --arm muon",
        ),
        (
            lambda: OptimizerConfig(arm="adamw", momentum_dtype="int8"),
            "--momentum-dtype is an option of NorMuon: leave it out with --arm adamw",
        ),
        (lambda: OptimizerConfig(lr=float("nan")), "lr nan: give a positive number"),
        (lambda: OptimizerConfig(momentum=1.0), "momentum 1.0: give a number from 0 to below 1"),
        (lambda: CheckpointConfig(keep_last=-1), "--keep-last -1: give at least 0"),
        (lambda: MetricsConfig(diagnose="often"), "give every=N, such as every=100, or off"),
        (lambda: MetricsConfig(trackers=("mlflow",)), "unknown tracker 'mlflow'"),
        (lambda: PretrainConfig(batch=BatchConfig(steps=5)), "--warmup-steps 10: give fewer than"),
    ],
)
def test_a_value_out_of_range_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make()


def test_a_flag_out_of_range_is_one_line(tmp_path: Path) -> None:
    outcome = Job(["train", "--lr", -1], tmp_path).wait()
    assert outcome.codes == (2,)
    (said,) = outcome.stderr
    assert said == "normuon: error: --lr -1.0: give a positive number (see normuon train --help)\n"


def test_the_slurm_example_asks_for_what_there_is() -> None:
    script = (Path(__file__).parents[4] / "examples" / "slurm" / "train.sbatch").read_text()
    command = script.partition("-m normuon_lab train")[2].partition("&\n")[0]
    found = settings(*shlex.split(command.replace("\\\n", " ")))
    assert found.preset == "llama-1.1b"
    # The script's nodes and GPUs, in copies of one node each.
    nodes, gpus = (int(re.search(rf"--{n}=(\d+)", script)[1]) for n in ("nodes", "gpus-per-node"))
    assert mesh_shape(found.parallel, world_size=nodes * gpus) == (4, 8, 1)


def test_only_what_computes_the_same_numbers_may_change_on_resuming() -> None:
    config = PretrainConfig()
    values = config.to_values()
    free = dataclasses.replace(
        config,
        preset="llama-small",
        batch=dataclasses.replace(config.batch, micro_batch_size=2),
        data=dataclasses.replace(config.data, source=("moved",)),
        checkpoint=CheckpointConfig(save_every=7),
        metrics=MetricsConfig(log_every=5),
    )
    assert trajectory(free.to_values()) == trajectory(values)
    for section, change in (
        ("batch", {"batch_size": 32}),
        ("optimizer", {"lr": 1.0}),
        ("schedule", {"warmup_steps": 3}),
        ("data", {"tokenizer": "other"}),
    ):
        changed = dataclasses.replace(getattr(config, section), **change)
        other = dataclasses.replace(config, **{section: changed})
        assert trajectory(other.to_values()) != trajectory(values), section


def factors(schedule: ScheduleConfig, steps: int) -> list[float]:
    decay = schedule.decay_steps(steps)
    return [
        learning_rate_factor(t, steps=steps, warmup_steps=schedule.warmup_steps, decay_steps=decay)
        for t in range(steps)
    ]


def test_warmup_stable_decay_and_linear_schedules() -> None:
    wsd = ScheduleConfig(schedule="wsd", warmup_steps=4, decay_fraction=0.5)
    found = factors(wsd, 20)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    linear = ScheduleConfig(warmup_steps=10)
    found = factors(linear, 20)
    assert found[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert found[10:] == pytest.approx([1 - 0.1 * step for step in range(10)])
    none = ScheduleConfig(schedule="wsd", warmup_steps=0, decay_fraction=0.0)
    assert set(factors(none, 5)) == {1.0}
