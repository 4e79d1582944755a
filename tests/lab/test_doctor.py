"""`normuon doctor` says what a report of a problem should begin with."""

from __future__ import annotations

import json
import platform
import socket
from importlib import metadata
from pathlib import Path

import pytest
import torch

from normuon.orthogonalize import resolve_backend, resolve_ns_dtype
from normuon.orthogonalize.fused import why_not_fused
from normuon_lab.cli import main
from normuon_lab.doctor import PACKAGES, TESTED, as_text, examine

REPOSITORY = Path(__file__).parents[2]


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
    assert "ns_backend='auto' uses 'eager'; not 'kernels': they run on CUDA devices" in text
    assert "orthogonalizer='auto' uses 'gram' for 4096 x 14336" in text
    assert socket.gethostname() not in text


def test_a_device_that_multiplies_bfloat16_slowly_is_told_so():
    found = examine()
    found["devices"][0]["bfloat16_is_native"] = False
    assert "bfloat16 products are emulated" in as_text(found)


def test_each_device_says_what_is_proved_of_its_kind(told):
    assert told["schema_version"] == 2
    cpu = told["devices"][0]
    assert cpu["proved"] == TESTED["cpu"]["proved"]
    assert "real processes over Gloo" in cpu["proved"][-1]["what"]
    assert cpu["not_proved"] == TESTED["cpu"]["not_proved"]
    assert cpu["fused_unavailable"] == why_not_fused("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_what_is_proved_of_other_devices_is_not_claimed_of_this_machine(kind, monkeypatch):
    """CUDA's is to be proved by a run of `tests/gpu`; of others, no real one was ever tried."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr("normuon_lab.doctor._device_name", lambda device: device.type)
    monkeypatch.setattr("normuon.orthogonalize.resolve_backend", lambda *_, **__: "eager")
    monkeypatch.setattr("normuon.orthogonalize.kernels.why_unavailable", lambda *_: "absent")
    found = examine()
    device, text = found["devices"][1], as_text(found)
    if kind == "cuda":
        assert "run tests/gpu or `make gpu` to check this machine" in text
        assert "not tested: more than one GPU, and NCCL between them; Triton kernels on" in text
        assert "ROCm" in text
        return
    assert device["proved"] == TESTED["other"]["proved"]
    assert "not tested: anything on a real device of this kind" in text
    assert "fused=None uses torch's own operations: Triton kernels run on CUDA devices" in text


def test_the_tests_that_prove_something_exist():
    for proof in (proof for kind in TESTED.values() for proof in kind["proved"]):
        for folder in proof["tests"].split(", "):
            assert any((REPOSITORY / folder).glob("test_*.py")), folder
