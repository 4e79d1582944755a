"""Statistics of steps in TensorBoard, the Trainer's logs and Lightning's loggers, the real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon, param_groups
from normuon.integrations.loggers import log_statistics

FIGURE = "normuon/group0.normuon/update_rms"


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    return model, NorMuon(param_groups(model), lr=1e-3)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


def written(folder):
    """Values by tag and step, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_every_nth_step_until_it_is_removed(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = model_and_optimizer()
    with SummaryWriter(str(tmp_path)) as writer:
        handle = log_statistics(optimizer, writer, every=3, per_matrix=True, step=10)
        train(model, optimizer, 6)  # Steps 11 to 16.
        handle.remove()
        train(model, optimizer, 4)
    values = written(tmp_path)
    assert values[FIGURE] == pytest.approx({12: 2e-4, 15: 2e-4}, rel=1e-5)
    assert set(values["normuon/1.weight/effective_rank"]) == {12, 15}
    assert 1 <= values["normuon/1.weight/effective_rank"][15] <= 16
    assert "normuon/group1.adamw/update_to_weight" in values
    assert "normuon/group1.adamw/effective_rank" not in values


def test_a_function_gets_the_numbers_and_the_step():
    model, optimizer = model_and_optimizer()
    seen = []
    log_statistics(optimizer, lambda numbers, step: seen.append((step, numbers)), every=2)
    train(model, optimizer, 5)
    assert [step for step, _ in seen] == [2, 4]
    assert all(isinstance(value, float) for _, numbers in seen for value in numbers.values())
    assert not any("0.weight" in name for name in seen[0][1])


def test_two_loggers_do_not_disturb_each_other_or_the_users_own():
    model, optimizer = model_and_optimizer()
    seen = {2: [], 3: []}
    for every, steps in seen.items():
        log_statistics(optimizer, lambda _, step, steps=steps: steps.append(step), every=every)
    optimizer.record_statistics(every=5)
    train(model, optimizer, 6)
    assert seen == {2: [2, 4, 6], 3: [3, 6]}
    assert optimizer.statistics().step == 6
    train(model, optimizer, 1)
    assert optimizer.statistics().step == 6, "steps 1, 6, 11 are the user's"


def test_other_optimizers_are_refused():
    _, optimizer = model_and_optimizer()
    with pytest.raises(
        TypeError, match=r"only NorMuon has statistics, but this optimizer is a SGD"
    ):
        log_statistics(torch.optim.SGD([nn.Parameter(torch.ones(2))]), print)
    with pytest.raises(ValueError, match=r"every=0 must be at least 1"):
        log_statistics(optimizer, print, every=0)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def trainer_of(folder, optimizer_cls_and_kwargs=None, **options):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from normuon.integrations.transformers import trainer_optimizer

    given = {
        "max_steps": 5,
        "logging_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    args = TrainingArguments(str(folder), **given)
    tokens = [torch.arange(i, i + 16) for i in range(48)]
    return Trainer(
        model=llama(),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs or trainer_optimizer(args, quiet=True),
    )


def test_the_trainers_log_and_its_tensorboard_have_them(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from normuon.integrations.transformers import log_statistics as log_trainer

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(
        tmp_path / "run",
        report_to=["tensorboard"],
        gradient_accumulation_steps=2,
    )
    log_trainer(trainer, per_matrix=True)
    trainer.train()
    logged = {e["step"]: e[FIGURE] for e in trainer.state.log_history if FIGURE in e}
    assert logged == pytest.approx({2: 2e-4, 4: 2e-4}, rel=1e-4)
    values = written(next((tmp_path / "events").rglob("events*")).parent)
    assert values[f"train/{FIGURE}"] == pytest.approx({2: 2e-4, 4: 2e-4}, rel=1e-4)
    name = "train/normuon/model.layers.0.mlp.up_proj.weight/momentum_row_spread"
    assert set(values[name]) == {2, 4}


def test_a_resumed_trainer_logs_at_the_same_steps(tmp_path):
    from normuon.integrations.transformers import log_statistics as log_trainer

    def logged(trainer):
        return {e["step"]: e[FIGURE] for e in trainer.state.log_history if FIGURE in e}

    saving = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "no"}
    whole = trainer_of(tmp_path, **saving)
    log_trainer(whole, every=2)
    whole.train()
    resumed = trainer_of(tmp_path, **saving)
    log_trainer(resumed, every=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert set(logged(whole)) == {2, 4}
    assert logged(resumed)[4] == logged(whole)[4]


def test_a_trainer_of_another_optimizer_or_a_fraction_of_steps_is_refused(tmp_path):
    from normuon.integrations.transformers import log_statistics as log_trainer

    other = trainer_of(tmp_path, (torch.optim.SGD, {"lr": 1e-3}))
    log_trainer(other, every=1)
    with pytest.raises(TypeError, match="this optimizer is a AcceleratedOptimizer"):
        other.train()
    with pytest.raises(ValueError, match=r"every=None, with logging_steps=0.5, must be a whole"):
        log_trainer(trainer_of(tmp_path, logging_steps=0.5))


def lightning_trained(folder, callback, optimizers_of):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers, _ = model_and_optimizer()

        def training_step(self, batch, _):
            return self.layers(batch).square().mean()

        def configure_optimizers(self):
            return optimizers_of(self)

    trainer = lightning.Trainer(
        max_steps=5,
        log_every_n_steps=2,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4)
    trainer.fit(Module(), data)
    return trainer


def test_lightnings_logger_and_metrics_have_them(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("lightning")
    from normuon.integrations.lightning import statistics_callback

    trainer = lightning_trained(
        tmp_path, statistics_callback(per_matrix=True), lambda module: module_optimizer(module)
    )
    values = written(trainer.logger.log_dir)
    assert values[FIGURE] == pytest.approx({2: 2e-4, 4: 2e-4}, rel=1e-4)
    assert set(values["normuon/layers.1.weight/dead_rows"]) == {2, 4}
    assert float(trainer.callback_metrics[FIGURE]) == pytest.approx(2e-4, rel=1e-4)


def module_optimizer(module):
    return NorMuon(param_groups(module), lr=1e-3)


def test_lightning_with_another_optimizer_says_so(tmp_path):
    pytest.importorskip("lightning")
    from normuon.integrations.lightning import statistics_callback

    with pytest.raises(TypeError, match="only NorMuon has statistics, but this optimizer is a SGD"):
        lightning_trained(
            tmp_path,
            statistics_callback(every=1),
            lambda module: torch.optim.SGD(module.parameters(), lr=1e-3),
        )
