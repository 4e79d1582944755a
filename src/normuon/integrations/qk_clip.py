"""QK-clip (MuonClip, Kimi K2, arXiv 2507.20534) for the attention of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from normuon.distributed.agreement import check_agreement
from normuon.distributed.dtensor import shards_of
from normuon.integrations.attention_logits import mask_in_use, max_logits
from normuon.integrations.attention_rows import Attention, attentions_of


class QKClip:
    """Keeps attention logits at or below ``tau`` by scaling the weights of queries and keys.

    With ``S_h`` the largest logit of head h since the last step, over all tokens of all ranks, and
    ``gamma_h = min(1, tau / S_h)``, `step` scales the rows (and biases) of head h's queries by
    ``gamma_h ** alpha`` and those of its keys by ``gamma_h ** (1 - alpha)``, after the optimizer's
    step; the head's logits on the same tokens scale by ``gamma_h``. As in Kimi K2,
    only weights are scaled, not momentum and second moments.

    - Grouped queries: a shared key head takes the smallest gamma of its heads, to the power
      ``1 - alpha``, and each query head the rest. So every head's logits scale by its own gamma,
      and those of a head under ``tau`` do not change.
    - Latent attention (DeepSeek-V3, Kimi K2): the non-rotary queries and keys of a head as above,
      its rotary queries by ``gamma_h``; the rotary key, which all heads share, stays.

    Logits are measured in the attention modules' own forward passes, from the queries and keys that
    enter the softmax, under the mask that is in use, in blocks (`max_logits`). Only training passes
    count (``model.train()``), and padding does not. A head with an infinite or NaN logit is left
    alone, so that a bad step cannot erase it.

    Under FSDP2, tensor parallelism by heads and both, every rank scales its own part of the weights
    by factors that all ranks share, from one all-reduce of a number per head.

    Args:
        model: a transformers model, before or after it is sharded; not compiled.
        tau: the largest logit that is allowed. Kimi K2 has 100.
        alpha: how much of the scaling the queries take, from 0 to 1.
        every: measure and scale at every so many steps; the other steps cost nothing.
        only: a pattern (`fnmatch`) of names of the attention modules to watch; None for all.
        process_group: the ranks that hold this model's tokens and heads; None: all ranks. With
            pipeline parallelism the ranks of one stage.

    Raises:
        ValueError: an attention that cannot be clipped exactly, such as one that normalises its
            queries and keys and so needs none; names it and says why.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
        >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = LlamaForCausalLM(config).train()
        >>> clip = QKClip(model, tau=1e-3)
        >>> _ = model(torch.arange(9)[None])
        >>> clip.step()  # After optimizer.step().
        >>> [(name, tuple(logits.shape)) for name, logits in clip.max_logits.items()]
        [('model.layers.0.self_attn', (2,))]
        >>> _ = model(torch.arange(9)[None])
        >>> clip.step()
        >>> bool((clip.max_logits["model.layers.0.self_attn"] <= 1.001e-3).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tau: float = 100.0,
        alpha: float = 0.5,
        every: int = 1,
        only: str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every} must be a positive whole number of steps")
        self.tau, self.alpha, self.every = tau, alpha, every
        self.max_logits: dict[str, Tensor] = {}
        """The largest logit of each head at the last measured step, by module: ``[H]`` each."""
        self._group = process_group
        self._attentions = attentions_of(model, only)
        self._num_steps = 0
        self._seen: dict[str, Tensor] = {}
        self._factor_indices: dict[str, tuple[Tensor, Tensor]] = {}
        self._agreed = False
        self._watches = [_Watch(attention, self) for attention in self._attentions]

    @property
    def is_measuring(self) -> bool:
        """Whether the passes before the next `step` are measured."""
        return self._num_steps % self.every == 0

    @torch.no_grad()
    def step(self) -> None:
        """Scales the weights by the measured logits; call it after every optimizer step.

        All ranks of the group must call it equally often.

        Raises:
            ValueError: no training pass has been seen, or ranks watch different modules.
        """
        measuring = self.is_measuring
        self._num_steps += 1
        if not measuring:
            return
        logits = self._over_all_ranks()
        start = 0
        for attention in self._attentions:
            of_heads = logits[start : start + attention.num_heads]
            start += attention.num_heads
            self.max_logits[attention.name] = of_heads
            factors = scaling_factors(
                of_heads, attention.num_key_heads, tau=self.tau, alpha=self.alpha
            )
            for label, projection, param, dim in attention.parameters():
                self._scale_(label, projection.factor_of_neuron, param, dim, factors)
        self._seen = {}

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for watch in self._watches:
            watch.remove()
        self._watches = []

    def state_dict(self) -> dict[str, int]:
        """The number of steps, which says when the next measurement is."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a `state_dict`."""
        self._num_steps = state["num_steps"]

    def _record(self, attention: Attention, logits: Tensor, first_head: int) -> None:
        """Keeps the largest logits of some heads; see `_Watch`."""
        seen = self._seen.get(attention.name)
        if seen is None:
            seen = logits.new_full((attention.num_heads,), -torch.inf)
            self._seen[attention.name] = seen
        of_heads = seen[first_head : first_head + len(logits)]
        of_heads.copy_(torch.maximum(of_heads, logits))

    def _over_all_ranks(self) -> Tensor:
        """The largest logits of all heads, one module after another, in float32."""
        seen = next(iter(self._seen.values()), None)
        # A rank whose batch never came still takes part, on the device of its weights.
        device = _local(next(self._attentions[0].parameters())[2]).device
        device = device if seen is None else seen.device
        parts = []
        for attention in self._attentions:
            of_heads = self._seen.get(attention.name)
            if of_heads is None:
                of_heads = torch.full((attention.num_heads,), -torch.inf)
            parts.append(of_heads.to(device, torch.float32))
        # A NaN would be lost in a maximum; an infinite logit stands for both.
        logits = torch.cat(parts).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if dist.is_initialized():
            group = dist.group.WORLD if self._group is None else self._group
            assert group is not None
            if not self._agreed:
                check_agreement(group, self._settings(), device=device, what="QK-clips")
                self._agreed = True
            dist.all_reduce(logits, dist.ReduceOp.MAX, group=group)
        if seen is None and not bool((logits > -torch.inf).any()):
            raise ValueError(
                "QKClip.step() has seen no training pass: call model.train() and run the model "
                "before it"
            )
        return logits

    def _settings(self) -> list[str]:
        options = f"tau={self.tau} alpha={self.alpha} every={self.every} step={self._num_steps}"
        heads = [
            f"{a.name}: {a.num_heads} heads, {a.num_key_heads} of keys" for a in self._attentions
        ]
        return [options, *heads]

    def _scale_(
        self, label: str, factor_of_neuron: Sequence[int], param: Tensor, dim: int, factors: Tensor
    ) -> None:
        """Scales this rank's part of a parameter."""
        local = _local(param)
        known = self._factor_indices.get(label)
        if known is None or known[0] is not param:
            # Ranks with an empty shard ask too: it may take a process group that all of them make.
            places = torch.tensor(factor_of_neuron)[_stored_neurons(label, param, dim)]
            known = (param, places.to(local.device))
            self._factor_indices[label] = known
        if not local.numel():
            return
        shape = [1] * local.ndim
        shape[dim] = -1
        local.mul_(factors.to(local.device)[known[1]].view(shape))


def scaling_factors(logits: Tensor, num_key_heads: int, *, tau: float, alpha: float) -> Tensor:
    """The factors of each head's queries and keys.

    Args:
        logits: ``[H]``, the largest of each head.
        num_key_heads: G; heads ``h`` to ``h + H / G - 1`` share a key head.
        tau: see `QKClip`.
        alpha: see `QKClip`.

    Returns:
        ``[1 + H + G + H]``: 1, then the factors of queries, of keys and of rotary queries.

    Example:
        >>> scaling_factors(torch.tensor([400.0, 50.0]), 2, tau=100.0, alpha=0.5)
        tensor([1.0000, 0.5000, 1.0000, 0.5000, 1.0000, 0.2500, 1.0000])
        >>> scaling_factors(torch.tensor([400.0, 50.0]), 1, tau=100.0, alpha=0.5)
        tensor([1.0000, 0.5000, 2.0000, 0.5000, 0.2500, 1.0000])
    """
    exceeds = (logits > tau) & logits.isfinite()
    gamma = torch.where(exceeds, tau / logits, 1.0)
    shared = len(logits) // num_key_heads
    # Differs: Kimi K2 has a key head for each query head; shared ones follow their worst head.
    of_group = gamma.view(num_key_heads, shared).amin(dim=1)
    rest = of_group.pow(alpha - 1).repeat_interleave(shared)
    queries = gamma.pow(alpha) if shared == 1 else gamma * rest
    return torch.cat([torch.ones_like(gamma[:1]), queries, of_group.pow(1 - alpha), gamma])


def _local(param: Tensor) -> Tensor:
    """This rank's part of a parameter, to be written to."""
    param = param.detach()
    return param.to_local() if isinstance(param, DTensor) else param


def _stored_neurons(label: str, param: Tensor, dim: int) -> Tensor:
    """The places along a dim that this rank stores, in order."""
    if not isinstance(param, DTensor):
        return torch.arange(param.shape[dim])
    shards = shards_of(param, label=f"{label} {list(param.shape)}", process_group=None)
    stored = shards.layout.intervals_by_rank[dist.get_rank(shards.group)][dim]
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in stored)])


class _Watch:
    """Hooks on one attention module, which measure between its projections and its softmax."""

    def __init__(self, attention: Attention, clip: QKClip) -> None:
        self.attention, self.clip = attention, clip
        self.plain: Callable[..., Any] | None = None
        self.met = False
        self.handles = [
            attention.module.register_forward_pre_hook(self.before, with_kwargs=True),
            attention.module.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, _: Any, options: dict[str, Any]) -> None:
        """Puts the measurement before the attention function that the module looks up."""
        # A pass inside the backward one is activation checkpointing's, of logits seen before.
        recomputes = torch._C._current_graph_task_id() != -1
        if not module.training or not self.clip.is_measuring or recomputes:
            return
        for source in ("key_value_states", "encoder_hidden_states"):
            if options.get(source) is not None:
                raise ValueError(
                    f"{self.attention.name} is cross-attention, whose padding QK-clip cannot see; "
                    "leave it out with only='pattern of module names'"
                )
        import transformers

        interface_class: Any = transformers.AttentionInterface
        plain = interface_class.get_interface

        def look_up(
            interface: Any, implementation: str, default: Callable[..., Any]
        ) -> Callable[..., Any]:
            attend = plain(interface, implementation, default)

            def measured(
                caller: nn.Module,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                mask: Any,
                **options: Any,
            ) -> Any:
                if caller is module:
                    self.measure(query, key, mask, options, implementation)
                return attend(caller, query, key, value, mask, **options)

            return measured

        self.plain, self.met = plain, False
        interface_class.get_interface = look_up

    def after(self, _: nn.Module, __: Any, output: Any) -> None:
        """Removes the measurement, also after an error."""
        if self.plain is None:
            return
        import transformers

        interface_class: Any = transformers.AttentionInterface
        interface_class.get_interface = self.plain
        self.plain = None
        if output is not None and not self.met:
            raise ValueError(
                f"{self.attention.name}: {type(self.attention.module).__name__} is compiled, or "
                "does not call transformers' attention functions, where QK-clip measures logits; "
                "compile other parts of the model, or leave it out with only='pattern of names'"
            )

    def measure(
        self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], implementation: str
    ) -> None:
        attention = self.attention
        self.met = True
        for refused in ("softcap", "position_bias"):
            if options.get(refused) is not None:
                raise ValueError(
                    f"{attention.name}: with {refused} the logits depend on more than queries "
                    "and keys, so QK-clip cannot bound them"
                )
        if isinstance(query, DTensor) or isinstance(key, DTensor):
            raise ValueError(
                f"{attention.name}: queries and keys are DTensors; give attention local tensors, "
                "as ColwiseParallel() does by default"
            )
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        in_use = mask_in_use(
            attention.name, attention.module, query, key, mask, options, implementation
        )
        first = first_head_here(attention, query.shape[1])
        self.clip._record(attention, max_logits(query, key, scaling=scaling, mask=in_use), first)


def first_head_here(attention: Attention, num_heads_here: int) -> int:
    """The index of the first head that this rank computes.

    Raises:
        ValueError: tensor parallelism has cut the projection within a head.
    """
    if num_heads_here == attention.num_heads:
        return 0
    weight = attention.module.get_submodule(attention.query_child).weight
    size = attention.neurons_per_head
    if isinstance(weight, DTensor) and size is not None:
        label = f"{attention.name}.{attention.query_child}.weight"
        stored = _stored_neurons(label, weight, 0)
        first = int(stored[0])
        whole = len(stored) == num_heads_here * size and first % size == 0
        if whole and int(stored[-1]) - first + 1 == len(stored):
            return first // size
    raise ValueError(
        f"{attention.name}: this rank computes {num_heads_here} of {attention.num_heads} heads, "
        f"and {attention.query_child}.weight does not say which; shard it by whole heads as a "
        "DTensor (parallelize_module with ColwiseParallel)"
    )
