"""axolotl and LLaMA-Factory, whose plugins are a few lines: see docs/how-to/frameworks.md.

Both pin older versions of what the other tests need, so that `make install` leaves them out; these
tests run where one of them is installed, if only with `pip install --no-deps`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon, param_groups
from normuon.integrations.transformers import trainer_optimizer

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_an_axolotl_plugin_hands_it_to_axolotls_trainer(tmp_path):
    """axolotl calls `post_trainer_create` of each plugin before it trains."""
    base = pytest.importorskip("axolotl.integrations.base")
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from transformers import LlamaConfig, LlamaForCausalLM

    class NorMuonPlugin(base.BasePlugin):
        def post_trainer_create(self, cfg, trainer):
            trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args, quiet=True)

    torch.manual_seed(0)
    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=3e-4,
        weight_decay=0.07,
        lr_scheduler_type="linear",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = AxolotlTrainer(model=LlamaForCausalLM(LlamaConfig(**LLAMA)), args=args)
    manager = base.PluginManager.get_instance()
    manager.plugins["normuon"] = NorMuonPlugin()
    manager.post_trainer_create({}, trainer)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    assert isinstance(trainer.optimizer, NorMuon)
    by_algorithm = {group["algorithm"]: group for group in trainer.optimizer.param_groups}
    assert set(by_algorithm) == {"normuon", "adamw"}
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {3e-4}
    assert by_algorithm["normuon"]["weight_decay"] == 0.07
    assert trainer.lr_scheduler.optimizer is trainer.optimizer


def test_a_llama_factory_plugin_is_a_function_of_the_model():
    """LLaMA-Factory v1 calls it with the model and the `optim_config` of its YAML file."""
    plugins = pytest.importorskip("llamafactory.v1.plugins.trainer_plugins.optimizer")
    from llamafactory.v1.config.arg_utils import get_plugin_config

    @plugins.OptimizerPlugin("normuon").register()
    def normuon_optimizer(model, config):
        return NorMuon(param_groups(model), lr=config["lr"], weight_decay=config["weight_decay"])

    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 2))
    config = get_plugin_config({"name": "normuon", "lr": 3e-4, "weight_decay": 0.1})
    optimizer = plugins.OptimizerPlugin(config.name)(model, config)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
