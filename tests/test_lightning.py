"""Selection inside Lightning's Trainer against our own loop on the same pools."""

import csv
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from problems import image_loss, images, mlp
from torch import nn
from torch.utils.data import DataLoader

from selectflow import Selector
from selectflow.integrations.lightning import SelectCallback, _check

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")

POOL, KEEP, NUM = 12, 4, 10  # pools of an epoch
OPTIONS = {"horizon": 2, "interval": 2, "seed": 3}


def examples(num=NUM * POOL, seed=1):
    torch.manual_seed(seed)
    batch = images(num)
    return [{key: value[at] for key, value in batch.items()} for at in range(num)]


def target():
    torch.manual_seed(2)
    return [images(16), images(16)]


def loader():
    return DataLoader(examples(), batch_size=POOL)


class Module(LightningModule):
    """Remembers the keys that it trained on."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.trained_on = mlp(), []

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        self.trained_on.append(batch["key"])
        loss = image_loss(self, batch).mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Module):
    """Accumulates two batches, clips and schedules by itself."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def trainer_of(folder, selection, **options):
    return Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": folder,
            "callbacks": [selection], "precision": "64-true", "gradient_clip_val": 0.5,
        }
        | options
    )  # fmt: skip


def fit(folder, module=None, pools=None, select=None, **options):
    module = Module() if module is None else module
    selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS | (select or {}))
    trainer = trainer_of(folder, selection, **options)
    pools = selection.pools(loader() if pools is None else pools)
    trainer.fit(module, pools)
    return module, trainer, selection


def doubled(batch):
    return batch | {"image": batch["image"].double()}


def own_loop(accumulation=1, num_epochs=2, module=None, pools=None):
    """Our loop as the README shows it, with Lightning's order of accumulated gradients."""
    module = Module() if module is None else module
    module.double()
    (optimizer,), (schedule,) = module.configure_optimizers()
    scheduler = schedule["scheduler"]
    selector = Selector(
        module, optimizer, image_loss, list(map(doubled, target())), KEEP, **OPTIONS,
        lr_scheduler=scheduler, max_grad_norm=0.5, pools_per_update=accumulation,
    )  # fmt: skip
    for _ in range(num_epochs):
        for index, batch in enumerate(selector.stream(map(doubled, pools or loader())), 1):
            module.trained_on.append(batch["key"])
            (image_loss(module, batch).mean() / accumulation).backward()
            if index % accumulation == 0:
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return module


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation):
    expected = own_loop(accumulation)
    module, trainer, selection = fit(tmp_path, accumulate_grad_batches=accumulation)
    assert selection.selector.num_steps == trainer.global_step
    assert module.trained_on == expected.trained_on
    assert len(module.trained_on) == 2 * NUM
    assert torch.equal(weights(module), weights(expected))


class Unsized:
    """The pools of an epoch, of which nothing says how many there are."""

    def __iter__(self):
        return iter(loader())


def test_a_loader_without_length_is_not_selected_ahead_of_the_step(tmp_path):
    """Lightning draws its next batch before the optimizer step."""
    expected = own_loop()
    module, _, selection = fit(tmp_path, pools=Unsized())
    assert selection.selector.num_steps is None
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))


def test_validation_and_reloaded_loaders_change_nothing(tmp_path):
    """The pools are those of `train_dataloader`, made anew at each epoch."""

    class Validated(Module):
        def train_dataloader(self):
            return selection.pools(loader())

        def val_dataloader(self):
            return loader()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", image_loss(self, batch).mean())

    expected = own_loop()
    selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS)
    module = Validated()
    trainer = trainer_of(
        tmp_path, selection, val_check_interval=3, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(module)
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))


def test_manual_optimization(tmp_path):
    expected = own_loop(2)
    own = {"pools_per_update": 2, "max_grad_norm": 0.5}
    own["lr_scheduler"] = lambda module: module.lr_schedulers()
    module, *_ = fit(tmp_path, Manual(), select=own, gradient_clip_val=None)
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))


def test_pools_are_the_batches_of_lightning_alone(tmp_path):
    """Neither drawing the target nor selecting moves the generators that shuffle."""
    seen, batches = [], []

    class Plain(Module):
        def training_step(self, batch, batch_idx):
            batches.append(batch["key"])
            return super().training_step(batch, batch_idx)

    def noting(candidates):
        seen.append(candidates.pool["key"])
        return candidates.influence()

    shuffled = DataLoader(examples(), batch_size=POOL, shuffle=True)
    clean = DataLoader(examples(32, seed=2), batch_size=16, shuffle=True)
    selection = SelectCallback(image_loss, clean, KEEP, **OPTIONS, strategy=noting)
    for pools, callback in ((selection.pools(shuffled), selection), (shuffled, Callback())):
        module = Module() if callback is selection else Plain()
        torch.manual_seed(5)
        trainer_of(tmp_path, callback).fit(module, pools)
    assert seen == batches
    assert len(set(map(tuple, seen))) == 2 * NUM


# --- metrics and precision ------------------------------------------------------------------------


def test_what_was_selected_goes_to_lightnings_loggers(tmp_path):
    logger, seen = CSVLogger(tmp_path), []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(selection.selector.last)

    selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS)
    trainer = trainer_of(
        tmp_path, selection, callbacks=[selection, Notes()], logger=logger, log_every_n_steps=4
    )
    trainer.fit(Module(), selection.pools(loader()))
    with open(logger.experiment.metrics_file_path) as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [3, 7, 11, 15, 19]
    for step, row in rows.items():
        last = seen[step]
        assert float(row["select/score_mean"]) == pytest.approx(last.scores[last.indices].mean())
        assert float(row["select/target_loss"]) == pytest.approx(last.target_loss)
        assert float(row["select/kept_fraction"]) == pytest.approx(KEEP / POOL)
        assert float(row["select/horizon"]) == last.horizon
        assert float(row["perf/select_s"]) == pytest.approx(last.seconds)
        assert float(row["train_loss"]) > 0  # the module's own


def test_scores_follow_the_precision_of_training(tmp_path):
    found, types = {}, set()

    def noting(module, batch):
        logits = module(batch["image"])
        types.add((batch["image"].dtype, logits.dtype))
        return F.cross_entropy(logits.float(), batch["label"], reduction="none")

    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        types.clear()
        selection = SelectCallback(noting, target(), KEEP, horizon=0)
        trainer = trainer_of(tmp_path, selection, precision=precision, max_steps=1)
        trainer.fit(Module(), selection.pools(loader()))
        found[precision] = set(types), selection.selector.last.scores.double()
    float32, bf16, float64 = torch.float32, torch.bfloat16, torch.float64
    assert found["32-true"][0] == {(float32, float32)}
    assert found["bf16-mixed"][0] == {(float32, bf16)}
    assert found["bf16-true"][0] == {(bf16, bf16)}
    assert found["64-true"][0] == {(float64, float64)}
    for _, scores in found.values():
        assert torch.corrcoef(torch.stack([scores, found["64-true"][1]]))[0, 1] > 0.97


# --- refusals -------------------------------------------------------------------------------------


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class OwnClipping(Module):
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


class Rare(Module):
    def configure_optimizers(self):
        optimizers, (schedule,) = super().configure_optimizers()
        return optimizers, [schedule | {"frequency": 3}]


class Measured(Module):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "monitor": "train_loss"}]


class Adagrad(Module):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (TwoOptimizers, {"gradient_clip_val": None}, "must return one optimizer, got 2"),
        (OwnClipping, {}, "clipped by norm, got a configure_gradient_clipping of the module"),
        (Module, {"gradient_clip_algorithm": "value"}, "by norm, got gradient_clip_algorithm="),
        (Rare, {}, r"of frequency 1, got \[\('CosineAnnealingLR', 3\)\]"),
        (Measured, {}, "got ReduceLROnPlateau"),
        (Adagrad, {}, "optimizer must be one of torch.optim.AdamW"),
    ],
)
def test_what_is_not_modelled_is_refused(tmp_path, module, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        fit(tmp_path, module(), **options)


def test_options_go_before_what_is_read(tmp_path):
    for module, own in ((OwnClipping(), {"max_grad_norm": None}), (Rare(), {"lr_scheduler": None})):
        fit(tmp_path, module, select=own, max_steps=2)
        assert len(module.trained_on) == 2


def test_a_schedule_of_epochs_holds_within_them(tmp_path):
    rates = []

    class ByEpoch(Module):
        def configure_optimizers(self):
            optimizers, (schedule,) = super().configure_optimizers()
            return optimizers, [schedule | {"interval": "epoch"}]

    class Notes(Callback):
        def on_train_batch_end(self, trainer, *args):
            updates = selection.selector._optimizer.updates(3)
            rates.append({rule.lr for update in updates for rule in update.rules})

    selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS)
    trainer = trainer_of(tmp_path, selection, callbacks=[selection, Notes()], max_steps=NUM - 1)
    trainer.fit(ByEpoch(), selection.pools(loader()))
    assert rates == [{1e-2}] * (NUM - 1)


def test_another_strategy_is_refused():
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"strategy must be one of .*, got FSDPStrategy; pass"):
        _check(trainer, Module(), {})


def test_both_parts_are_needed(tmp_path):
    selection = SelectCallback(image_loss, target(), KEEP)
    with pytest.raises(ValueError, match=r"pass Trainer\(callbacks=\[selection\]\)"):
        trainer_of(tmp_path, Callback()).fit(Module(), selection.pools(loader()))
    with pytest.raises(ValueError, match=r"trainer.fit\(module, selection.pools\(loader\)\)"):
        trainer_of(tmp_path, selection).fit(Module(), loader())


def test_the_callback_of_an_earlier_trainer_is_not_enough(tmp_path):
    _, _, selection = fit(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"pass Trainer\(callbacks=\[selection\]\)"):
        trainer_of(tmp_path, Callback()).fit(Module(), selection.pools(loader()))


def test_several_loaders_are_refused():
    selection = SelectCallback(image_loss, target(), KEEP)
    with pytest.raises(ValueError, match=r"loader must be one, .* got a collection of 2"):
        selection.pools([loader(), loader()])
