"""`normuon doctor` says what a report of a problem should begin with."""

from __future__ import annotations

import json
import platform
import socket
from importlib import metadata

import pytest
import torch

from normuon.orthogonalize import resolve_backend, resolve_ns_dtype
from normuon_lab.cli import main
from normuon_lab.doctor import PACKAGES, as_text, examine


@pytest.fixture
def told(capsys) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions_are_those_installed(told):
    assert told["python"] == platform.python_version()
    assert told["packages"]["library"]["torch"] == metadata.version("torch")
    assert told["packages"]["lab"]["transformers"] == metadata.version("transformers")


def test_what_is_not_installed_is_told(monkeypatch):
    """timm lives apart in the development environment, and nowhere in most users'."""
    monkeypatch.setitem(PACKAGES, "library", ("no-such",))
    assert examine()["packages"]["library"] == {"no-such": None}


def test_the_cpus_choices_are_those_that_a_step_makes(told):
    cpu = told["devices"][0]
    device = torch.device("cpu")
    dtype = resolve_ns_dtype(None, param_dtype=torch.float32, device=device)
    assert cpu["device"] == "cpu"
    assert cpu["ns_dtype"] == str(dtype).removeprefix("torch.")
    assert cpu["ns_backend"] == resolve_backend("auto", device=device, dtype=dtype)
    assert cpu["kernels_unavailable"] == "they run on CUDA devices, not on cpu"


def test_every_accelerator_is_listed(told):
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    assert len(told["devices"]) == 1 + count


def test_the_text_says_what_auto_takes_and_names_nobody(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ns_backend='auto' takes 'eager'; not 'kernels': they run on CUDA devices" in text
    assert "orthogonalizer='auto' takes 'gram' for 4096 x 14336" in text
    assert socket.gethostname() not in text


def test_a_device_that_multiplies_bfloat16_slowly_is_told_so():
    found = examine()
    found["devices"][0]["bfloat16_is_native"] = False
    assert "bfloat16 products are emulated" in as_text(found)
