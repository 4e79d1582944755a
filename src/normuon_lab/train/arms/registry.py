"""The optimizers that are compared, each a name and a way to build plain torch optimizers.

Every arm takes the same partition of the model, `normuon.param_groups`': hidden matrices on one
side, embeddings, head, norms and biases on the other, and one peak learning rate for both unless
`ArmOptions` says otherwise. To add an arm, write its builder and list it in `ARMS`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import require
from normuon_lab.train.arms.options import DEFAULT_OPTIONS, ArmOptions

# The names of the arms are needed before training is, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    Builder = Callable[[nn.Module, float, ArmOptions], list[Optimizer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One optimizer of the comparison.

    Attributes:
        name: what `--arms` calls it.
        label: what the report calls it.
        description: one line for the report's configuration table.
        builder: what `build` calls.
        takes_normuon_options: whether `ArmOptions.normuon` may say anything.
        pretrains: whether `normuon train` offers it: it steps sharded parameters, and its state
            exists from the start and fits a checkpoint. Rivals are for comparisons on one device.
    """

    name: str
    label: str
    description: str
    builder: Builder
    takes_normuon_options: bool = False
    pretrains: bool = True

    def build(
        self, model: nn.Module, lr: float, options: ArmOptions = DEFAULT_OPTIONS
    ) -> list[Optimizer]:
        """The plain torch optimizers that step a model together.

        Args:
            model: what they train.
            lr: peak learning rate, of steps of AdamW's size: those of hidden matrices have an RMS
                of about 0.2 lr in every arm but `hyperball`, whose norm is lr times the weights'.
            options: the other hyperparameters.

        Raises:
            InputError: `options.normuon` or `split_heads` for an arm that is not NorMuon, or a
                keyword that NorMuon does not take.
        """
        given = [keyword for keyword, _ in options.normuon]
        given += ["split_heads"] if options.split_heads else []
        require(
            self.takes_normuon_options or not given,
            f"the arm {self.name!r} is not normuon.NorMuon and does not take its options; got "
            + ", ".join(given),
        )
        _check_normuon_keywords([keyword for keyword, _ in options.normuon])
        return self.builder(model, lr, options)


def _check_normuon_keywords(given: Sequence[str]) -> None:
    if not given:
        return
    from normuon import NorMuon

    # The arm itself gives the other three.
    known = [*inspect.signature(NorMuon).parameters.keys() - {"params", "lr", "weight_decay"}]
    for name in given:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
        require(name in known, f"no arm takes {name} as an option of normuon.NorMuon; {hint}")


def _build_adamw(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    from torch.optim import AdamW

    from normuon_lab.train.arms.parameters import adamw_groups, split_parameters, tensors

    hidden, other = split_parameters(model)
    groups = [
        {"params": tensors(hidden), "weight_decay": options.weight_decay},
        *adamw_groups(model, other, lr, options),
    ]
    return [AdamW(groups, lr=lr, betas=options.betas)]


def _build_muon(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    from torch.optim import AdamW, Muon

    from normuon_lab.train.arms.parameters import adamw_groups, split_parameters, tensors

    hidden, other = split_parameters(model)
    return [
        Muon(
            tensors(hidden),
            lr=lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(adamw_groups(model, other, lr, options), lr=lr, betas=options.betas),
    ]


def _build_normuon(
    model: nn.Module,
    lr: float,
    options: ArmOptions,
    *,
    algorithm: str = "normuon",
    split_heads: bool = False,
    **fixed: Any,
) -> list[Optimizer]:
    """`normuon.NorMuon` with the keyword arguments `fixed`, which `options.normuon` overrules.

    Hidden matrices take `algorithm`, those of attention heads each on their own if `split_heads`.
    With ``adjust_lr_fn="original"`` the learning rate of hidden matrices is the one at which steps
    are as large as the paper's scaling makes them, and the decay of a step stays what it was.
    """
    import torch

    from normuon import NorMuon, param_groups, suggest_lr
    from normuon_lab.train.arms.parameters import other_rates, split_parameters

    _, other = split_parameters(model)
    groups = [
        {**group, "algorithm": algorithm}
        for group in param_groups(model, split_heads=split_heads or options.split_heads)
        if group["algorithm"] != "adamw"
    ]
    keywords = {
        "momentum": options.momentum,
        "beta2": options.beta2,
        "betas": options.betas,
        "ns_dtype": options.ns_dtype,
        **fixed,
        **dict(options.normuon),
    }
    if isinstance(keywords.get("momentum_dtype"), str):  # As options and JSON files spell it.
        keywords["momentum_dtype"] = getattr(torch, keywords["momentum_dtype"])
    ratio = 1.0
    if keywords.get("adjust_lr_fn") == "original":
        ratio = 1 / suggest_lr(1.0, coming_from="muon_original", to=groups)
    for rate, parameters in other_rates(model, other, lr, options).items():
        groups.append({"params": parameters, "algorithm": "adamw", "lr": rate, "weight_decay": 0.0})
    return [NorMuon(groups, lr=lr * ratio, weight_decay=options.weight_decay / ratio, **keywords)]


def _build_adam_mini(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    from normuon_lab.train.arms.adam_mini import build_adam_mini

    return build_adam_mini(model, lr, options)


def _rival(module: str, name: str, **fixed: Any) -> Builder:
    """Builds a class of `normuon_lab.train.arms` for hidden matrices, and AdamW for the rest."""

    def build(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
        from torch.optim import AdamW

        from normuon import param_groups
        from normuon_lab.train.arms.parameters import adamw_groups, split_parameters

        rival = getattr(importlib.import_module(f"normuon_lab.train.arms.{module}"), name)
        _, other = split_parameters(model)
        groups = [
            {key: group[key] for key in ("params", "view") if key in group}
            for group in param_groups(model)
            if group["algorithm"] != "adamw"
        ]
        return [
            rival(
                groups,
                lr=lr,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                beta2=options.beta2,
                betas=options.betas,
                **fixed,
            ),
            AdamW(adamw_groups(model, other, lr, options), lr=lr, betas=options.betas),
        ]

    return build


def _build_ema_nesterov(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    """Muon and AdamW, and what looks ahead of both."""
    from normuon_lab.train.arms.ema_nesterov import EmaNesterov

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*_build_muon(model, lr, options), EmaNesterov(parameters)]


MAIN_ARMS = ("adamw", "muon", "normuon")
"""What subcommands compare and tune unless they are told otherwise."""

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            name="adamw",
            label="AdamW",
            description="torch.optim.AdamW for every parameter",
            builder=_build_adamw,
        ),
        Arm(
            name="muon",
            label="Muon",
            description='torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for hidden matrices, '
            "torch.optim.AdamW for the rest",
            builder=_build_muon,
        ),
        Arm(
            name="normuon",
            label="NorMuon",
            description="normuon.NorMuon: NorMuon for hidden matrices, AdamW for the rest",
            builder=_build_normuon,
            takes_normuon_options=True,
        ),
        Arm(
            name="normuon-original",
            label="NorMuon, original",
            description='normuon.NorMuon(adjust_lr_fn="original"), the scaling of the authors\' '
            "released code, its learning rate and decay converted to steps of AdamW's size",
            builder=partial(_build_normuon, adjust_lr_fn="original"),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="normuon-short",
            label="NorMuon, short axis",
            description='normuon.NorMuon(neuron_axis="short"): columns of wide matrices scaled, '
            "rows of the others",
            builder=partial(_build_normuon, neuron_axis="short"),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="normuon-heads",
            label="NorMuon + heads",
            description="normuon.NorMuon on param_groups(split_heads=True): every attention head's "
            "queries, keys and values a matrix of its own",
            builder=partial(_build_normuon, split_heads=True),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="normuon-equilibrated",
            label="NorMuon + equilibration",
            description="normuon.NorMuon(equilibrate=True): rows and columns evened before the "
            "orthogonalisation",
            builder=partial(_build_normuon, equilibrate=True),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="normuon-heads-equilibrated",
            label="NorMuon + heads + equilibration",
            description="normuon.NorMuon(equilibrate=True) on param_groups(split_heads=True)",
            builder=partial(_build_normuon, split_heads=True, equilibrate=True),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="muon-heads-equilibrated",
            label="Muon + heads + equilibration",
            description='the same with "algorithm": "muon", so without a scale per neuron',
            builder=partial(_build_normuon, algorithm="muon", split_heads=True, equilibrate=True),
            pretrains=False,
        ),
        Arm(
            name="normuon-kahan",
            label="NorMuon + Kahan sum",
            description="normuon.NorMuon(kahan_sum=True): what rounding takes from bfloat16 "
            "weights is kept for the next step",
            builder=partial(_build_normuon, kahan_sum=True),
            takes_normuon_options=True,
            pretrains=False,
        ),
        Arm(
            name="muon-adam",
            label="Muon + Adam",
            description="one second moment per entry after the orthogonalisation (an ablation)",
            builder=_rival("ablations", "MuonAdam"),
            pretrains=False,
        ),
        Arm(
            name="normuon-front",
            label="NorMuon, in front",
            description="neurons scaled before the orthogonalisation (an ablation)",
            builder=_rival("ablations", "NorMuonFront"),
            pretrains=False,
        ),
        Arm(
            name="normuon-tall",
            label="NorMuon, m > n only",
            description="neurons scaled in matrices with more rows than columns (an ablation)",
            builder=_rival("ablations", "NorMuonTall"),
            pretrains=False,
        ),
        Arm(
            name="muon-frobenius",
            label="Muon, fixed norm",
            description="every orthogonalised step scaled to one Frobenius norm (an ablation)",
            builder=_rival("ablations", "FrobeniusMuon"),
            pretrains=False,
        ),
        Arm(
            name="dion",
            label="Dion, rank 1/4",
            description="Dion (arXiv 2504.05295) at a quarter of the rank",
            builder=_rival("dion", "Dion", rank_fraction=0.25),
            pretrains=False,
        ),
        Arm(
            name="adam-mini",
            label="Adam-mini",
            description="pytorch_optimizer.AdamMini (arXiv 2406.16793) for every parameter: one "
            "second moment per query or key head, token or other neuron (GPT-2: hidden matrix)",
            builder=_build_adam_mini,
            pretrains=False,
        ),
        Arm(
            name="rmnp",
            label="RMNP",
            description="momentum with every row normalised, without orthogonalisation",
            builder=_rival("row_momentum", "RowMomentum"),
            pretrains=False,
        ),
        Arm(
            name="hyperball",
            label="Muon Hyperball",
            description="Muon with fixed norms of weights and steps, no decay (arXiv 2606.16899); "
            "its learning rate is relative to the weights' norm",
            builder=_rival("weight_norms", "Hyperball"),
            pretrains=False,
        ),
        Arm(
            name="muown",
            label="Muown",
            description="Adam for the row norms of weights, Muon for what is left of them "
            "(arXiv 2605.10797)",
            builder=_rival("weight_norms", "Muown"),
            pretrains=False,
        ),
        Arm(
            name="ema-nesterov",
            label="Muon + EMA-Nesterov",
            description="torch.optim.Muon and torch.optim.AdamW with gradients taken ahead, along "
            "a moving average of their steps (arXiv 2605.25395)",
            builder=_build_ema_nesterov,
            pretrains=False,
        ),
        Arm(
            name="muon-eq",
            label="MuonEq, rows",
            description="Muon with every row of the momentum normalised before the "
            "orthogonalisation (arXiv 2603.28254, variant R)",
            builder=_rival("muon_eq", "MuonEqRows"),
            pretrains=False,
        ),
    )
}


PRETRAINING_ARMS = {name: arm for name, arm in ARMS.items() if arm.pretrains}


def check_arms(names: Sequence[str]) -> None:
    """Raise `InputError` unless `names` are known arms, at least one, each once."""
    require(len(names) > 0, f"--arms names nothing: choose from {', '.join(ARMS)}")
    for name in names:
        require(name in ARMS, f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
        require(names.count(name) == 1, f"the arm {name!r} is named twice")
