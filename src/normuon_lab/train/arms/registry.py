"""The optimizers that are compared, each a name and a way to build plain torch optimizers.

Every arm takes the same partition of the model, `normuon.param_groups`': hidden matrices on one
side, embeddings, head, norms and biases on the other, and one peak learning rate for both unless
`ArmOptions` says otherwise. To add an arm, write its builder and an entry of `arms.toml`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.atomic_files import read_toml
from normuon_lab.errors import require
from normuon_lab.train.arms.options import DEFAULT_OPTIONS, ArmOptions

# The names of the arms are needed before training is, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One optimizer of the comparison: an entry of `arms.toml`, which explains the fields."""

    name: str
    label: str
    description: str
    builder: str
    style: tuple[str, str, str, str]
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
        for name in keywords:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            require(name in known, f"no arm takes {name} as an option of normuon.NorMuon; {hint}")
        optimizers: list[Optimizer] = getattr(builders, self.builder)(
            model, lr, options, **self.fixed
        )
        return optimizers


ARMS = {
    name: Arm(name=name, **values)
    for name, values in read_toml(Path(__file__).with_name("arms.toml")).items()
}

MAIN_ARMS = ("adamw", "muon", "normuon")
"""The arms that subcommands compare and tune by default."""

PRETRAINING_ARMS = {name: ARMS[name] for name in MAIN_ARMS}
"""What `normuon train` offers: they step sharded parameters, and their state exists from the start
and fits a checkpoint. The others are for comparisons on one device."""


def check_arms(names: Sequence[str]) -> None:
    """Raise `InputError` unless `names` are known arms, at least one, each once."""
    require(len(names) > 0, f"--arms names nothing: choose from {', '.join(ARMS)}")
    for name in names:
        require(name in ARMS, f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
        require(names.count(name) == 1, f"the arm {name!r} is named twice")
