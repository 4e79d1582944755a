"""Where a framework meets the optimizer: other ways in, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon, param_groups
from tests.distributed.conftest import ranks  # noqa: F401


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))


def fsdp1_refusals(rank: int, world_size: int, *, use_orig_params: bool) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrapped(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    messages = []
    model = wrapped(small_model())
    try:
        param_groups(model)
    except ValueError as error:
        messages.append(str(error))
    try:
        NorMuon([{"params": model.parameters(), "algorithm": "adamw"}])
    except ValueError as error:
        messages.append(str(error))
    if use_orig_params:  # Otherwise the parameters that the optimizer has are nobody's any more.
        model = small_model()
        optimizer = NorMuon(param_groups(model))
        model = wrapped(model)
        model(torch.ones(2, 6)).sum().backward()
        try:
            optimizer.step()
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_on_every_rank(ranks, use_orig_params):  # noqa: F811
    """By groups, by the optimizer, and by an optimizer that was built before FSDP1 came."""
    for messages in ranks.run(fsdp1_refusals, 2, use_orig_params=use_orig_params):
        assert len(messages) == (3 if use_orig_params else 2)
        assert all("FSDP1 flattens matrices away" in message for message in messages), messages


def test_the_trainer_takes_a_built_optimizer_with_a_schedule(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = NorMuon(param_groups(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    tokens = torch.arange(16)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=3, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


def test_the_trainers_own_groups_are_refused_with_the_mend(tmp_path):
    """Without "params" the Trainer would put vectors among matrices."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer = transformers.Trainer(
        model=small_model(),
        args=transformers.TrainingArguments(str(tmp_path), report_to=[]),
        optimizer_cls_and_kwargs=(NorMuon, {"lr": 1e-3}),
    )
    with pytest.raises(ValueError, match=r"let normuon\.param_groups\(model\) decide$"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("config", "manager", "message"),
    [
        ({"early_step_in_backward": True}, None, r"^optimizer\.early_step_in_backward steps each"),
        ({}, True, r"^fault_tolerance\.enable is not supported with NorMuon"),
    ],
)
def test_torchtitans_other_containers_are_refused(config, manager, message):
    pytest.importorskip("torchtitan")
    from types import SimpleNamespace

    from torchtitan.config import Optimizer

    from normuon.integrations.torchtitan import build_optimizers

    ft_manager = SimpleNamespace(enabled=True) if manager else None
    with pytest.raises(ValueError, match=message):
        build_optimizers([small_model()], Optimizer(**config), None, ft_manager)


def test_torchtitans_config_and_options_reach_each_parts_groups():
    pytest.importorskip("torchtitan")
    from torchtitan.config import Optimizer

    from normuon.integrations.torchtitan import build_optimizers

    config = Optimizer(lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.05)
    parts = [small_model(), small_model()]
    container = build_optimizers(parts, config, None, overrides={"1.weight": "muon"}, ns_steps=3)
    assert len(container) == 2
    for part, optimizer in zip(parts, container, strict=True):
        algorithms = [group["algorithm"] for group in optimizer.param_groups]
        assert algorithms == ["normuon", "muon", "adamw"]
        assert optimizer.param_groups[0]["params"] == [part[0].weight]
        for group in optimizer.param_groups:
            assert (group["lr"], group["betas"], group["adamw_eps"]) == (1e-3, (0.8, 0.9), 1e-6)
            assert group["ns_steps"] == 3
        assert optimizer.param_groups[0]["weight_decay"] == 0.05
