"""NorMuon as a torch optimizer: param groups, state, and the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from normuon.changes import Changes
from normuon.checkpoint import (
    check_state_is_owned,
    loaded_state,
    merged_groups,
    saved_form,
)
from normuon.distributed.assignment import Balance
from normuon.distributed.plan import DEFAULT_BUCKET_BYTES, Sharing
from normuon.distributed.teams import Teams
from normuon.learning_rate import warn_if_muon_sized
from normuon.models.wrappers import check_not_flattened
from normuon.momentum_forms import is_dtensor
from normuon.options import (
    OPTIONS,
    UNSAVED_KEYS,
    MatrixOptions,
    check_changed_options,
    check_options,
    check_options_dict,
    check_sharing,
)
from normuon.orthogonalize import Backend, Orthogonalizer, Workspace
from normuon.params import check_group, check_params, param_label
from normuon.state import (
    adopt_params_,
    check_param_fits,
    check_runs_fused,
    compute_device_of,
    follow_param_,
    initial_state,
    matrix_param,
    missing_keys,
)
from normuon.statistics import Recorder, Statistics
from normuon.step.adamw import step_adamw_
from normuon.step.figures import nowhere
from normuon.step.local import LocalMatrices
from normuon.step.pieces import gradient_of
from normuon.step.rule import AdjustLrFn, NeuronAxis
from normuon.step.staging import Stagings

if TYPE_CHECKING:
    # What several ranks share loads torch.distributed, which a single device never needs.
    from torch.distributed import ProcessGroup

    from normuon.step.sharded import ShardedStep


class NorMuon(Optimizer):
    r"""NorMuon: Muon's orthogonalised momentum with one adaptive scale per neuron.

    For every matrix W of m rows (output neurons) and n columns (arXiv 2510.05491, Algorithm 1):

        M_t  = b1 M_{t-1} + (1 - b1) G_t                   momentum
        O_t  = NS(M_t)                                     Newton-Schulz orthogonalisation
        v_t  = b2 v_{t-1} + (1 - b2) mean_cols(O_t * O_t)  one number per neuron
        Oh_t = O_t / (sqrt(v_t) + eps)                     equal steps for all neurons
        W_t  = W_{t-1} - lr wd W_{t-1} - 0.2 lr sqrt(m n) / ||Oh_t||_F  Oh_t

    The last line sets the step's RMS to 0.2 lr, AdamW's usual size, so one AdamW-sized learning
    rate and one schedule serve the whole model.

    Every option may be set per param group and is read at every step. A group's ``algorithm`` is
    ``"normuon"`` (the default, for matrices), ``"muon"`` (torch.optim.Muon's update) or ``"adamw"``
    (torch's own kernels). A group of parameters with other shapes than ``[out, in]`` needs a
    ``view``, a `MatrixView`. `normuon.param_groups` makes the groups of a whole model.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr: learning rate, a number or a one-element tensor. With the default ``adjust_lr_fn`` it
            is AdamW-sized (1e-4 to 3e-3); Muon's usual 0.02 diverges.
        weight_decay: decoupled, multiplied by lr. `param_groups` sets 0 for other parameters.
        momentum: b1.
        beta2: b2.
        nesterov: orthogonalise ``b1 M_t + (1 - b1) G_t`` instead of ``M_t``, as torch.optim.Muon
            and the authors' released code do. False is Algorithm 1.
        ns_coefficients: ``"jordan"``, ``"polar_express"``, ``"you"``, ``"cans"``, one (a, b, c), or
            one per step; a per-step table must have ``ns_steps`` rows.
        ns_steps: Newton-Schulz steps.
        eps: added to sqrt(v). It is the only epsilon, so the step does not depend on the gradient's
            scale.
        adjust_lr_fn: ``"match_rms_adamw"`` is the paper's last line. ``"original"`` is the authors'
            released code: the norm before neuron scaling, times ``max(1, m / n)^0.5``. Its step has
            an RMS of about lr / sqrt(n), so it needs Muon's learning rates (0.02).
            ``"spectral_unclamped"`` has ``(m / n)^0.5`` there. A `muon` group uses
            torch.optim.Muon's factors of these names.
        neuron_axis: ``"row"``, as in the paper, or ``"short"``: statistics along the short side, so
            the neurons of a wide matrix are its columns and its state is m n + n.
        orthogonalizer: ``"newton_schulz"``, ``"gram"``, ``"auto"`` for the one with fewer FLOPs, or
            a callable ``[B, m, n] -> [B, m, n]`` that takes matrices of norm 1.
        ns_backend: ``"eager"``, ``"compile"`` (torch.compile), ``"kernels"`` (gram-newton-schulz's,
            for Hopper and later) or ``"auto"``: those kernels where they run, eager elsewhere.
        ns_dtype: dtype of Newton-Schulz. None: bfloat16 where the hardware multiplies it natively
            (CUDA, CPUs with AMX or AVX512-BF16), float32 elsewhere, float64 for float64 parameters.
        momentum_dtype: dtype of the momentum. None: the parameter's, but float32 for float16.
            ``torch.int8`` keeps an 8-bit code for each element and a maximum for each block of 128:
            1.03 bytes a weight. Codes are rounded stochastically, so that small gradients add up,
            and alike on every layout.
        compute_device: for parameters on the host: the device of Newton-Schulz and of the exchange
            between ranks. Momentum and weights are stepped on the host; directions and O travel,
            bucket by bucket. None: the current device of a DTensor's mesh, so FSDP2's
            `CPUOffloadPolicy` works without this option; the host for plain parameters.
        equilibrate: divide each row and column of a direction by the square root of its norm
            before it is orthogonalised: one pass of Ruiz's equilibration, after MuonEq (arXiv
            2603.28254). Not in the paper. It adds no state. For `normuon` and `muon` groups.
        cautious_weight_decay: decay only entries that the step moves towards zero (arXiv
            2510.12402).
        skip_nonfinite: if a gradient has a NaN or infinity, skip that matrix and its state in this
            step, without waiting for the device, and count it in ``state["skipped_steps"]``. By
            default it propagates, as in any torch optimizer.
        maximize: ascend.
        kahan_sum: keep the rounding error of bfloat16 and float16 weights in ``weight_residual``
            and add it to the next step. Without it, a step below half the distance to the next
            bfloat16 number (0.2% to 0.4% of the weight) does nothing.
        betas: AdamW's, for `adamw` groups.
        adamw_eps: AdamW's eps.
        max_scratch_bytes: bound on the temporary memory of a batch of equal matrices; a single
            matrix may exceed it. None: 256 MiB on a CPU, 4 GiB on accelerators, where a step runs
            while no activations are held.
        fused: for `normuon` and `muon` groups: Triton kernels for momentum and weight update, one
            pass over memory each. None: where they run, which is on CUDA. False: torch's
            multi-tensor operations, which differ in the last bits.
        process_group: the ranks that replicate the plain parameters, as under DDP. One of them
            orthogonalises each matrix, instead of all. A group may override it:
            ``{"params": experts, "process_group": None}`` for parameters that differ between ranks.
            At the first step the replicas are compared. DTensor parameters (FSDP2, HSDP, TP) need
            no process_group.
        balance: how owners are chosen: ``"flops"``, longest processing time over the
            orthogonaliser's FLOPs, or ``"paper"``, Algorithm 2's sort and round-robin.
        bucket_bytes: bound on what a rank packs for one exchange (twice the largest matrix if that
            is more); see `normuon.distributed.plan.make_plan`.
        teams: ``"auto"`` lets up to eight ranks divide a matrix if the plan predicts a shorter
            step, as with more ranks than large matrices. The step is then equal to rounding instead
            of bit by bit, so the default is ``"off"``.

    State per matrix is m n + m elements (AdamW: 2 m n), of which m n take 1.03 bytes each with
    ``momentum_dtype=torch.int8``; with ``kahan_sum``, m n more.

    Raises:
        ValueError: an option is out of range, or a group cannot train a parameter; the message
            names it and the fix.

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
        compute_device: torch.device | str | None = None,
        equilibrate: bool = False,
        cautious_weight_decay: bool = False,
        skip_nonfinite: bool = False,
        maximize: bool = False,
        kahan_sum: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        max_scratch_bytes: int | None = None,
        fused: bool | None = None,
        process_group: ProcessGroup | None = None,
        balance: Balance = "flops",
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        teams: Teams = "off",
    ) -> None:
        given = {"algorithm": "normuon", **locals()}
        defaults: dict[str, Any] = {name: given[name] for name in OPTIONS}
        check_options(defaults)
        check_sharing(balance, bucket_bytes, teams, process_group)
        check_params(params)
        self._process_group = process_group
        self._lost_process_group = False
        self._sharing = Sharing(balance=balance, bucket_bytes=bucket_bytes, teams=teams)
        self._sharded_steps: list[ShardedStep] | None = None
        self._recorder, self._changes = Recorder(), Changes()
        self._forget_layouts()
        self._workspace, self._stagings = Workspace(), Stagings()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, with its state at zero.

        Raises:
            ValueError: as in the constructor; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        param_group = dict(param_group)
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        check_group({**self.defaults, **param_group})
        check_options_dict(
            f"param_groups[{len(self.param_groups)}]",
            param_group,
            algorithm=self.defaults["algorithm"],
        )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        warn_if_muon_sized(group)
        for param in group["params"]:
            self.state[param] = initial_state(param, group)
        self._forget_layouts()

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
        if self._lost_process_group:
            raise RuntimeError(
                "this optimizer was pickled, and a process_group cannot be: set "
                "optimizer.process_group, and 'process_group' in the groups that had one"
            )
        self._adopt_params()
        if self._sharded_steps is None:
            self._changes.check_options(self.param_groups)
        measures = self._recorder.begin_step()
        prepared = [self._prepared(number, group) for number, group in enumerate(self.param_groups)]
        shares = any(shared for _, _, shared in prepared)
        if shares:
            self._agree(measures)
            self._changes.check_options(self.param_groups)
        if measures:
            self._recorder.begin_()
        for number, (alone, is_mine, _) in enumerate(prepared):
            self._step_alone(number, alone, measures and is_mine)
        if shares:
            self._step_shared()
        if measures:
            steps = self._planned_steps() if shares else []
            noted = [step.record.noted() for step in steps if step.record is not None]
            self._recorder.end_step_(self.state, noted)
        return loss

    def _adopt_params(self) -> None:
        adopted = adopt_params_(self.state, self.param_groups)
        if self._changes.have_new_params(self.param_groups) or adopted:
            self._forget_layouts()

    def _forget_layouts(self) -> None:
        """Drops plans and batches, because parameters, state or groups were replaced."""
        self._sharded_steps = None
        self._local_matrices: dict[int, LocalMatrices] = {}
        self._changes.forget_layouts()
        self._recorder.forget_layouts()

    def _prepared(self, number: int, group: dict[str, Any]) -> tuple[list[int], bool, bool]:
        """The indices of parameters that this rank steps alone, and which kinds the group has.

        Whether it has any of this rank alone, with a gradient or without, and any that ranks share.
        Checks gradients, and adapts the state to parameters that changed.
        """
        alone, is_mine, shares = [], False, False
        states = [self.state[param] for param in group["params"]]
        self._changes.check_structure(number, group, self.state)
        if self._changes.have_new_states(number, states):
            self._local_matrices.pop(number, None)
            for sharded_step in self._sharded_steps or ():
                sharded_step.shared.take_states(self.state)
        own_group = group.get("process_group", ...)
        asks_for_more = group["skip_nonfinite"] or group["kahan_sum"]
        shares_plain = (self._process_group if own_group is ... else own_group) is not None
        for index, (param, state) in enumerate(zip(group["params"], states, strict=True)):
            is_shared = shares_plain or is_dtensor(param)
            shares |= is_shared
            is_mine |= not is_shared and param.numel() > 0
            for key in missing_keys(state, param, group) if asks_for_more else ():
                state[key] = initial_state(param, group)[key]
            grad = gradient_of(param)
            if grad is None or not param.numel():
                check_not_flattened(param_label(group, index), param)
                continue
            if not is_shared:
                alone.append(index)
                if group["compute_device"] is not None and group["algorithm"] != "adamw":
                    compute_device_of(param_label(group, index), param, group)  # Or it raises.
            if group["fused"] and group["algorithm"] != "adamw":
                check_runs_fused(param_label(group, index), param)
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{param_label(group, index)}: sparse gradients are not supported; build the "
                    "embedding with sparse=False"
                )
            if follow_param_(state, param, group):
                self._forget_layouts()
            check_param_fits(group, index, state)
        return alone, is_mine, shares

    def _step_alone(self, number: int, places: list[int], measures: bool) -> None:
        """Steps the parameters of a group that only this rank has."""
        group = self.param_groups[number]
        record = self._recorder.record_of(number, group) if measures else None
        if record is not None:
            record.open_()
        if not places:
            return
        params = [group["params"][index] for index in places]
        if group["algorithm"] == "adamw":
            states = [self.state[param] for param in params]
            step_adamw_(params, states, group)
            if record is not None:
                record.note_adamw_(params, states)
            return
        is_traced = torch.compiler.is_compiling()
        matrices = None if is_traced else self._local_matrices.get(number)
        if matrices is None or not matrices.are(params):
            matrices = LocalMatrices(
                [
                    matrix_param(param_label(group, index), param, group, self.state[param])
                    for index, param in zip(places, params, strict=True)
                ]
            )
            if not is_traced:
                self._local_matrices[number] = matrices
        rows_of = nowhere if record is None else record.rows_of
        options = MatrixOptions.from_group(group)
        matrices.step_(options, self._workspace, self._stagings, rows_of)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _agree(self, measures: bool) -> None:
        """Raises on all ranks if they disagree, before anything changes."""
        for sharded_step in self._planned_steps():
            sharded_step.take_gradients(measures=measures)
        for sharded_step in self._planned_steps():
            sharded_step.agree_()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_shared(self) -> None:
        """Steps the shared parameters. Exchanges are laid out once and must not be traced."""
        for sharded_step in self._planned_steps():
            sharded_step.step_()

    def _planned_steps(self) -> list[ShardedStep]:
        """The plans of shared parameters, made at the first step that needs them.

        Every rank of a group makes its plan at the same step, and again after `add_param_group` and
        `load_state_dict`.
        """
        if self._sharded_steps is None:
            from normuon.step.sharded import ShardedStep
            from normuon.step.shared_params import shared_params

            self._sharded_steps = [
                ShardedStep(shared, self._sharing, self._stagings)
                for shared in shared_params(
                    self.param_groups, self.state, process_group=self._process_group
                )
            ]
        return self._sharded_steps

    def record_statistics(self, every: int | None = None) -> None:
        """Measures the next step for `statistics`, or one step in every ``every``.

        Measurements stay on the device, and nothing waits for them. A measured step reduces the
        Gram matrices and rows that it computes anyway, reads the weights once more, and sums a
        few numbers per matrix over ranks that share parameters in one all-reduce. So all ranks
        must call this with the same ``every``. Other steps cost nothing.

        Args:
            every: None for the next step alone, 1 for every step from now on, 0 for none.

        Raises:
            ValueError: ``every`` is negative or not a whole number.
        """
        if every is None:
            self._recorder.measure_next()
            return
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(
                f"every={every!r} must be a whole number of steps: 1 for every step, 0 for none"
            )
        self._recorder.measure_every(every)

    def statistics(self) -> Statistics:
        """What the last measured step did, by group and by matrix; see `Statistics`.

        Raises:
            RuntimeError: no step has been measured.

        Example:
            >>> import torch, normuon
            >>> layer = torch.nn.Linear(4, 8, bias=False)
            >>> optimizer = normuon.NorMuon(layer.parameters(), lr=1e-3)
            >>> optimizer.record_statistics()
            >>> layer(torch.ones(2, 4)).square().mean().backward()
            >>> optimizer.step()
            >>> figures = optimizer.statistics().to_dict()
            >>> round(figures["group0.normuon/update_rms"], 6)
            0.0002
            >>> round(figures["group0.normuon/effective_rank"], 3)  # All rows are alike.
            1.0
        """
        return self._recorder.statistics(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The state and the hyperparameters, in plain types that ``weights_only`` loading takes.

        Settings of the model, the program or the machine (views, reasons, ``orthogonalizer``,
        ``ns_backend``, ``ns_dtype``, ``compute_device``, ``max_scratch_bytes``) are saved for
        reading only: on loading, the live optimizer's are used. The parameters' names are in
        ``param_names``, beside the groups.
        """
        self._adopt_params()
        return saved_form(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict`, saved on any device and in any dtype.

        Raises:
            ValueError: its groups, algorithms or shapes differ from this optimizer's; names the
                parameter. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        # Not torch's own: that casts all state to the parameter's dtype, which would round the
        # second moments of bfloat16 parameters, and drops what a state_dict leaves out.
        groups, places = merged_groups(self.param_groups, state_dict)
        saved_state, owned = state_dict["state"], set()
        state: defaultdict[Any, Any] = defaultdict(dict)
        for saved, group, of_group in zip(state_dict["param_groups"], groups, places, strict=True):
            for index, place in enumerate(of_group):
                key = saved["params"][place]
                # Not popped: a parameter listed twice has one entry and is met twice.
                owned.add(key)
                loaded = loaded_state(group, index, saved_state.get(key, {}))
                state[group["params"][index]] = loaded
        check_state_is_owned(saved_state, owned)
        for number, group in enumerate(groups):
            check_changed_options(f"param_groups[{number}]", group)
        state.update({key: value for key, value in saved_state.items() if key not in owned})
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that replicate the plain parameters; set it after unpickling."""
        return self._process_group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        self._process_group = process_group
        self._lost_process_group = False
        self._forget_layouts()

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: not process groups, which the first step then asks for."""
        groups = [
            {key: value for key, value in group.items() if key not in UNSAVED_KEYS}
            for group in self.param_groups
        ]
        given = (self._process_group, *(group.get("process_group") for group in self.param_groups))
        sharing = {
            "_sharing": (self._sharing, Sharing()),
            "_lost_process_group": (any(group is not None for group in given), False),
        }
        changed = {name: value for name, (value, usual) in sharing.items() if value != usual}
        return {**super().__getstate__(), "param_groups": groups, **changed}

    def __deepcopy__(self, memo: dict[int, Any]) -> NorMuon:
        """A copy in the same process, which keeps its process groups."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        for group, original in zip(copied.param_groups, self.param_groups, strict=True):
            group.update({key: original[key] for key in UNSAVED_KEYS & original.keys()})
        copied.process_group = self._process_group
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds a flag of its own to the defaults here, which no fresh group of ours has.
        self.defaults.pop("differentiable", None)
        self.__dict__.setdefault("_recorder", Recorder())
        self.__dict__.setdefault("_changes", Changes())
        self._forget_layouts()
        self._workspace, self._stagings = Workspace(), Stagings()
        # Process groups and plans belong to the processes that run, not to what is saved.
        for name, default in (
            ("_process_group", None),
            ("_lost_process_group", False),
            ("_sharing", Sharing()),
        ):
            self.__dict__.setdefault(name, default)
        for group in self.param_groups:
            # A checkpoint older than an option takes the option's default.
            for name, default in self.defaults.items():
                group.setdefault(name, default)
