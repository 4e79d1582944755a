"""The optimizers that are compared, each a name and a way to build plain torch optimizers.

Every arm takes the same partition of the model, `normuon.param_groups`': hidden matrices on one
side, embeddings, head, norms and biases on the other, and one peak learning rate for both unless
`ArmOptions` says otherwise. To add an arm, write its builder and list it in `ARMS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import require
from normuon_lab.train.arms.options import DEFAULT_OPTIONS, ArmOptions

# The names of the arms are needed before training is, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One optimizer of the comparison.

    Attributes:
        name: what `--arms` calls it.
        label: what the report calls it.
        description: one line for the report's configuration table.
        builder: the function of `builders` that `build` calls.
        fixed: further keyword arguments for it.
    """

    name: str
    label: str
    description: str
    builder: str
    fixed: Mapping[str, Any] = field(default_factory=dict)

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
        from normuon import NorMuon
        from normuon_lab.train.arms import builders

        keywords = [keyword for keyword, _ in options.normuon]
        given = [*keywords, "split_heads"] if options.split_heads else keywords
        # With another algorithm it is not NorMuon's step.
        is_normuon = self.builder == "build_normuon" and "algorithm" not in self.fixed
        require(
            is_normuon or not given,
            f"the arm {self.name!r} is not normuon.NorMuon and does not take its options; got "
            + ", ".join(given),
        )
        # The arm itself gives the other three.
        known = inspect.signature(NorMuon).parameters.keys() - {"params", "lr", "weight_decay"}
        _check_keywords(keywords, known=known)
        optimizers: list[Optimizer] = getattr(builders, self.builder)(
            model, lr, options, **self.fixed
        )
        return optimizers


def _check_keywords(given: Sequence[str], *, known: Set[str]) -> None:
    for name in given:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
        require(name in known, f"no arm takes {name} as an option of normuon.NorMuon; {hint}")


MAIN_ARMS = ("adamw", "muon", "normuon")
"""The arms that subcommands compare and tune by default."""

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            name="adamw",
            label="AdamW",
            description="torch.optim.AdamW for every parameter",
            builder="build_adamw",
        ),
        Arm(
            name="muon",
            label="Muon",
            description='torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for hidden matrices, '
            "torch.optim.AdamW for the rest",
            builder="build_muon",
        ),
        Arm(
            name="normuon",
            label="NorMuon",
            description="normuon.NorMuon: NorMuon for hidden matrices, AdamW for the rest",
            builder="build_normuon",
        ),
        Arm(
            name="normuon-original",
            label="NorMuon, original",
            description='normuon.NorMuon(adjust_lr_fn="original"), the scaling of the authors\' '
            "released code, its learning rate and decay converted to steps of AdamW's size",
            builder="build_normuon",
            fixed={"adjust_lr_fn": "original"},
        ),
        Arm(
            name="normuon-short",
            label="NorMuon, short axis",
            description='normuon.NorMuon(neuron_axis="short"): columns of wide matrices scaled, '
            "rows of the others",
            builder="build_normuon",
            fixed={"neuron_axis": "short"},
        ),
        Arm(
            name="normuon-heads",
            label="NorMuon + heads",
            description="normuon.NorMuon on param_groups(split_heads=True): every attention head's "
            "queries, keys and values a matrix of its own",
            builder="build_normuon",
            fixed={"split_heads": True},
        ),
        Arm(
            name="normuon-equilibrated",
            label="NorMuon + equilibration",
            description="normuon.NorMuon(equilibrate=True): rows and columns evened before the "
            "orthogonalisation",
            builder="build_normuon",
            fixed={"equilibrate": True},
        ),
        Arm(
            name="normuon-heads-equilibrated",
            label="NorMuon + heads + equilibration",
            description="normuon.NorMuon(equilibrate=True) on param_groups(split_heads=True)",
            builder="build_normuon",
            fixed={"split_heads": True, "equilibrate": True},
        ),
        Arm(
            name="muon-heads-equilibrated",
            label="Muon + heads + equilibration",
            description='the same with "algorithm": "muon", so without a scale per neuron',
            builder="build_normuon",
            fixed={"algorithm": "muon", "split_heads": True, "equilibrate": True},
        ),
        Arm(
            name="normuon-kahan",
            label="NorMuon + Kahan sum",
            description="normuon.NorMuon(kahan_sum=True): what rounding takes from bfloat16 "
            "weights is kept for the next step",
            builder="build_normuon",
            fixed={"kahan_sum": True},
        ),
        Arm(
            name="muon-adam",
            label="Muon + Adam",
            description="one second moment per entry after the orthogonalisation (an ablation)",
            builder="build_rival",
            fixed={"rival": "MuonAdam"},
        ),
        Arm(
            name="normuon-front",
            label="NorMuon, scaled first",
            description="neurons scaled before the orthogonalisation (an ablation)",
            builder="build_rival",
            fixed={"rival": "NorMuonFront"},
        ),
        Arm(
            name="normuon-tall",
            label="NorMuon, m > n only",
            description="neurons scaled in matrices with more rows than columns (an ablation)",
            builder="build_rival",
            fixed={"rival": "NorMuonTall"},
        ),
        Arm(
            name="muon-frobenius",
            label="Muon, fixed norm",
            description="every orthogonalised step scaled to one Frobenius norm (an ablation)",
            builder="build_rival",
            fixed={"rival": "FrobeniusMuon"},
        ),
        Arm(
            name="dion",
            label="Dion, rank 1/4",
            description="Dion (arXiv 2504.05295) at a quarter of the rank",
            builder="build_rival",
            fixed={"rival": "Dion", "rank_fraction": 0.25},
        ),
        Arm(
            name="adam-mini",
            label="Adam-mini",
            description="pytorch_optimizer.AdamMini (arXiv 2406.16793) for every parameter: one "
            "second moment per query or key head, token or other neuron (GPT-2: hidden matrix)",
            builder="build_adam_mini",
        ),
        Arm(
            name="rmnp",
            label="RMNP",
            description="momentum with every row normalised, without orthogonalisation",
            builder="build_rival",
            fixed={"rival": "RowMomentum"},
        ),
        Arm(
            name="hyperball",
            label="Muon Hyperball",
            description="Muon with fixed norms of weights and steps, no decay (arXiv 2606.16899); "
            "its learning rate is relative to the weights' norm",
            builder="build_rival",
            fixed={"rival": "Hyperball"},
        ),
        Arm(
            name="muown",
            label="Muown",
            description="Adam for the row norms of weights, Muon for what is left of them "
            "(arXiv 2605.10797)",
            builder="build_rival",
            fixed={"rival": "Muown"},
        ),
        Arm(
            name="ema-nesterov",
            label="Muon + EMA-Nesterov",
            description="torch.optim.Muon and torch.optim.AdamW with gradients taken ahead, along "
            "a moving average of their steps (arXiv 2605.25395)",
            builder="build_ema_nesterov",
        ),
        Arm(
            name="muon-eq",
            label="MuonEq, rows",
            description="Muon with every row of the momentum normalised before the "
            "orthogonalisation (arXiv 2603.28254, variant R)",
            builder="build_rival",
            fixed={"rival": "MuonEqRows"},
        ),
    )
}


PRETRAINING_ARMS = {name: ARMS[name] for name in MAIN_ARMS}
"""What `normuon train` offers: they step sharded parameters, and their state exists from the start
and fits a checkpoint. The others are for comparisons on one device."""


def check_arms(names: Sequence[str]) -> None:
    """Raise `InputError` unless `names` are known arms, at least one, each once."""
    require(len(names) > 0, f"--arms names nothing: choose from {', '.join(ARMS)}")
    for name in names:
        require(name in ARMS, f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
        require(names.count(name) == 1, f"the arm {name!r} is named twice")
