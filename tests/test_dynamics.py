"""AdamW and SGD against torch.optim; their adjoints against autograd."""

import itertools

import pytest
import torch
from torch import nn

from selectflow.core.optim import SGD, AdamW, Adjoint, State
from selectflow.core.params import Params
from selectflow.core.pieces import in_pieces
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.update import Update


def quadratic():
    torch.manual_seed(0)
    return nn.ParameterDict(
        {
            name: nn.Parameter(torch.randn(shape, dtype=torch.float64))
            for name, shape in {"w": (3, 4), "b": (4,), "s": ()}.items()
        }
    )


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return Params(
        (name, torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for name, p in model.named_parameters()
    )


def adamw(params, **options):
    return torch.optim.AdamW(params, **options)


OPTIMIZERS = [
    *(
        (
            f"{kind.__name__}-{beta2}-{decay}-{eps}",
            lambda p, k=kind, b=beta2, d=decay, e=eps: k(
                p, lr=0.05, betas=(0.8, b), weight_decay=d, eps=e
            ),
        )
        for kind, beta2, decay, eps in itertools.product(
            (torch.optim.AdamW, torch.optim.Adam), (0.9, 0.999), (0.0, 0.1), (1e-8, 1e-3)
        )
    ),
    *(
        (
            f"SGD-{momentum}-{damp}-{nesterov}-{decay}",
            lambda p, m=momentum, a=damp, n=nesterov, d=decay: torch.optim.SGD(
                p, lr=0.05, momentum=m, dampening=a, nesterov=n, weight_decay=d
            ),
        )
        for momentum, damp, nesterov in [
            (0.0, 0.0, False),
            (0.9, 0.0, False),
            (0.9, 0.5, False),
            (0.9, 0.0, True),
        ]
        for decay in (0.0, 0.1)
    ),
]


def two_groups(model, build):
    """Two groups with hyperparameters of their own."""
    optimizer = build([{"params": [model["w"]]}, {"params": [model["b"], model["s"]], "lr": 0.01}])
    optimizer.param_groups[1]["weight_decay"] = 0.02
    if "betas" in optimizer.param_groups[1]:
        optimizer.param_groups[1].update(betas=(0.7, 0.95), eps=1e-6)
    return optimizer


def run_both(model, optimizer, num, max_grad_norm=None, scheduler=None):
    """(change of torch's parameters, change of ours) after `num` updates."""
    reader = OptimizerReader(model, optimizer, scheduler, max_grad_norm)
    start = reader.state().params.map(torch.clone)
    state = State(*(part.map(torch.clone) for part in reader.state()))
    for update in reader.updates(num):
        grad = gradients(model, sum(rule.step for rule in update.rules))
        state = update.advance(state, grad)
        for name, param in model.named_parameters():
            param.grad = grad[name].clone()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return reader.state().params - start, state.params - start


def largest(params):
    return max(float(tensor.abs().max()) for tensor in params.values())


@pytest.mark.parametrize(("name", "build"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
@pytest.mark.parametrize("warm", [0, 3])
def test_updates_equal_torch_optim(name, build, warm):
    model = quadratic()
    optimizer = two_groups(model, build)
    run_both(model, optimizer, warm)
    theirs, ours = run_both(model, optimizer, 5)
    assert largest(theirs) > 1e-2
    assert largest(theirs - ours) < 1e-12


@pytest.mark.parametrize("max_grad_norm", [0.5, 100.0])
def test_clipping_equals_torch(max_grad_norm):
    model = quadratic()
    optimizer = two_groups(model, OPTIMIZERS[-1][1])
    theirs, ours = run_both(model, optimizer, 5, max_grad_norm)
    assert largest(theirs - ours) < 1e-12


@pytest.mark.parametrize("build", [OPTIMIZERS[0][1], OPTIMIZERS[-1][1]], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("limit", [32, 40])  # `w` has more bytes than that, `b` 32, `s` 8
def test_an_update_made_in_parts_is_the_same_to_the_bit(monkeypatch, build, limit):
    model = quadratic()
    optimizer = two_groups(model, build)
    run_both(model, optimizer, 3, 0.5)
    reader = OptimizerReader(model, optimizer, None, 0.5)
    (update,), state, grad = reader.updates(1), reader.state(), gradients(model, 9)
    adjoint = Adjoint(*(part.map(torch.cos) for part in state))

    def everything():
        after = update.advance(state, grad)
        gamma, before = update.adjoint(adjoint, state, after, grad)
        return *after, gamma, *before, update.immediate(state, grad), update.masked(gamma, after)

    expected = everything()
    assert [names for _, names in update.parts(grad)] == [["w"], ["b", "s"]]
    monkeypatch.setattr("selectflow.core.update._PART_BYTES", limit)
    found = everything()
    assert len(list(update.parts(grad))) == (3 if limit == 32 else 2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
            torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        ],
        [4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_updates_follow_the_scheduler_and_leave_it_alone(name):
    model = quadratic()
    optimizer = two_groups(model, lambda p: torch.optim.AdamW(p, lr=0.05))
    scheduler = SCHEDULERS[name](optimizer)
    run_both(model, optimizer, 2, scheduler=scheduler)
    before = repr(optimizer.param_groups), repr(scheduler.state_dict())
    predicted = OptimizerReader(model, optimizer, scheduler).updates(6)
    assert len({update.rules[0].lr for update in predicted}) > 1
    assert before == (repr(optimizer.param_groups), repr(scheduler.state_dict()))
    theirs, ours = run_both(model, optimizer, 6, scheduler=scheduler)
    assert largest(theirs - ours) < 1e-12


def test_skipped_parameters_keep_their_own_step_count():
    model = quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model["w"].grad = torch.ones_like(model["w"])
    optimizer.step()  # b and s have no gradient: torch leaves them untouched
    rules = OptimizerReader(model, optimizer).updates(1)[0].rules
    assert {rule.names: rule.step for rule in rules} == {("w",): 2, ("b", "s"): 1}
    theirs, ours = run_both(model, optimizer, 3)
    assert largest(theirs - ours) < 1e-12


RULES = [
    AdamW(("x",), 1, 0.1, 0.9, 0.99, 1e-3, 0.1),
    AdamW(("x",), 7, 0.1, 0.9, 0.99, 1e-8, 0.1),
    AdamW(("x",), 7, 0.1, 0.9, 0.99, 1e-3, 0.1, decoupled=False),
    SGD(("x",), 1, 0.1, 0.0, 0.0, 0.1, False),
    SGD(("x",), 1, 0.1, 0.9, 0.5, 0.1, False),
    SGD(("x",), 2, 0.1, 0.9, 0.5, 0.1, False),
    SGD(("x",), 2, 0.1, 0.9, 0.0, 0.1, True),
]


def random_state(rule, num=6):
    torch.manual_seed(0)
    m = Params(x=torch.randn(num, dtype=torch.float64))
    v = Params(x=torch.rand(num, dtype=torch.float64) + 0.1)
    if rule.step == 1:
        m, v = m.zeros_like(), v.zeros_like()
    params = Params(x=torch.randn(num, dtype=torch.float64))
    grad = Params(x=torch.randn(num, dtype=torch.float64))
    return State(params, m, v if isinstance(rule, AdamW) else Params()), grad


def autograd_adjoint(rule, adjoint, state, grad):
    """The adjoint by autograd through `advance`, whose formulas the tests above pin to torch."""
    leaves = [part["x"].clone().requires_grad_() for part in (*state, grad) if part]
    parts = [Params(x=leaf) for leaf in leaves[:-1]] + [Params()] * (4 - len(leaves))
    after = rule.advance(State(*parts), Params(x=leaves[-1]))
    pairs = [(part["x"], a["x"]) for part, a in zip(after, adjoint, strict=True) if part]
    value = sum((tensor * a).sum() for tensor, a in pairs)
    return torch.autograd.grad(value, leaves, materialize_grads=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_adjoint_equals_autograd_for_several_queries(rule):
    state, grad = random_state(rule)
    queries = Adjoint(*(part.map(lambda t: torch.randn(3, *t.shape).double()) for part in state))
    gamma, before = rule.adjoint(queries, state, rule.advance(state, grad), grad)
    for query in range(3):
        single = Adjoint(*(part.map(lambda t, q=query: t[q]) for part in queries))
        expected = autograd_adjoint(rule, single, state, grad)
        found = [part["x"][query] for part in (*before, gamma) if part]
        # `a` lacks only H gamma; the gradient here does not depend on theta, so H = 0.
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-10 * (1 + theirs.abs().max())


def test_adjoint_where_the_second_moment_is_zero():
    """torch's own backward is 0 * inf there; the limit v' -> 0 with m' = g = 0 is linear in m'."""
    rule = AdamW(("x",), 3, 0.1, 0.9, 0.99, 1e-3, 0.0)
    zero = Params(x=torch.zeros(1, dtype=torch.float64))
    state, one = (
        State(Params(x=torch.ones(1).double()), zero, zero),
        Params(x=torch.ones(1).double()),
    )
    gamma, before = rule.adjoint(Adjoint(one, zero, one), state, rule.advance(state, zero), zero)
    c1 = 1 - 0.9**3
    assert float(gamma["x"]) == pytest.approx(-(0.1 / c1) / 1e-3 * 0.1, rel=1e-10)
    assert float(before.exp_avg_sq["x"]) == pytest.approx(0.99, rel=1e-10)
    assert float(before.exp_avg["x"]) == pytest.approx(-0.9 * (0.1 / c1) / 1e-3, rel=1e-10)


def clipped_by_hand(grad, limit):
    """What `clip_grad_norm_` makes of gradients, with its derivative."""
    norm = sum(tensor.square().sum() for tensor in grad.values()).sqrt()
    return grad.map(lambda tensor: tensor * (limit / (norm + 1e-6)).clamp(max=1.0))


@pytest.mark.parametrize("limit", [0.5, 100.0])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_the_adjoint_goes_through_clipping(leading, limit):
    """By autograd: |u|, the norm that all groups share, moves with every entry of u."""
    model = quadratic()
    optimizer = two_groups(model, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1))
    run_both(model, optimizer, 3, limit)
    reader = OptimizerReader(model, optimizer, None, limit)
    (update,), state, grad = reader.updates(1), reader.state(), gradients(model, 9)
    assert (update.clip_scale(grad) < 1) == (limit < 1)
    after = update.advance(state, grad)
    queries = Adjoint(
        *(part.map(lambda t: torch.randn((*leading, *t.shape)).double()) for part in state)
    )
    gamma, _ = update.adjoint(queries, state, after, grad)
    plain = Update(update.rules)
    for query in itertools.product(*map(range, leading)):
        leaves = grad.map(lambda t: t.clone().requires_grad_())
        moved = plain.advance(state, clipped_by_hand(leaves, limit))
        parts = zip(moved, queries, strict=True)
        value = sum((part[n] * a[n][query]).sum() for part, a in parts for n in part)
        expected = Params(zip(leaves, torch.autograd.grad(value, [*leaves.values()]), strict=True))
        found = gamma.map(lambda t, q=query: t[q])
        assert (found - expected).norm() < 1e-12 * expected.norm()


def test_nothing_is_gained_along_a_clipped_gradient():
    """By hand: u -> (1 + x) u leaves g, so gamma . u = s (u . gamma_g) 1e-6 / (|u| + 1e-6)."""
    rule = SGD(("x",), 1, 0.1, 0.0, 0.0, 0.0, False)
    u = Params(x=torch.tensor([3.0, 4.0]).double())
    state = State(u.zeros_like(), Params(), Params())
    update = Update((rule,), 0.5)
    one = Adjoint(Params(x=torch.ones(2).double()), Params(), Params())
    gamma, _ = update.adjoint(one, state, update.advance(state, u), u)
    s = 0.5 / (5 + 1e-6)
    assert float(gamma.dot(u)) == pytest.approx(s * -0.1 * 7 * 1e-6 / (5 + 1e-6), rel=1e-6)
    along = -0.1 * 7 / (5 * (5 + 1e-6))
    expected = [s * (-0.1 - along * 3), s * (-0.1 - along * 4)]
    assert gamma["x"].tolist() == pytest.approx(expected, rel=1e-12)


def test_immediate_ignores_entries_without_a_second_moment():
    rule = AdamW(("x",), 4, 0.1, 0.9, 0.99, 1e-8, 0.0)
    v = Params(x=torch.tensor([0.0, 4.0], dtype=torch.float64))
    state = State(v, v, v)
    gamma = rule.immediate(state, Params(x=torch.ones(2).double()), torch.tensor(1e-3))
    q = 2 / (1 - 0.99**3) ** 0.5 + 1e-8
    expected = -0.1 * 0.1 / (1 - 0.9**4) / q
    assert gamma["x"].tolist() == pytest.approx([0.0, expected], rel=1e-12)


class TestRefusals:
    def test_unknown_optimizers_are_named(self):
        model = nn.Linear(2, 2)
        with pytest.raises(TypeError, match=r"torch.optim.AdamW.*got torch.optim.*Adafactor"):
            OptimizerReader(model, torch.optim.Adafactor(model.parameters()))

    @pytest.mark.parametrize("option", ["amsgrad", "maximize"])
    def test_unmodelled_options_are_named(self, option):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), **{option: True})
        with pytest.raises(ValueError, match=f"option {option} must be False"):
            OptimizerReader(model, optimizer)

    def test_foreign_parameters(self):
        model, other = nn.Linear(2, 2), nn.Linear(3, 5)
        optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()])
        with pytest.raises(ValueError, match=r"parameters of the model only, got .*\(5, 3\)"):
            OptimizerReader(model, optimizer)

    def test_nothing_to_train(self):
        model = nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="must train a parameter"):
            OptimizerReader(model, torch.optim.AdamW(model.parameters()))

    def test_state_on_another_device(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.state[model.weight]["exp_avg"] = torch.zeros(2, 2, device="meta")
        with pytest.raises(ValueError, match=r"one device, got weight on cpu .* on meta"):
            OptimizerReader(model, optimizer).state()

    def test_scheduler_without_a_future(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with pytest.raises(TypeError, match="ReduceLROnPlateau"):
            OptimizerReader(model, optimizer, scheduler)


def test_pieces_of_a_large_tensor_make_the_same_to_the_bit():
    """Also where some arguments have query dimensions, and the last piece is smaller."""
    torch.manual_seed(0)
    state = State(*(Params({"w": torch.randn(7, 3)}) for _ in range(3)))
    rows = Params({"w": torch.randn(2, 7, 3)})
    sizes = []

    def function(state, rows):
        sizes.append(len(state.params["w"]))
        return rows * state.exp_avg + state.params, State(rows, Params(), state.exp_avg_sq)

    (product, found), whole = in_pieces(function, 24, state, rows), function(state, rows)
    assert sizes == [2, 2, 2, 1, 7]
    assert torch.equal(product["w"], whole[0]["w"])
    assert torch.equal(found.params["w"], rows["w"])
    assert torch.equal(found.exp_avg_sq["w"], state.exp_avg_sq["w"])
    assert not found.exp_avg
