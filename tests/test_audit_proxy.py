"""The study of the proxy: its points against reruns by torch, its figures, and its command."""

import csv
import json

import pytest
import scipy.stats
import torch
from reference import clone, removal, rerun, slopes

from selectflow.audit import proxy
from selectflow.audit.proxy import (
    ProxyPoint,
    ProxyRun,
    measure_proxy,
    rank_of_medians,
    summarize,
)
from selectflow.audit.study import ProxyConfig, load_audit
from selectflow.cli import main
from selectflow.core.batches import take
from selectflow.core.lookahead import look_ahead
from selectflow.core.sweep import Window
from selectflow.core.torch_optim import OptimizerReader
from selectflow.fields import ConfigError
from selectflow.models.vision import image_losses

SMALL = ProxyConfig(
    study="proxy",
    name="small",
    model={"kind": "mlp", "hidden": (8,), "activation": "gelu"},
    lrs=(3e-3,),
    horizons=(0, 2, 4),
    warm_steps=20,
    num_windows=1,
    batch=8,
    num_target=30,
    num_removals=8,
    keeps=(0.5,),
)


@pytest.fixture(scope="module")
def run():
    """A run with every batch it drew, its model and optimizer as the first window found them."""
    kept = {}

    class Kept(ProxyRun):
        def batch(self, size):
            drawn = super().batch(size)
            kept.setdefault("batches", []).append(drawn)
            return drawn

        def train(self, steps):
            super().train(steps)
            kept.setdefault("start", clone(self.model, self.optimizer))
            kept["run"] = self

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(proxy, "ProxyRun", Kept)
        points = list(measure_proxy(SMALL, 3e-3, 0))
    return points, kept


def test_removals_are_reruns_by_torch(run):
    points, kept = run
    args = *kept["start"], image_losses
    window, target = kept["batches"][20:24], kept["run"].target
    for horizon in (2, 4):
        found = [p for p in points if p.change == "removal" and p.horizon == horizon]
        assert len(found) == 8
        before = rerun(*args, window[:horizon], target)
        for position, point in enumerate(found):
            how = {"weights": removal(0, position, 8)}
            after = rerun(*args, window[:horizon], target, **how)
            assert point.effect == pytest.approx(after - before, rel=1e-7)
            slope = rerun(*args, window[:horizon], target, weights=removal(0, position, 8, 1e-4))
            assert point.first == pytest.approx((slope - before) / 1e-4, rel=0.05, abs=1e-7)


def test_a_selection_keeps_the_best_scores_of_its_own_look_ahead(run):
    _, kept = run
    at, pools = kept["run"], kept["batches"][24:26]
    model, optimizer = clone(*kept["start"])
    reader = OptimizerReader(model, optimizer)
    state, updates = reader.state(), reader.updates(2)
    nominal = [torch.arange(8) for _ in pools]
    selected = at.best_scored(state, updates, pools, nominal, 2)
    batches = [take(pool, index) for pool, index in zip(pools, nominal, strict=True)]
    window = Window(at.derivatives, updates, lambda i, _: batches[i])
    ahead = look_ahead(window, state, at.target, num_sensitivities=2)
    for chosen, pool, gamma, batch in zip(
        selected, pools, ahead.sensitivities, batches, strict=True
    ):
        scores = -slopes(model, image_losses, pool, gamma)
        assert set(chosen.tolist()) == set(scores.topk(8).indices.tolist())
        image_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_selections_lower_the_target_loss_to_first_order(run):
    points = [point for point in run[0] if point.change == "keep 0.5"]
    assert [point.horizon for point in points] == [0, 2, 4]
    for point in points:
        assert point.first < 0
        assert point.fast_first + point.fast_second == pytest.approx(point.effect, rel=1e-6)
        assert point.fast_first == pytest.approx(point.first, rel=0.3)


def made_up(num=30):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    points = []
    for row, (first, second, third, fast, noise) in enumerate(values.tolist()):
        lr, horizon = (1e-3, 1e-2)[row % 2], (1, 4)[row // 2 % 2]
        effect = first + second + 0.3 * third
        points.append(
            ProxyPoint(
                change="keep 0.5", lr=lr, seed=0, window=row, horizon=horizon, first=first,
                second=second, effect=effect, fast_first=first + 0.1 * fast,
                fast_second=second + 0.1 * noise, exact_s=2.0, fast_s=1.0,
            )
        )  # fmt: skip
    return points


def test_figures_are_those_of_scipy():
    points = made_up()
    *_, whole, trusted = summarize(points)
    assert (whole.lr, whole.horizon, whole.num) == (None, None, 30)
    first, second, effect, fast_first, fast_second = torch.tensor(
        [[p.first, p.second, p.effect, p.fast_first, p.fast_second] for p in points],
        dtype=torch.float64,
    ).T

    def rank(a, b):
        return pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)

    error = (effect - first).abs()
    assert whole.sign_first == pytest.approx(float((first * effect > 0).double().mean()))
    assert whole.sign_corrected == pytest.approx(
        float(((first + second) * effect > 0).double().mean())
    )
    assert whole.rank_first == rank(first, effect)
    assert whole.rank_corrected == rank(first + second, effect)
    assert whole.rank_error == rank(second.abs(), error)
    assert whole.rank_relative == rank((second / first).abs(), error / first.abs())
    assert whole.rank_fast == rank(fast_second.abs(), second.abs())
    assert whole.rank_fast_relative == rank((fast_second / fast_first).abs(), error / first.abs())
    assert whole.true_relative == pytest.approx(float((error / first.abs()).quantile(0.5)))
    near = (second / first).abs() <= 0.35  # the controller's tolerance
    assert (trusted.largest_rho, trusted.num) == (0.35, int(near.sum()))
    assert trusted.rank_corrected == rank((first + second)[near], effect[near])


def test_medians_are_ranked_over_the_grid_alone():
    figures = summarize(made_up())
    grid = [f for f in figures if f.lr is not None and f.horizon is not None]
    assert len(grid) == 4
    assert len(figures) == 10
    expected = scipy.stats.spearmanr([f.relative for f in grid], [f.true_relative for f in grid])
    assert rank_of_medians(figures, "keep 0.5") == pytest.approx(expected.statistic)


def test_the_command_writes_points_figures_and_a_picture(tmp_path, capsys):
    path = tmp_path / "proxy.yaml"
    path.write_text("study: proxy\nname: trial\nmodel: {hidden: [8], activation: gelu}\n")
    small = ["lrs=[1e-3]", "horizons=[0, 2]", "seeds=2", "warm_steps=5", "num_windows=1"]
    small += ["batch=8", "num_removals=4", "keeps=[0.5]", "num_target=20"]
    assert main(["audit", str(path), *small, f"root={tmp_path}"]) == 0
    assert "measured lr 0.001, seed 1" in capsys.readouterr().out
    before = (tmp_path / "trial" / "proxy.json").read_bytes()
    assert main(["audit", str(path), *small, f"root={tmp_path}"]) == 0
    assert "found lr 0.001, seed 1" in capsys.readouterr().out
    assert (tmp_path / "trial" / "proxy.json").read_bytes() == before
    assert main(["audit", str(path), *small, f"root={tmp_path}", "noise=0.1"]) == 2
    assert "got noise 0.4, here 0.1; give another name" in capsys.readouterr().err
    assert (
        main(["audit", str(path), *small, f"root={tmp_path}", "lrs=[1e-3, 3e-3]", "seeds=1"]) == 0
    )
    printed = capsys.readouterr().out
    assert "found lr 0.001, seed 0" in printed
    assert "measured lr 0.003, seed 0" in printed
    with (tmp_path / "trial" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * (4 + 1)
    content = json.loads((tmp_path / "trial" / "proxy.json").read_text())
    assert content["config"]["warm_steps"] == 5
    removals = next(c for c in content["cells"] if c["change"] == "removal" and not c["lr"])
    assert removals["rank_fast"] is None
    assert removals["rank_error"] > 0.9
    assert (tmp_path / "trial" / "proxy.png").read_bytes()[:4] == b"\x89PNG"


def test_too_few_examples():
    config = SMALL.model_copy(update={"num_target": 1790})
    with pytest.raises(
        ConfigError, match=r"num_target \+ batch / keeps must be <= 1797.* got 1806"
    ):
        next(measure_proxy(config, 1e-3, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: prox\n", "study must be one of proxy, got 'prox'; did you mean proxy?"),
        ("study: proxy\nbatch: 8\n", r"num_removals must be <= batch \(8\), got 24"),
        ("study: proxy\nsteps: 3\n", "steps must be a known key"),
    ],
)
def test_configurations(tmp_path, text, message):
    path = tmp_path / "proxy.yaml"
    path.write_text(text + "name: trial\n")
    with pytest.raises(ConfigError, match=message):
        load_audit(path)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2"])
def test_shipped_configurations_load(name, request):
    config = load_audit(request.config.rootpath / "configs" / f"audit_proxy_{name}.yaml")
    assert isinstance(config, ProxyConfig)
    assert config.model.kind == name
    assert len(config.lrs) == 5
