"""A run that switches in its middle goes on from the moments it had."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from normuon import MatrixView, NorMuon, convert_state, param_groups
from tests.reference import relative_to_distance_moved


class AuthorsNorMuon(torch.optim.Optimizer):
    """The authors' released step, in full precision: what its state means is what is tested."""

    def __init__(self, params, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": 0.95}
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                    state["second_momentum_buffer"] = torch.zeros_like(param[..., :1])
                m, n = param.shape
                momentum = state["momentum_buffer"].lerp_(param.grad, 1 - group["momentum"])
                o = quintic(torch.lerp(param.grad, momentum, group["momentum"]))
                v = state["second_momentum_buffer"]
                v.lerp_(o.square().mean(-1, keepdim=True), 1 - group["beta2"])
                normalized = o / v.sqrt()
                size = o.norm() / normalized.norm() * max(1, m / n) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(normalized * size * group["lr"])


def quintic(x: Tensor) -> Tensor:
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6)).double()


def groups_of(model: nn.Module, **kwargs) -> list[dict]:
    """Both Linears hidden."""
    return param_groups(model, overrides={"[02].weight": "normuon"}, **kwargs)


def train(model: nn.Module, optimizers, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 2]


def assert_same_weights(ours: nn.Module, theirs: nn.Module, start: nn.Module, bound: float) -> None:
    zipped = zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True)
    for a, b, c in zipped:
        assert relative_to_distance_moved(a.detach(), b.detach(), c.detach()) < bound


def clone(model: nn.Module) -> nn.Module:
    other = small_model()
    other.load_state_dict(model.state_dict())
    return other


def test_authors_normuon_goes_on_as_if_nothing_had_happened():
    """With their scaling and learning rate the ten steps after the switch are theirs."""
    theirs = small_model()
    for param in theirs.parameters():
        param.requires_grad_(param.ndim == 2)
    old = AuthorsNorMuon(matrices(theirs))
    train(theirs, [old], 10)
    start, ours = clone(theirs), clone(theirs)
    for param in ours.parameters():
        param.requires_grad_(param.ndim == 2)
    new = NorMuon(groups_of(ours), lr=0.02, weight_decay=0.0, adjust_lr_fn="original", eps=0.0)
    state = convert_state(old.state_dict(), to=new, params=matrices(ours), quiet=True)
    new.load_state_dict(state)
    train(theirs, [old], 10, first=10)
    train(ours, [new], 10, first=10)
    # Both in float64, where 10 steps of rounding stay far below 1e-9 of the distance.
    for a, b, c in zip(matrices(ours), matrices(theirs), matrices(start), strict=True):
        assert relative_to_distance_moved(a.detach(), b.detach(), c.detach()) < 1e-9


class TorchOfFloat64:
    """torch, but for the dtype that it takes for bfloat16."""

    bfloat16 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def test_muon_and_adamw_go_on_together(monkeypatch):
    """Two old optimizers become one: `muon` groups step as torch.optim.Muon, the rest as AdamW."""
    # torch.optim.Muon casts to bfloat16, by .bfloat16() or, from torch 2.15 on, by .to(); this
    # keeps float64, so that the two can be compared.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
    monkeypatch.setattr("torch.optim._muon.torch", TorchOfFloat64())
    theirs = small_model()
    others = [param for param in theirs.parameters() if param.ndim < 2]
    muon = torch.optim.Muon(matrices(theirs), lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    train(theirs, [muon, adamw], 10)
    start, ours = clone(theirs), clone(theirs)
    groups = param_groups(ours, overrides={"[02].weight": "muon"})
    for group in groups:
        group["lr"] = 0.02 if group["algorithm"] == "muon" else 1e-3
    new = NorMuon(groups, adjust_lr_fn="original", weight_decay=0.0)
    old_order = [
        *matrices(ours),
        *(param for param in ours.parameters() if param.ndim < 2),
    ]
    state = convert_state(
        muon.state_dict(), adamw.state_dict(), to=new, params=old_order, quiet=True
    )
    new.load_state_dict(state)
    train(theirs, [muon, adamw], 10, first=10)
    train(ours, [new], 10, first=10)
    # torch.optim.Muon adds 1e-7 to the norm that Newton-Schulz divides by.
    assert_same_weights(ours, theirs, start, 1e-4)


def test_adamws_half_goes_on_bit_by_bit():
    theirs = small_model()
    old = torch.optim.AdamW(theirs.named_parameters(), lr=1e-3, betas=(0.9, 0.95))
    train(theirs, [old], 5)
    groups = groups_of(theirs, other={"weight_decay": 0.01})
    new = NorMuon(groups, lr=1e-3)
    new.load_state_dict(convert_state(old.state_dict(), to=new, quiet=True))
    norm = theirs[1].weight
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(new.state[norm][key].double(), old.state[norm][key].double())
    hidden = theirs[0].weight
    assert torch.equal(new.state[hidden]["momentum_buffer"], old.state[hidden]["exp_avg"])
    assert new.state[hidden]["second_momentum_buffer"].count_nonzero() == 0


def test_groups_without_an_optimizer_and_a_saved_file_are_enough():
    """What a script has on hand: a file, and the groups it is about to train."""
    model = small_model()
    old = torch.optim.AdamW([("module." + n, p) for n, p in model.named_parameters()], lr=3e-4)
    train(model, [old], 2)
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    groups = groups_of(model)
    new = NorMuon(groups, lr=3e-4)
    new.load_state_dict(convert_state(torch.load(file, weights_only=True), to=groups, quiet=True))
    assert torch.equal(
        new.state[model[2].weight]["momentum_buffer"], old.state[model[2].weight]["exp_avg"]
    )
    assert [group["lr"] for group in new.param_groups] == [3e-4, 3e-4]


def test_names_as_keys_match_too():
    """torch.distributed.checkpoint.state_dict keys the state by parameter names."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_model()
    old = torch.optim.AdamW(model.parameters(), lr=3e-4)
    train(model, [old], 2)
    saved = get_optimizer_state_dict(model, old)
    state = convert_state(saved, to=groups_of(model), quiet=True)
    assert sum("momentum_buffer" in entry for entry in state["state"].values()) == 2


def test_what_starts_at_zero_and_what_to_do_with_the_rate_is_printed(capsys):
    model = small_model()
    muon = torch.optim.Muon(matrices(model), lr=0.02)
    train(model, [muon], 1)
    convert_state(muon, to=groups_of(model))
    assert capsys.readouterr().out.splitlines() == [
        "normuon.convert_state: 2 x Muon's first moment carried over",
        "normuon.convert_state: 4 start at zero: 0.bias, 1.weight, 1.bias, 2.bias",
        "normuon.convert_state: learning rate: keep Muon's 0.02 with adjust_lr_fn='original'; with "
        "the default scaling take 0.037, and weight decay times 0.55",
    ]


def test_second_moments_of_another_layout_start_at_zero():
    """The authors' rows of a Conv1D are inputs: equal sizes must not carry them over."""
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    old = AuthorsNorMuon([weight])
    weight.grad = torch.randn_like(weight)
    old.step()
    group = {"params": [("w", weight)], "view": MatrixView.transposed()}
    state = convert_state(old, to=[group], quiet=True)["state"][0]
    assert state["second_momentum_buffer"].count_nonzero() == 0
    assert torch.equal(state["momentum_buffer"], old.state[weight]["momentum_buffer"])


def stepped(optimizer_class, model: nn.Module, **options) -> torch.optim.Optimizer:
    optimizer = optimizer_class(model.parameters(), **options)
    train(model, [optimizer], 1)
    return optimizer


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            lambda model: convert_state(
                stepped(torch.optim.AdamW, model).state_dict(), to=groups_of(model)
            ),
            r"^param_groups\[0\]\['params'\]\[0\]: this state_dict has no parameter names; give "
            r"the old optimizer itself, or its parameters in order",
        ),
        (
            lambda model: convert_state(
                stepped(torch.optim.AdamW, model), to=param_groups(model[:1])
            ),
            r"^param_groups\[0\]\['params'\]\[2\]: this parameter is not in any group of to=",
        ),
        (
            lambda model: convert_state(
                stepped(torch.optim.AdamW, model),
                to=groups_of(model),
                params=list(model.parameters())[::-1],
            ),
            r"^0\.weight \[10, 6\]: its first moment has shape \[6\]; check the order of params=",
        ),
        (
            lambda model: convert_state(
                stepped(torch.optim.AdamW, model), to=groups_of(model), params=[]
            ),
            "^number of parameters: 0 in params=, 6 in the old optimizers",
        ),
        (
            lambda model: convert_state(
                stepped(torch.optim.Adam, model, weight_decay=0.1), to=groups_of(model)
            ),
            r"^torch\.optim\.Adam with weight_decay=0\.1 adds the decay to its first moment",
        ),
        (
            lambda model: convert_state(torch.optim.AdamW(model.parameters()), to=groups_of(model)),
            "^no parameter of the given optimizers has any state to convert",
        ),
        (
            lambda model: convert_state(model.state_dict(), to=groups_of(model)),
            r"^convert_state takes optimizers and their state_dicts .* got \['0\.bias'",
        ),
        (
            lambda model: convert_state(
                {
                    "state": {"w": {"exp_avg": torch.zeros(2)}},
                    "param_groups": [
                        {"params": ["w"], **torch.optim.AdamW([torch.ones(1)]).defaults}
                    ],
                },
                to=groups_of(model),
            ),
            r"^w: its state has \['exp_avg'\], but lacks AdamW's \['step', 'exp_avg_sq'\]",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(convert, message):
    with pytest.raises(ValueError, match=message):
        convert(small_model())


class DionsNorMuon(torch.optim.Optimizer):
    """dion's NorMuon without its parallel parts: what its state means is what is tested."""

    def __init__(self, params, **options):
        defaults = {
            "lr": 0.01,
            "mu": 0.95,
            "muon_beta2": 0.95,
            "beta1": 0.9,
            "beta2": 0.95,
            "step": 0,
        }
        defaults |= {
            "weight_decay": 0.0,
            "cautious_wd": False,
            "algorithm": "normuon",
            "epsilon": 1e-8,
        }
        defaults |= {"nesterov": False, "flatten": False, "adjust_lr": "rms_norm"}
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                if group["algorithm"] == "adamw":
                    self._step_adamw(param, state, group)
                    continue
                state.setdefault("variance_neuron", torch.zeros_like(param[..., 0:1]))
                m, n = param.shape
                o = quintic(state["momentum"].mul_(group["mu"]).add_(param.grad))
                v = state["variance_neuron"].lerp_(o.square().mean(-1, keepdim=True), 0.05)
                normalized = o / (v.sqrt() + 1e-8)
                size = o.norm() / normalized.norm() * 0.2 * max(m, n) ** 0.5
                param.sub_(normalized * size * group["lr"])

    def _step_adamw(self, param: Tensor, state: dict, group: dict) -> None:
        state.setdefault("variance", torch.zeros_like(param))
        state.setdefault("step_dev", torch.zeros(())).add_(1)
        mean = state["momentum"].lerp_(param.grad, 0.1)
        square = state["variance"].mul_(0.95).addcmul_(param.grad, param.grad, value=0.05)
        step = int(state["step_dev"])
        root = (square / (1 - 0.95**step)).sqrt() + 1e-8
        param.sub_(mean / (1 - 0.9**step) / root * group["lr"])


def dions_groups(model: nn.Module) -> list[dict]:
    groups = groups_of(model)
    return [
        {"params": [p for _, p in group["params"]], "algorithm": group["algorithm"]}
        for group in groups
    ]


def test_dions_state_goes_on_as_ours(capsys):
    """The next momentum is the mean of the same gradients, and v and AdamW's half are kept."""
    model = small_model()
    dion = DionsNorMuon(dions_groups(model))
    train(model, [dion], 4)
    groups = groups_of(model)
    optimizer = NorMuon(groups, lr=0.01, nesterov=False, weight_decay=0.0)
    optimizer.load_state_dict(convert_state(dion, to=optimizer))
    assert "dion" not in capsys.readouterr().err
    twin = small_model()
    ours = NorMuon(groups_of(twin), lr=0.01, nesterov=False, weight_decay=0.0)
    twin.load_state_dict(model.state_dict())
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        theirs = dion.state[param]
        state = optimizer.state[param]
        if "variance" in theirs:
            assert torch.equal(state["exp_avg"], theirs["momentum"])
            assert torch.equal(state["exp_avg_sq"], theirs["variance"])
            assert float(state["step"]) == 4
        else:
            torch.testing.assert_close(state["momentum_buffer"], 0.05 * theirs["momentum"])
            assert torch.equal(state["second_momentum_buffer"], theirs["variance_neuron"][:, 0])
        ours.state[other].update({key: value.clone() for key, value in state.items()})
    # One more step of both: theirs keeps O's own norm, which five Newton-Schulz steps bring near
    # to that of an orthogonal matrix, where ours sets it.
    start = [param.detach().clone() for param in model.parameters()]
    train(model, [dion], 1, first=4)
    train(twin, [ours], 1, first=4)
    for before, theirs, mine in zip(start, model.parameters(), twin.parameters(), strict=True):
        moved, expected = (mine - before).detach().flatten(), (theirs - before).detach().flatten()
        cosine = torch.nn.functional.cosine_similarity(moved, expected, dim=0)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


def test_dions_older_state_has_its_step_in_the_group():
    model = small_model()
    dion = DionsNorMuon(dions_groups(model))
    train(model, [dion], 3)
    for state in dion.state.values():
        state.pop("step_dev", None)
    found = convert_state(dion, to=groups_of(model), quiet=True)
    steps = {float(state["step"]) for state in found["state"].values() if "step" in state}
    assert steps == {3.0}


def test_dions_spectral_scaling_is_told(capsys):
    model = small_model()
    dion = DionsNorMuon(dions_groups(model), adjust_lr="spectral_norm")
    train(model, [dion], 1)
    convert_state(dion, to=groups_of(model))
    printed = capsys.readouterr().out
    assert "adjust_lr='spectral_norm' with adjust_lr_fn='spectral_unclamped'" in printed


def test_a_scaling_of_a_later_torch_is_told(capsys):
    model = small_model()
    muon = torch.optim.Muon(matrices(model), lr=0.02)
    train(model, [muon], 1)
    muon.param_groups[0]["adjust_lr_fn"] = "later"
    convert_state(muon, to=groups_of(model))
    printed = capsys.readouterr().out
    assert "Muon's 0.02 with adjust_lr_fn='later' cannot be converted: tune it" in printed


def test_dions_lion_is_refused():
    model = small_model()
    groups = dions_groups(model)
    groups[-1]["algorithm"] = "lion"
    dion = DionsNorMuon(groups)
    dion.state[groups[-1]["params"][0]] = {"momentum": torch.zeros(1)}
    with pytest.raises(ValueError, match="dion group with algorithm='lion' cannot be converted"):
        convert_state(dion, to=groups_of(model))


def test_deepspeeds_muon(capsys):
    """The real one, without ZeRO: its momentum is a mean, and its other half AdamW's."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    model = small_model()
    by_kind = {group["algorithm"]: group["params"] for group in groups_of(model)}
    adamw = [p for g in groups_of(model) if g["algorithm"] == "adamw" for _, p in g["params"]]
    muon = MuonWithAuxAdam(
        [
            {"params": [p for _, p in by_kind["normuon"]], "use_muon": True, "lr": 0.02},
            {"params": adamw, "use_muon": False, "lr": 1e-3},
        ]
    )
    with torch.compiler.set_stance("force_eager"):
        train(model, [muon], 3)
    optimizer = NorMuon(groups_of(model), lr=1e-3)
    optimizer.load_state_dict(convert_state(muon, to=optimizer))
    for param in model.parameters():
        theirs, state = muon.state[param], optimizer.state[param]
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            assert (name in theirs) == (name in state)
            if name in theirs:
                assert torch.equal(state[name], theirs[name])
    assert "2 x Muon's first moment carried over" in capsys.readouterr().out
