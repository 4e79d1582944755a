"""What users get wrong, each with its exact message: it names the thing and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter

from normuon import MatrixView, NorMuon, convert_state, param_groups, suggest_lr
from normuon.integrations.loggers import log_statistics


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    size = shape or (4, 3)
    return nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=dtype.is_floating_point)


def group(param: Tensor, **options: object) -> list[dict]:
    return [{"params": [("w", param)], **options}]


def sharded_by_zero3() -> nn.Parameter:
    """As DeepSpeed leaves it: an empty placeholder that carries its piece."""
    param = matrix(0)
    param.ds_tensor = torch.zeros(6)
    return param


def kept_by_fsdp1() -> nn.Parameter:
    """An original parameter under use_orig_params=True: a one-dimensional view of the flat one."""
    param = matrix(6)
    param._fsdp_flattened = True
    return param


def step_after_flattening() -> None:
    """What DeepSpeed ZeRO does to a group once it has the optimizer."""
    optimizer = NorMuon([matrix()])
    optimizer.param_groups[0]["params"] = [matrix(12)]
    optimizer.step()


def step_after_reshaping() -> None:
    weight = matrix()
    optimizer = NorMuon(group(weight))
    weight.data = torch.zeros(5, 3)
    weight.grad = torch.ones(5, 3)
    optimizer.step()


def step_with_sparse_gradient() -> None:
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = NorMuon([{"params": [("table", table.weight)], "algorithm": "adamw"}])
    table(torch.tensor([1])).sum().backward()
    optimizer.step()


def load_into(other: Callable[[], NorMuon], optimizer: NorMuon) -> None:
    optimizer.load_state_dict(other().state_dict())


def twice() -> list[dict]:
    weight = matrix()
    return [*group(weight), *group(weight, lr=1e-4)]


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = matrix(5, 3)


LINEAR = nn.Linear(4, 6, bias=False)

MISUSES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # Parameters.
    "a module instead of parameters": (
        lambda: NorMuon(LINEAR),
        TypeError,
        "NorMuon needs parameters, but got a Linear: pass normuon.param_groups(model)",
    ),
    "no parameters": (lambda: NorMuon([]), ValueError, "optimizer got an empty parameter list"),
    "a vector among matrices": (
        lambda: NorMuon(group(matrix(5))),
        ValueError,
        "w [5]: a 'normuon' group takes matrices, but this parameter has 1 dim(s); put it in a "
        "group with 'algorithm': 'adamw', or let normuon.param_groups(model) decide",
    ),
    "four dims and no view": (
        lambda: NorMuon(group(matrix(4, 3, 5, 5))),
        ValueError,
        "w [4, 3, 5, 5]: 4 dims may be a convolution or a batch of experts; put 'view': "
        "MatrixView.conv() or MatrixView.experts() into its group, or let "
        "normuon.param_groups(model) decide",
    ),
    "FSDP1's flat parameter": (
        lambda: NorMuon(group(FlatParameter(torch.zeros(12)), algorithm="adamw")),
        ValueError,
        "w [12]: FSDP1 flattens matrices away, so they cannot be orthogonalised; use FSDP2 "
        "(torch.distributed.fsdp.fully_shard)",
    ),
    "a parameter that FSDP1 keeps under its name": (
        lambda: NorMuon(group(kept_by_fsdp1(), algorithm="adamw")),
        ValueError,
        "w [6]: FSDP1 flattens matrices away, so they cannot be orthogonalised; use FSDP2 "
        "(torch.distributed.fsdp.fully_shard)",
    ),
    "DeepSpeed ZeRO-3's piece": (
        lambda: NorMuon(group(sharded_by_zero3(), algorithm="adamw")),
        ValueError,
        "w [0]: DeepSpeed ZeRO-3 keeps this parameter in flat pieces, so it cannot be "
        "orthogonalised; use FSDP2 (torch.distributed.fsdp.fully_shard), or DeepSpeed with "
        "zero_optimization.stage 0",
    ),
    "a group that DeepSpeed ZeRO flattened": (
        step_after_flattening,
        ValueError,
        "params[0] of a 'normuon' group [12]: this vector replaced a matrix after the optimizer "
        "was built, as DeepSpeed ZeRO (stages 1 to 3) does; use FSDP2 "
        "(torch.distributed.fsdp.fully_shard), or DeepSpeed with zero_optimization.stage 0",
    ),
    "a model reshaped after the optimizer was built": (
        step_after_reshaping,
        ValueError,
        "w [5, 3]: its shape was [4, 3] when the optimizer was built; reshape the model first, "
        "then build the optimizer",
    ),
    "a sparse parameter": (
        lambda: NorMuon(group(torch.zeros(4, 3).to_sparse().requires_grad_())),
        ValueError,
        "w [4, 3]: sparse parameters (torch.sparse_coo) are not supported",
    ),
    "a sparse gradient": (
        step_with_sparse_gradient,
        RuntimeError,
        "table [9, 4]: sparse gradients are not supported; build the embedding with sparse=False",
    ),
    "a complex parameter": (
        lambda: NorMuon(group(matrix(dtype=torch.complex64))),
        ValueError,
        "w [4, 3]: complex parameters are not supported; optimise torch.view_as_real of it with "
        "another optimizer",
    ),
    "an integer parameter": (
        lambda: NorMuon(group(matrix(dtype=torch.int32))),
        ValueError,
        "w [4, 3]: torch.int32 parameters cannot be optimised",
    ),
    "one parameter in two groups": (
        lambda: NorMuon(twice()),
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    "a view that does not fit": (
        lambda: NorMuon(group(matrix(9, 4), view=MatrixView.fused(4, 4))),
        ValueError,
        "w [9, 4]: the group's view does not fit: blocks=(4, 4) sum to 8, but dim 0 has 9",
    ),
    "heads for other blocks": (
        lambda: MatrixView.fused(8, 4, heads=(2, 1, 1)),
        ValueError,
        "MatrixView: heads=(2, 1, 1) needs one entry for each of blocks=(8, 4), or one number for "
        "all",
    ),
    # Options.
    "a negative learning rate": (
        lambda: NorMuon([matrix()], lr=-1e-3),
        ValueError,
        "lr=-0.001 must be a number, at least 0 and finite",
    ),
    "a learning rate that is no number": (
        lambda: NorMuon([matrix()], lr=math.nan),
        ValueError,
        "lr=nan must be a number, at least 0 and finite",
    ),
    "a tensor of learning rates": (
        lambda: NorMuon([matrix()], lr=torch.ones(2)),
        ValueError,
        "Tensor lr must be 1-element, but it has 2 elements",
    ),
    "a misspelt option": (
        lambda: NorMuon(group(matrix(), weight_decy=0.1)),
        ValueError,
        "param_groups[0]: 'weight_decy' is not an option of a group; did you mean 'weight_decay'?",
    ),
    "an unknown algorithm": (
        lambda: NorMuon(group(matrix(), algorithm="sgd")),
        ValueError,
        "algorithm='sgd' is not known; choose from 'normuon', 'muon', 'adamw'",
    ),
    "an unknown scaling": (
        lambda: NorMuon([matrix()], adjust_lr_fn="spectral"),
        ValueError,
        "adjust_lr_fn='spectral' is not known; choose from 'match_rms_adamw', 'original', "
        "'spectral_unclamped'",
    ),
    "an unknown table of coefficients": (
        lambda: NorMuon([matrix()], ns_coefficients="svd"),
        ValueError,
        "ns_coefficients='svd' is not a known table; choose from 'jordan', 'polar_express', 'you', "
        "'cans'",
    ),
    "a table of another length": (
        lambda: NorMuon([matrix()], ns_coefficients="you", ns_steps=4),
        ValueError,
        "ns_coefficients='you' is a table for ns_steps=5, not 4",
    ),
    "coefficients for other steps": (
        lambda: NorMuon([matrix()], ns_coefficients=[(1.0, 2.0, 3.0)] * 3),
        ValueError,
        "ns_coefficients has 3 rows, but ns_steps=5; make them equal",
    ),
    "one AdamW beta": (
        lambda: NorMuon([matrix()], betas=(0.9,)),
        ValueError,
        "betas=(0.9,) must be two numbers, AdamW's (beta1, beta2)",
    ),
    # Models.
    "a matrix that nothing but its shape could place": (
        lambda: param_groups(nn.Sequential(LINEAR, Mixer())),
        ValueError,
        "these parameters may or may not be hidden matrices: 1.mixing [5, 3] of Mixer.mixing. "
        "Choose by class or by name, overrides={Mixer: ...} or {'*mixing': ...}: 'normuon' for "
        "matrices [out, in], a normuon.MatrixView for matrices of another layout, 'adamw' for the "
        "rest",
    ),
    "an override that matches nothing": (
        lambda: param_groups(nn.Sequential(LINEAR), overrides={"lm_haed*": "adamw"}),
        ValueError,
        "overrides match no trainable parameter: ['lm_haed*']",
    ),
    "a model without a hidden matrix": (
        lambda: param_groups(nn.Embedding(9, 4)),
        ValueError,
        "this model has no hidden matrix, so all parameters would take AdamW; use "
        "torch.optim.AdamW, choose matrices with overrides={'name or pattern': 'normuon'}, or "
        "pass hidden_required=False for a pipeline stage without any",
    ),
    # Checkpoints.
    "a checkpoint of other groups": (
        lambda: load_into(lambda: NorMuon([matrix()]), NorMuon([*group(matrix()), *twice()[:1]])),
        ValueError,
        "number of param groups: 1 in the checkpoint, 2 in this optimizer",
    ),
    "AdamW's checkpoint in a matrix's group": (
        lambda: load_into(
            lambda: NorMuon([{"params": [matrix()], "algorithm": "adamw"}]), NorMuon([matrix()])
        ),
        ValueError,
        "param_groups[0] is 'adamw' in the checkpoint but 'normuon' in this optimizer",
    ),
    "a checkpoint of another width": (
        lambda: load_into(lambda: NorMuon([matrix(4, 5)]), NorMuon(group(matrix()))),
        ValueError,
        "w [4, 3]: the checkpoint's 'momentum_buffer' has shape [4, 5], but this parameter with "
        "its view needs [4, 3]",
    ),
    # Statistics.
    "statistics before a step was measured": (
        lambda: NorMuon([matrix()]).statistics(),
        RuntimeError,
        "no step has been measured: call optimizer.record_statistics() before the step",
    ),
    "a fraction of a step between measurements": (
        lambda: NorMuon([matrix()]).record_statistics(every=0.5),
        ValueError,
        "every=0.5 must be a whole number of steps: 1 for every step, 0 for none",
    ),
    "statistics of another optimizer": (
        lambda: log_statistics(torch.optim.SGD([matrix()]), print),
        TypeError,
        "only NorMuon has statistics, but this optimizer is a SGD; train with "
        "normuon.NorMuon(normuon.param_groups(model))",
    ),
    # Coming from another optimizer.
    "the state of an optimizer that is not known": (
        lambda: convert_state(torch.optim.Adagrad([matrix()]), to=group(matrix())),
        ValueError,
        "convert_state does not know the optimizer of a group with the options ['differentiable', "
        "'eps', 'foreach', 'fused', 'initial_accumulator_value', 'lr', 'lr_decay', 'maximize', "
        "'weight_decay']; it takes torch.optim.AdamW, torch.optim.Muon, the authors' "
        "NorMuon, dion's Muon and NorMuon, Muon with 'use_muon' groups, as Keller Jordan's and "
        "DeepSpeed's, Megatron-LM's Muon, and this library's",
    ),
    "an unknown origin of a learning rate": (
        lambda: suggest_lr(0.02, coming_from="lion"),
        ValueError,
        "coming_from='lion' is not known; choose from 'adamw', 'muon_match_rms_adamw', "
        "'muon_original', 'muon_spectral_unclamped'",
    ),
    "Muon's learning rate without the matrices": (
        lambda: suggest_lr(0.02, coming_from="muon_original"),
        ValueError,
        "coming_from='muon_original' needs to=param_groups(model), because the step of that "
        "scaling depends on the shapes of the matrices",
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_raises_one_clear_message(misuse):
    act, kind, message = MISUSES[misuse]
    with pytest.raises(kind) as raised:
        act()
    assert str(raised.value) == message


def test_the_table_holds_what_users_get_wrong():
    """At least 25 of them, each with a text of its own (FSDP1 has two forms of one mistake)."""
    assert len(MISUSES) >= 25
    assert len({message for _, _, message in MISUSES.values()}) >= len(MISUSES) - 1


def test_a_model_under_fsdp1_is_refused_before_it_is_sorted():
    """Its one flat vector would otherwise be taken for a bias."""
    model = nn.Module()
    model._flat_param = FlatParameter(torch.zeros(12))
    with pytest.raises(ValueError, match=r"^_flat_param \[12\]: FSDP1 flattens matrices away"):
        param_groups(model)
