"""What the paper reports (arXiv 2510.05491), beside which the page puts our figures."""

from __future__ import annotations

from types import MappingProxyType

# Table 1: percent of AdamW's steps saved to AdamW's final validation loss.
STEPS_SAVED_1B = MappingProxyType({"muon": 10.43, "normuon": 21.74})
STEPS_SAVED_5B = MappingProxyType({"muon": 6.03, "normuon": 13.91})
POINTS_OVER_MUON_1B = 11.31
"""The paper subtracts Muon's percentage of AdamW's steps from NorMuon's."""

# "Muon-rescale": percent more steps that Muon needs to NorMuon's loss.
MUON_MORE_STEPS_124M = 6.0
MUON_MORE_STEPS_350M = 15.0

# Table 2: percent by which a training step is longer than AdamW's, on 16 A100s.
STEP_TIME_OVER_ADAMW = 2.9


NUM_PARAMETERS = MappingProxyType({"124M": 124e6, "350M": 350e6, "1.1B": 1.1e9, "5.4B": 5.4e9})


def saved_of_adamw(arm: str) -> dict[float, float]:
    """By number of parameters, the percentage of AdamW's steps that an arm saves."""
    return {
        NUM_PARAMETERS["1.1B"]: STEPS_SAVED_1B[arm],
        NUM_PARAMETERS["5.4B"]: STEPS_SAVED_5B[arm],
    }


def saved_of_muon() -> dict[float, float]:
    """By number of parameters, the percentage of Muon's steps that NorMuon saves.

    At 124M and 350M the Muon-rescale figure the other way round, to NorMuon's final loss; above,
    the ratio of both arms' steps to AdamW's.

    Example:
        >>> print({size / 1e6: round(saved, 1) for size, saved in saved_of_muon().items()})
        {124.0: 5.7, 350.0: 13.0, 1100.0: 12.6, 5400.0: 8.4}
    """
    rescaled = {"124M": MUON_MORE_STEPS_124M, "350M": MUON_MORE_STEPS_350M}
    to_adamw = {"1.1B": STEPS_SAVED_1B, "5.4B": STEPS_SAVED_5B}
    remaining = {
        **{size: 100 / (100 + more) for size, more in rescaled.items()},
        **{size: (100 - s["normuon"]) / (100 - s["muon"]) for size, s in to_adamw.items()},
    }
    return {NUM_PARAMETERS[size]: 100 * (1 - share) for size, share in remaining.items()}
