"""What every test shares: fixed seeds and one thread, so that results repeat."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# `make test` leaves these for a make below it, which then prints what it enters and takes the
# outer one's variables. A test's make must print and take what it would at a shell.
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MAKEFILES"):
    os.environ.pop(_name, None)

if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def _settings_of_the_process() -> dict[str, object]:
    return {
        "denormals are flushed": sys.float_info.min / 2 == 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients are recorded": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were() -> Iterator[None]:
    """What one call leaves set changes the numbers of every later one."""
    before = _settings_of_the_process()
    yield
    assert _settings_of_the_process() == before
