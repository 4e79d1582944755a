"""Logs statistics of steps to TensorBoard, or to any function that takes numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from normuon.optimizer import NorMuon
from normuon.statistics import Statistics


class ScalarWriter(Protocol):
    """The method of torch.utils.tensorboard's ``SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Writes one number."""


Log = Callable[[dict[str, float], int], object]
"""Takes numbers by name, and the step: ``lambda numbers, step: wandb.log(numbers, step=step)``."""


def log_statistics(
    optimizer: Any,
    to: ScalarWriter | Log,
    *,
    every: int = 100,
    per_matrix: bool = False,
    prefix: str = "normuon/",
    step: int = 0,
) -> MeasuredSteps:
    """Logs the statistics of one step in every ``every``; the training loop stays as it is.

    At those steps the host waits for the transfer of a few numbers per matrix. Call it on all
    ranks, because they measure together; if only one should write, pass
    ``lambda numbers, step: None`` on the others.

    Args:
        optimizer: a NorMuon, perhaps in a framework's wrapper.
        to: a ``SummaryWriter`` or anything else with its ``add_scalar``; or a function of the
            numbers by name and the step.
        every: steps between measurements: at steps ``every``, ``2 every``, and so on.
        per_matrix: also log every matrix and `adamw` parameter, not groups alone.
        prefix: of all names.
        step: how many steps a resumed run has already taken.

    Returns:
        A handle whose `remove` ends the logging.

    Raises:
        TypeError: ``optimizer`` is not a NorMuon and wraps none.
        ValueError: ``every`` is below 1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = NorMuon(layer.parameters(), lr=1e-3)
        >>> log = lambda numbers, step: print(step, round(numbers["group0.normuon/update_rms"], 6))
        >>> handle = log_statistics(optimizer, log, every=2, prefix="")
        >>> for _ in range(5):
        ...     layer.weight.grad = torch.eye(4)
        ...     optimizer.step()
        2 0.0002
        4 0.0002
    """

    def use(statistics: Statistics, at: int) -> None:
        numbers = {
            f"{prefix}{name}": value
            for name, value in statistics.to_dict(per_matrix=per_matrix).items()
        }
        if callable(to):
            to(numbers, at)
            return
        for name, value in numbers.items():
            to.add_scalar(name, value, at)

    return MeasuredSteps(optimizer, use, every=every, step=step)


class MeasuredSteps:
    """Measures one step of an optimizer in every ``every``, and passes its statistics on."""

    def __init__(
        self, optimizer: Any, use: Callable[[Statistics, int], None], *, every: int, step: int = 0
    ) -> None:
        """Begins with the next step.

        Args:
            optimizer: a NorMuon, perhaps in a framework's wrapper.
            use: is called after each measured step, with its statistics and its number.
            every: as for `log_statistics`.
            step: how many steps have been taken before.
        """
        if every < 1:
            raise ValueError(f"every={every!r} must be at least 1, the steps between measurements")
        self._use, self._every, self._step = use, every, step
        found = normuon_in(optimizer)
        self._handles = (
            found.register_step_pre_hook(self._before_step),
            found.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Ends the measuring."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if (self._step + 1) % self._every == 0:
            optimizer.record_statistics()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._step % self._every == 0:
            self._use(optimizer.statistics(), self._step)


def normuon_in(optimizer: Any) -> NorMuon:
    """The NorMuon inside a framework's wrappers.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, NorMuon) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, NorMuon):
        raise TypeError(
            f"only NorMuon has statistics, but this optimizer is a {type(optimizer).__name__}; "
            "train with normuon.NorMuon(normuon.param_groups(model))"
        )
    return inner
