"""NorMuon as a torch optimizer: param groups, their state, and the order of a step.

The numerics are in `rule.py` and `orthogonalize/`, batches of matrices in `matrix_step.py`, what
a group may say in `options.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from normuon.adamw import step_adamw_
from normuon.distributed.assignment import Balance
from normuon.distributed.plan import DEFAULT_BUCKET_BYTES
from normuon.flattened import check_not_flattened
from normuon.learning_rate import warn_if_muon_sized
from normuon.matrix_step import MatrixParam, step_matrices_
from normuon.options import (
    STRUCTURE_KEYS,
    MatrixOptions,
    check_group,
    check_options,
    check_params,
    check_sharing,
    described,
    param_label,
)
from normuon.orthogonalize import Backend, Orthogonalizer, Workspace
from normuon.rule import AdjustLrFn, NeuronAxis
from normuon.state import (
    adopt_params_,
    check_state_fits,
    follow_param_,
    initial_state,
    is_dtensor,
    loaded_state,
    merged_groups,
    view_of,
)

if TYPE_CHECKING:
    # What several ranks share loads torch.distributed, which a single device never needs.
    from torch.distributed import ProcessGroup

    from normuon.sharded_step import ShardedStep

DEFAULT_MAX_SCRATCH_BYTES = 256 * 2**20


class NorMuon(Optimizer):
    r"""NorMuon: Muon's orthogonalised momentum with one adaptive scale per neuron.

    For every matrix W of m rows (output neurons) and n columns (arXiv 2510.05491, Algorithm 1)::

        M_t  = b1 M_{t-1} + (1 - b1) G_t                   momentum
        O_t  = NS(M_t)                                     Newton-Schulz orthogonalisation
        v_t  = b2 v_{t-1} + (1 - b2) mean_cols(O_t * O_t)  one number per neuron
        Oh_t = O_t / (sqrt(v_t) + eps)                     every neuron moves alike
        W_t  = W_{t-1} - lr wd W_{t-1} - 0.2 lr sqrt(m n) / ||Oh_t||_F  Oh_t

    The last line pins the step's RMS to 0.2 lr, AdamW's usual size, so that one AdamW-sized
    learning rate and one schedule serve the whole model.

    Every option may be set per param group and is read at every step. A group's ``algorithm`` is
    ``"normuon"`` (the default, for matrices), ``"muon"`` (torch.optim.Muon's update) or ``"adamw"``
    (torch's own kernels). A group of parameters with other shapes than ``[out, in]`` carries a
    ``view``, a `MatrixView`; `normuon.param_groups` makes the groups of a whole model.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, a number or a one-element tensor. With the default ``adjust_lr_fn`` use
            an AdamW-sized one (1e-4 to 3e-3): Muon's usual 0.02 diverges with it.
        weight_decay: decoupled, multiplied by lr alone. `param_groups` sets 0 outside matrices.
        momentum: b1.
        beta2: b2.
        nesterov: orthogonalise ``b1 M_t + (1 - b1) G_t`` instead of ``M_t``, as torch.optim.Muon
            and the authors' released code do. False is Algorithm 1 to the letter.
        ns_coefficients: ``"jordan"``, ``"polar_express"``, ``"you"``, ``"cans"``, one (a, b, c), or
            one per step; a per-step table must have ``ns_steps`` rows.
        ns_steps: Newton-Schulz steps.
        eps: added to sqrt(v). Nothing is added anywhere else, so the step does not depend on the
            gradient's scale.
        adjust_lr_fn: ``"match_rms_adamw"`` is the paper's last line; ``"original"`` the authors'
            released code: the norm before neuron scaling restored, times ``max(1, m / n)^0.5``.
            That step's RMS is about lr / sqrt(n), so its learning rates are Muon's (0.02).
            A `muon` group takes torch.optim.Muon's factors of these names.
        neuron_axis: ``"row"``, the paper's, or ``"short"``, statistics along the short side: the
            neurons of a wide matrix are then its columns, and its state is m n + n.
        orthogonalizer: ``"newton_schulz"``, ``"gram"``, ``"auto"`` for the one of them with fewer
            FLOPs, or a callable ``[B, m, n] -> [B, m, n]`` that takes matrices of norm 1.
        ns_backend: ``"eager"``, ``"compile"`` (torch.compile), ``"kernels"`` (gram-newton-schulz's,
            for Hopper and later) or ``"auto"``: those kernels where they run, eager elsewhere.
        ns_dtype: dtype of Newton-Schulz. None: bfloat16 where the hardware multiplies it natively
            (CUDA, CPUs with AMX or AVX512-BF16), float32 elsewhere, float64 for float64 parameters.
        momentum_dtype: dtype of the momentum; None: the parameter's.
        equilibrate: divide each row and column of a direction by the square root of its norm
            before it is orthogonalised: one pass of Ruiz's equilibration, after MuonEq (arXiv
            2603.28254). Not in the paper. It takes no state. For `normuon` and `muon` groups.
        cautious_weight_decay: decay only entries that the step moves towards zero (arXiv
            2510.12402). For `normuon` and `muon` groups.
        skip_nonfinite: leave a matrix with a NaN or infinity in its gradient, and all its state,
            untouched on that step, without waiting for the device, and count it in
            ``state["skipped_steps"]``. By default it propagates, as in any torch optimizer.
        maximize: ascend.
        betas: AdamW's, for `adamw` groups.
        adamw_eps: AdamW's eps.
        max_scratch_bytes: bound on the temporary memory of a batch of equal matrices; one matrix
            at a time is processed however large it is.
        process_group: the ranks that hold these plain parameters alike, as under DDP: each matrix
            is then orthogonalised by one of them instead of by all. DTensor parameters (FSDP2,
            HSDP, TP) need nothing: their meshes say who shares them.
        balance: how matrices are given to owners: ``"flops"``, longest processing time over the
            orthogonaliser's FLOPs, or ``"paper"``, Algorithm 2's sort and round-robin.
        bucket_bytes: bound on what a rank packs for one exchange (twice the largest matrix where
            that is more); see `normuon.distributed.plan.make_plan`.

    State per matrix is m n + m elements (AdamW: 2 m n).

    Raises:
        ValueError: an option out of range, or a parameter its group cannot train; the message
            names the parameter and what to do.

    Example:
        >>> import torch, normuon
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> optimizer = normuon.NorMuon(normuon.param_groups(model), lr=1e-3)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "jordan",
        ns_steps: int = 5,
        eps: float = 1e-8,
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        *,
        neuron_axis: NeuronAxis = "row",
        orthogonalizer: str | Orthogonalizer = "auto",
        ns_backend: Backend = "auto",
        ns_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        equilibrate: bool = False,
        cautious_weight_decay: bool = False,
        skip_nonfinite: bool = False,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        max_scratch_bytes: int = DEFAULT_MAX_SCRATCH_BYTES,
        process_group: ProcessGroup | None = None,
        balance: Balance = "flops",
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        defaults: dict[str, Any] = {
            "algorithm": "normuon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
            "neuron_axis": neuron_axis,
            "orthogonalizer": orthogonalizer,
            "ns_backend": ns_backend,
            "ns_dtype": ns_dtype,
            "momentum_dtype": momentum_dtype,
            "equilibrate": equilibrate,
            "cautious_weight_decay": cautious_weight_decay,
            "skip_nonfinite": skip_nonfinite,
            "maximize": maximize,
            "betas": betas,
            "adamw_eps": adamw_eps,
            "max_scratch_bytes": max_scratch_bytes,
        }
        check_options(defaults)
        check_sharing(balance, bucket_bytes)
        check_params(params)
        self._process_group = process_group
        self._balance = balance
        self._bucket_bytes = bucket_bytes
        self._sharded_steps: list[ShardedStep] | None = None
        self._workspace = Workspace()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, checked, with its state at zero.

        Raises:
            ValueError: as the constructor; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        param_group = dict(param_group)
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        warn_if_muon_sized(group)
        for param in group["params"]:
            self.state[param] = initial_state(param, group)
        self._sharded_steps = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimisation step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adopt_params()
        prepared = [self._prepared(group) for group in self.param_groups]
        # Ranks that disagree must find out before the first of their collectives, AdamW's included.
        shares = any(shared for _, shared in prepared)
        sharded_steps = self._planned_steps() if shares else []
        for group, (alone, shared) in zip(self.param_groups, prepared, strict=True):
            if group["algorithm"] == "adamw":
                self._step_adamw(alone, shared, group)
            elif alone:
                step_matrices_(
                    list(self._matrix_params(alone, group)),
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    options=MatrixOptions.from_group(group),
                    workspace=self._workspace,
                )
        for sharded_step in sharded_steps:
            sharded_step.step_()
        return loss

    def _adopt_params(self) -> None:
        if adopt_params_(self.state, self.param_groups):
            self._sharded_steps = None

    def _prepared(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """A group's parameters to step: this rank's own with gradients, and all that ranks share.

        Checks gradients and lets the state follow what has changed since it was made.
        """
        alone, shared = [], []
        for index, param in enumerate(group["params"]):
            is_shared = self._process_group is not None or is_dtensor(param)
            if is_shared:
                shared.append(param)
            if param.grad is None or not param.numel():
                check_not_flattened(param_label(group, index), param)
                continue
            if not is_shared:
                alone.append(param)
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{param_label(group, index)}: sparse gradients are not supported; build the "
                    "embedding with sparse=False"
                )
            if is_shared:
                from normuon.distributed.layout import misplaced_gradient

                problem = misplaced_gradient(param)
                if problem is not None:
                    raise ValueError(f"{param_label(group, index)}: {problem}")
            follow_param_(self.state[param], param)
            check_state_fits(group, index, self.state[param])
        if group["skip_nonfinite"]:
            for param in (*alone, *shared):
                if "skipped_steps" not in self.state[param]:
                    counts = initial_state(param, group)["skipped_steps"]
                    self.state[param]["skipped_steps"] = counts
        return alone, shared

    def _step_adamw(self, alone: list[Tensor], shared: list[Tensor], group: dict[str, Any]) -> None:
        if alone:
            step_adamw_(alone, [self.state[p] for p in alone], group)
        if shared:
            from normuon.sharded_adamw import step_sharded_adamw_

            states = [self.state[p] for p in shared]
            step_sharded_adamw_(shared, states, group, process_group=self._process_group)

    def _planned_steps(self) -> list[ShardedStep]:
        """The plans of the matrices that ranks share, drawn up at the first step that needs them.

        Every rank of a group draws up its plan at the same step, and again after `add_param_group`
        and `load_state_dict`.
        """
        if self._sharded_steps is None:
            from normuon.sharded_params import check_shared_params, sharded_params
            from normuon.sharded_step import ShardedStep

            check_shared_params(self.param_groups, process_group=self._process_group)
            self._sharded_steps = [
                ShardedStep(params, balance=self._balance, bucket_bytes=self._bucket_bytes)
                for params in sharded_params(
                    self.param_groups, self.state, process_group=self._process_group
                )
            ]
        return self._sharded_steps

    def _matrix_params(
        self, params: Sequence[Tensor], group: dict[str, Any]
    ) -> Iterator[MatrixParam]:
        view, skip_nonfinite = view_of(group), group["skip_nonfinite"]
        for param in params:
            state = self.state[param]
            assert param.grad is not None
            yield MatrixParam(
                param=param,
                grad=param.grad,
                view=view,
                momentum=state["momentum_buffer"],
                second_moment=state.get("second_momentum_buffer"),
                skipped_steps=state["skipped_steps"] if skip_nonfinite else None,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state and the hyperparameters, in plain types that ``weights_only`` loading takes.

        What describes the model or the program (views, reasons, a callable orthogonaliser) stays
        out: it is taken from the live optimizer when the state is loaded.
        """
        self._adopt_params()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for key in STRUCTURE_KEYS & group.keys():
                group[key] = described(group[key])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, on whatever device and in whatever dtype it was kept.

        Raises:
            ValueError: other groups, algorithms or shapes than this optimizer's; names the
                parameter. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        # Not torch's own: that casts all state to the parameter's dtype, which would round the
        # second moments of bfloat16 parameters, and drops what a state_dict leaves out.
        groups = merged_groups(self.param_groups, state_dict["param_groups"])
        saved_state, owned = state_dict["state"], set()
        state: defaultdict[Any, Any] = defaultdict(dict)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True):
            for index, key in enumerate(saved["params"]):
                # Not popped: a parameter listed twice has one entry and is met twice.
                owned.add(key)
                loaded = loaded_state(group, index, saved_state.get(key, {}))
                state[group["params"][index]] = loaded
        state.update({key: value for key, value in saved_state.items() if key not in owned})
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds a flag of its own to the defaults here, which no fresh group of ours has.
        self.defaults.pop("differentiable", None)
        self._sharded_steps = None
        self._workspace = Workspace()
        # Process groups and plans belong to the processes that run, not to what is saved.
        for name, default in (
            ("_process_group", None),
            ("_balance", "flops"),
            ("_bucket_bytes", DEFAULT_BUCKET_BYTES),
        ):
            self.__dict__.setdefault(name, default)
        for group in self.param_groups:
            # A checkpoint older than an option takes the option's default.
            for name, default in self.defaults.items():
                group.setdefault(name, default)
