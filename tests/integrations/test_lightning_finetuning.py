"""Layers unfrozen in the middle of a run, by Lightning's own callback."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon, param_groups

pytest.importorskip("lightning")
import lightning
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

from normuon.integrations.lightning import unfreeze_and_add_param_groups


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU())
        self.neck = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.neck(self.backbone(x)).relu()), y)

    def configure_optimizers(self):
        return NorMuon(param_groups(self), lr=1e-2)


class Unfreeze(BaseFinetuning):
    """The backbone joins from epoch 1 on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch >= 1:  # A resumed run has frozen the backbone again.
            unfreeze_and_add_param_groups(pl_module, pl_module.backbone, optimizer)


def data():
    torch.manual_seed(1)
    inputs = torch.randn(32, 8)
    dataset = torch.utils.data.TensorDataset(inputs, inputs[:, :4].argmax(-1))
    return torch.utils.data.DataLoader(dataset, batch_size=8)


def trained(epochs, folder, resume=None):
    module = Classifier()
    start = {name: param.detach().clone() for name, param in module.named_parameters()}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Unfreeze(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )
    trainer.fit(module, data(), ckpt_path=resume, weights_only=False if resume else None)
    moved = {
        name
        for name, param in module.named_parameters()
        if not torch.equal(param.detach(), start[name])
    }
    return module, trainer, moved


def test_unfrozen_layers_take_the_algorithms_of_the_whole_model(tmp_path):
    _, _, moved = trained(1, tmp_path)
    assert moved == {"neck.weight", "neck.bias", "head.weight", "head.bias"}
    module, trainer, moved = trained(2, tmp_path)
    assert moved == set(dict(module.named_parameters()))
    (optimizer,) = trainer.optimizers
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert groups["backbone.0.weight"]["algorithm"] == "normuon"
    assert groups["backbone.1.weight"]["algorithm"] == "adamw"
    assert groups["head.weight"]["algorithm"] == "adamw"
    assert groups["backbone.0.weight"]["lr"] == groups["backbone.0.bias"]["lr"] == 1e-3


def test_a_run_goes_on_from_after_the_unfreezing(tmp_path):
    whole, _, _ = trained(3, tmp_path / "whole")
    trained(2, tmp_path / "cut")
    resumed, trainer, _ = trained(3, tmp_path / "cut", resume=str(tmp_path / "cut/epoch=1.ckpt"))
    assert len(trainer.optimizers[0].param_groups) == 4
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_trained_already_is_not_added_again(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = NorMuon(param_groups(model), lr=1e-2)
    before = len(optimizer.param_groups)
    unfreeze_and_add_param_groups(model, [model[0], model[1]], optimizer)
    assert len(optimizer.param_groups) == before


def test_lightnings_own_function_says_what_to_do(tmp_path):
    """Bare parameters, of which nothing says what they are."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = NorMuon(param_groups(model), lr=1e-2)
    with pytest.raises(ValueError, match=r"let normuon.param_groups\(model\) decide"):
        BaseFinetuning.unfreeze_and_add_param_group(model[0], optimizer)
