"""The hyperparameters that a comparison gives its optimizers, besides the peak learning rate.

Importing this imports no torch: the command line reads these before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import require

if TYPE_CHECKING:
    import torch

ADAM_BETAS = (0.9, 0.95)
HIDDEN_WEIGHT_DECAY = 0.1  # 0 elsewhere, as in the paper


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmOptions:
    """Hyperparameters besides the peak learning rate of hidden matrices.

    Attributes:
        adam_lr: peak learning rate of everything else; None: that of hidden matrices.
        embedding_lr: that of the input embedding; None: `adam_lr`.
        head_lr: that of the output head, tied or not; None: `adam_lr`.
        weight_decay: of hidden matrices; 0 elsewhere, as in the paper.
        betas: AdamW's.
        momentum: Muon's, and NorMuon's first beta.
        beta2: NorMuon's second beta.
        ns_dtype: dtype of NorMuon's Newton-Schulz; None: NorMuon's own choice for the device.
        split_heads: of `normuon.param_groups`; arms that are not NorMuon refuse it.
        normuon: further keyword arguments of `normuon.NorMuon`, as pairs; other arms refuse them.
    """

    adam_lr: float | None = None
    embedding_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = HIDDEN_WEIGHT_DECAY
    betas: tuple[float, float] = ADAM_BETAS
    momentum: float = 0.95
    beta2: float = 0.95
    ns_dtype: torch.dtype | None = None
    split_heads: bool = False
    normuon: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values of those that are not the defaults.

        Example:
            >>> ArmOptions(weight_decay=0.3, normuon=(("ns_steps", 6),)).to_json()
            {'weight_decay': 0.3, 'normuon': {'ns_steps': 6}}
        """
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        if "normuon" in changed:
            changed["normuon"] = dict(self.normuon)
        if "ns_dtype" in changed:
            changed["ns_dtype"] = str(self.ns_dtype)
        return changed

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArmOptions:
        """The inverse of `to_json`.

        Raises:
            InputError: a name is unknown.

        Example:
            >>> ArmOptions.from_json({"weight_decay": 0.3, "normuon": {"ns_steps": 6}}).normuon
            (('ns_steps', 6),)
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            require(name in known, f"no arm has the option {name}; known are {', '.join(known)}")
        given = dict(values)
        if "normuon" in given:
            given["normuon"] = tuple(given["normuon"].items())
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        if "ns_dtype" in given:
            import torch

            given["ns_dtype"] = getattr(torch, given["ns_dtype"].removeprefix("torch."))
        return cls(**given)


DEFAULT_OPTIONS = ArmOptions()
