"""Runs a test's function in a process of its own, where a fake accelerator is registered."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

SECONDS = 120


def _register() -> None:
    from tests.accelerator import device

    device.register()


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        try:
            pickle.dumps(error)
        except Exception:  # torch's may hold what cannot be sent.
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


@pytest.fixture(scope="session")
def _worker() -> Iterator[ProcessPoolExecutor]:
    """One process: registering a device cannot be undone, and other tests must not see it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_register) as pool:
        yield pool


@pytest.fixture
def on_accelerator(_worker) -> Callable[..., Any]:
    """Calls a function there; its exceptions are raised here."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _worker.submit(_run, function, *args, **kwargs).result(timeout=SECONDS)

    return call
