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
