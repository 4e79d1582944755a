"""Parameters that change after the optimizer was built, and what of it all is saved."""

from __future__ import annotations

import collections
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from normuon import NorMuon, convert_state, param_groups


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))


def train(model, optimizer, steps=2, dtype=None):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        x = torch.randn(4, 6, dtype=dtype or next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()


def optimizer_of(model, **options):
    return NorMuon(param_groups(model), lr=0.01, **options)


def dtypes(optimizer, key):
    return {s[key].dtype for s in optimizer.state.values() if key in s}


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_state_follows_a_model_that_changes_its_dtype(options):
    model = model_of()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer)
    model.bfloat16()
    train(model, optimizer)
    assert dtypes(optimizer, "momentum_buffer") == dtypes(optimizer, "exp_avg") == {torch.bfloat16}
    assert dtypes(optimizer, "second_momentum_buffer") == {torch.float32}
    model[1].float()  # As those do who keep norms in float32.
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert dtypes(optimizer, "exp_avg") == {torch.bfloat16, torch.float32}
    model.float()
    train(model, optimizer)
    assert dtypes(optimizer, "momentum_buffer") == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_gradients_may_have_a_dtype_of_their_own(options):
    model = model_of().bfloat16()
    optimizer = optimizer_of(model, **options)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad_dtype = None
        param.grad = torch.randn(param.shape, dtype=torch.float32)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_model_built_on_the_meta_device_trains_once_it_has_values():
    with torch.device("meta"):
        model = model_of()
    optimizer = optimizer_of(model)
    values = model_of().state_dict()
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None:  # In place, as FSDP2's `to_empty` leaves its parameters.
                value = nn.Parameter(values[f"{name}.{key}"].clone())
                torch.utils.swap_tensors(param, value)
    train(model, optimizer)
    assert not any(t.is_meta for state in optimizer.state.values() for t in state.values())
    expected = model_of()
    train(expected, optimizer_of(expected))
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"equilibrate": True}], ids=str)
@pytest.mark.parametrize("algorithm", ["normuon", "muon"])
def test_the_default_device_is_not_used(algorithm, options):
    """Whatever names no device would be made on the meta device, and have no values."""
    model = model_of()
    torch.set_default_device("meta")
    try:
        groups = param_groups(model, hidden={"algorithm": algorithm})
        optimizer = NorMuon(groups, lr=0.01, **options)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        for _ in range(2):
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(param.isfinite().all() for param in model.parameters())
    assert not any(t.is_meta for state in optimizer.state.values() for t in state.values())


def test_a_frozen_parameter_does_not_move_though_its_gradient_is_there():
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    for param in model.parameters():
        param.requires_grad_(False)
        param.grad = torch.zeros_like(param)
    before = [param.clone() for param in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


PLAIN = (type(None), bool, int, float, str)


def plain(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return type(value) in PLAIN  # Numpy's float64 is a float, but not to weights_only loading.


@pytest.mark.parametrize("how", [{"full_state_dict": True}, {"cpu_offload": True}, {}], ids=str)
def test_saved_groups_hold_plain_values_only(how):
    model = model_of()
    options = {"ns_dtype": torch.float32, "momentum_dtype": torch.bfloat16}
    optimizer = optimizer_of(model, **options)
    train(model, optimizer)
    for group in optimizer.state_dict()["param_groups"]:
        assert all(plain(value) for value in group.values()), group
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**how))
    assert all(plain(value) for group in saved["param_groups"] for value in group.values())


@pytest.mark.parametrize("form", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=str)
def test_a_dtype_loads_in_every_form_that_it_was_saved_in(form):
    model = model_of()
    optimizer = optimizer_of(model)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["momentum_dtype"] = form
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum_dtype"] == torch.bfloat16
    assert dtypes(optimizer, "momentum_buffer") == {torch.bfloat16}


def test_options_of_the_machine_are_the_live_optimizers():
    model = model_of()
    saved = optimizer_of(model, ns_dtype=torch.float32, max_scratch_bytes=1000).state_dict()
    for group in saved["param_groups"]:
        group["ns_backend"] = "kernels"  # Which do not run on a CPU.
    optimizer = optimizer_of(model, ns_dtype=torch.float64)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["ns_dtype"], group["ns_backend"]) == (torch.float64, "auto")
    assert group["max_scratch_bytes"] is None
    train(model, optimizer)


def named(model, order):
    names = [(name, param) for name, param in model.named_parameters() if param.ndim == 2]
    return [names[place] for place in order]


def squares() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))


@pytest.mark.parametrize("through_file", [False, True])
def test_state_finds_its_parameter_by_name_when_the_order_has_changed(through_file):
    model = squares()
    optimizer = NorMuon(named(model, [0, 1, 2]), lr=0.01)
    for number, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, number + 1.0)
    optimizer.step()
    saved = optimizer.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    other = NorMuon([("module." + n, p) for n, p in named(model, [2, 0, 1])], lr=0.01)
    other.load_state_dict(saved)
    for param in model.parameters():
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[param][key], value)


def test_names_that_are_partly_others_are_refused():
    model = squares()
    saved = NorMuon(named(model, [0, 1, 2])).state_dict()
    first, second, _ = model.parameters()
    fresh = nn.Parameter(torch.zeros(8, 8))
    moved = NorMuon([("new", fresh), ("0.weight", first), ("1.weight", second)])
    with pytest.raises(ValueError, match=r"'0\.weight' has another position in the checkpoint"):
        moved.load_state_dict(saved)
    groups = [[("0.weight", first)], [("1.weight", second)]]
    saved = NorMuon([{"params": group} for group in groups]).state_dict()
    swapped = NorMuon([{"params": group} for group in reversed(groups)])
    with pytest.raises(ValueError, match=r"'1\.weight' is in param_groups\[1\] of the checkpoint"):
        swapped.load_state_dict(saved)


def test_equal_names_of_two_models_convert_in_order():
    generator, discriminator = squares(), squares()
    for number, param in enumerate((*generator.parameters(), *discriminator.parameters())):
        param.grad = torch.full_like(param, number + 1.0)
    both = [*generator.named_parameters(), *discriminator.named_parameters()]
    adamw = torch.optim.AdamW([{"params": both[:3]}, {"params": both[3:]}])
    adamw.step()
    everything = {"overrides": {"*": "normuon"}}
    new = NorMuon(
        [*param_groups(generator, **everything), *param_groups(discriminator, **everything)]
    )
    new.load_state_dict(convert_state(adamw.state_dict(), to=new, quiet=True))
    for param in (*generator.parameters(), *discriminator.parameters()):
        assert torch.equal(new.state[param]["momentum_buffer"], adamw.state[param]["exp_avg"])
    one = NorMuon(param_groups(generator, **everything))
    with pytest.raises(ValueError, match=r"0\.weight: 2 parameters of the old optimizers and 1 of"):
        convert_state(adamw.state_dict(), to=one, quiet=True)


@pytest.mark.parametrize("saved", [False, True], ids=["optimizer", "state_dict"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_another_optimizer_built_on_our_groups_converts(kind, saved):
    model = model_of()
    groups = param_groups(model)
    old = kind(groups if kind is torch.optim.AdamW else groups[:1])
    train(model, old)
    source = copy.deepcopy(old.state_dict()) if saved else old
    for group in source["param_groups"] if saved else ():
        group.pop("view", None)
    new = optimizer_of(model)
    new.load_state_dict(convert_state(source, to=new, quiet=True))
    key = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    assert torch.equal(
        new.state[model[0].weight]["momentum_buffer"], old.state[model[0].weight][key]
    )


def test_the_step_of_float16_parameters_is_free_of_scale():
    """A float16 momentum of such gradients is zero or noise; the step is not."""
    torch.manual_seed(0)
    start, grads = torch.randn(16, 24), [torch.randn(16, 24) for _ in range(4)]
    moved = []
    for scale in (1.0, 3e-7):
        param = nn.Parameter(start.half())
        given = {"adjust_lr_fn": "original", "ns_dtype": torch.float32}
        optimizer = NorMuon([param], lr=1.0, weight_decay=0.0, **given)
        for grad in grads:
            param.grad_dtype = torch.float32
            param.grad = grad * scale
            optimizer.step()
        moved.append(param.detach().float() - start.half().float())
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=2e-2)


def gradients(params, seed):
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)


def bfloat16_pair():
    """Two equal models with optimizers that have taken two steps."""
    pair = []
    for _ in range(2):
        model = model_of().bfloat16()
        optimizer = optimizer_of(model)
        for seed in range(2):
            gradients(model.parameters(), seed)
            optimizer.step()
        pair.append((model, optimizer))
    return pair


def differing(pair) -> list[str]:
    """What differs after two more steps of two optimizers: weights, and state by its key."""
    for model, optimizer in pair:
        for seed in range(5, 7):
            gradients(model.parameters(), seed)
            optimizer.step()
    (one, first), (two, second) = pair
    found = []
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        found += [] if torch.equal(a, b) else ["weight"]
        states = first.state[a], second.state[b]
        assert set(states[0]) == set(states[1])
        found += [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    return found


def each_state(optimizer):
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {key: value.clone() for key, value in state.items()}


def all_state(optimizer):
    copies = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.state = collections.defaultdict(dict, copies)


@pytest.mark.parametrize("replace", [each_state, all_state])
def test_state_that_was_replaced_by_another_dict_is_what_is_stepped(replace):
    """Batches hold each parameter's dict: the old one would go on, and the new one be saved."""
    pair = bfloat16_pair()
    replace(pair[1][1])
    assert differing(pair) == []


@pytest.mark.parametrize(
    "change", [{"kahan_sum": True}, {"skip_nonfinite": True}, {"maximize": True}], ids=str
)
def test_a_group_that_was_replaced_by_another_dict_is_what_is_read(change):
    pair = bfloat16_pair()
    pair[0][1].param_groups[0].update(change)
    pair[1][1].param_groups[0] = {**pair[1][1].param_groups[0], **change}
    assert differing(pair) == []


@pytest.mark.parametrize("touch", [False, True], ids=["cleared", "cleared and looked at"])
def test_state_that_was_cleared_starts_at_zero(touch):
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    fresh = copy.deepcopy(model)
    optimizer.state.clear()
    for param in model.parameters() if touch else ():
        assert optimizer.state[param] == {}  # Which leaves an empty dict there.
    train(model, optimizer)
    train(fresh, optimizer_of(fresh))
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_groups_may_lose_parameters_between_measured_steps():
    """Rows of figures were numbered by the parameters that a group had."""
    model = squares()
    optimizer = NorMuon(named(model, [0, 1, 2]), lr=0.01)
    norms = []
    for params in ([0, 1, 2], [2, 0], [1]):
        weights = list(model.parameters())
        optimizer.param_groups[0]["params"] = [weights[place] for place in params]
        optimizer.param_groups[0]["param_names"] = [f"{place}.weight" for place in params]
        for number, param in enumerate(weights):
            param.grad = torch.eye(8) * (number + 1)
        optimizer.record_statistics()
        optimizer.step()
        figures = optimizer.statistics().matrices
        assert list(figures) == [f"{place}.weight" for place in params]
        norms.append([float(figures[f"{place}.weight"]["momentum_norm"]) for place in params])
    # Momenta are multiples of the gradients, which are 1, 2 and 3 times the identity.
    assert norms[0] == pytest.approx([norms[0][0], 2 * norms[0][0], 3 * norms[0][0]])
    assert norms[1][0] == pytest.approx(3 * norms[1][1])


def test_what_users_keep_in_the_state_stays_when_a_parameter_changes_its_dtype():
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    for state in optimizer.state.values():
        state.update(note="mine", number=3, mask=torch.ones(2))
    model.double()
    train(model, optimizer)
    assert all(
        (state["note"], state["number"], state["mask"].dtype) == ("mine", 3, torch.float32)
        for state in optimizer.state.values()
    )


def numbered_by_words(saved):
    saved["state"] = {str(key): value for key, value in saved["state"].items()}


def with_array(saved):
    saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (numbered_by_words, "the checkpoint's state belongs to none of its parameters: its first "),
        (with_array, r"0\.weight \[8, 6\]: the checkpoint's 'momentum_buffer' is a ndarray, not"),
        (lambda saved: saved.pop("param_groups"), "this is not an optimizer's state_dict: it has"),
        (lambda saved: saved.pop("state"), "this is not an optimizer's state_dict: it has the key"),
    ],
)
def test_a_checkpoint_whose_state_cannot_be_read_is_refused(change, message):
    """Keys that JSON has turned into words would silently start the state at zero."""
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.load_state_dict(saved)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][key]) for key, value in state.items())


def test_numbers_of_numpy_are_saved_as_numbers():
    """LambdaLR with a function of numpy leaves them in the groups; weights_only refuses them."""
    model = model_of()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: np.float32(1 / (step + 1))
    )
    train(model, optimizer)
    scheduler.step()
    optimizer.param_groups[0]["ns_steps"] = np.int64(5)
    train(model, optimizer)
    saved = optimizer.state_dict()
    assert all(plain(value) for group in saved["param_groups"] for value in group.values())
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
def test_conversion_keeps_the_count_of_skipped_steps(algorithm):
    weight = nn.Parameter(torch.ones(4, 4))
    group = {"params": [weight], "algorithm": algorithm}
    old = NorMuon([group], skip_nonfinite=True)
    weight.grad = torch.full((4, 4), float("nan"))
    old.step()
    new = NorMuon([group], skip_nonfinite=True, momentum_dtype=torch.int8)
    new.load_state_dict(convert_state(old, to=new, quiet=True))
    assert new.state[weight]["skipped_steps"].tolist() == [1]
