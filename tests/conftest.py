"""What every test shares: fixed seeds and one thread, so that results repeat."""

import os

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
