"""Runs of our own loop in several processes; torchrun starts this program in each of them.

    torchrun --nproc-per-node 2 tests/parallel_worker.py FOLDER case ...

Each case leaves what it found in `FOLDER/<case>-rank<r>.pt`.
"""

import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from small_datasets import sample
from torch import nn

from selectflow.data import (
    Manifest,
    PoolStream,
    make_digits,
    read_batches,
    write_manifest,
    write_split,
)
from selectflow.distributed import here
from selectflow.run.config import RunConfig
from selectflow.run.directory import lock
from selectflow.run.loop import train
from selectflow.run.spread import joined
from selectflow.run.task import Task

POOL, KEEP, STEPS = 24, 6, 9
TARGET_BATCH, TEST_BATCH = 67, 133  # no multiple of the processes


class Killed(BaseException):
    """As SIGKILL in all processes at once: nothing of ours runs after it."""


class Blocks(nn.Module):
    """Two blocks between an embedding and a head, in double precision."""

    def __init__(self, dropout=0.0, norm=False, width=6):
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 10)
        self.double()

    def forward(self, images):
        hidden = self.embed(images.flatten(1).double())
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def evaluate(model, batches):
    losses = torch.cat([loss_fn(model, batch) for batch in batches])
    return {"loss": float(losses.mean())}


def save(folder, weights):
    folder.mkdir()
    torch.save(dict(weights), folder / "weights.pt")


def digits(folder):
    return folder / "digits"


def small():
    """A model that scores, smaller than the one that is trained."""
    torch.manual_seed(1)
    return Blocks(width=3)


def task_of(folder, *, root=None, pool=POOL, max_errors=0, memory_gib=1.0, scorer=None, **model):
    group, root = here(), root or digits(folder)
    reading = {"max_errors": max_errors, "memory_gib": memory_gib}
    share = {"rank": group.rank, "world_size": group.size}
    torch.manual_seed(0)
    return Task(
        model=Blocks(**model),
        loss_fn=loss_fn,
        evaluate=evaluate,
        pools=PoolStream(root, pool=pool, seed=0, **reading, **share),
        target=read_batches(digits(folder), "target", TARGET_BATCH),
        test=read_batches(digits(folder), "test", TEST_BATCH),
        source=root,
        save=save,
        scorer=scorer,
    )


def config_of(folder, name, select=None, data=None, **options):
    values = {
        "name": name, "root": folder, "steps": STEPS, "eval_every": 4, "checkpoint_every": 4,
        "device": "cpu", "optimizer": {"lr": 0.02, "max_grad_norm": 0.5},
        "data": {"pool": POOL} | (data or {}),
        "select": {"keep": KEEP, "strategy": "uniform", "horizon": 0} | (select or {}),
    }  # fmt: skip
    return RunConfig.model_validate(values | options)


def weights_of(model):
    """All parameters and buffers, whole."""
    state = getattr(model, "module", model).state_dict()
    whole = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in state.items()}
    return {name: x.detach().clone() for name, x in whole.items()}


def trained(folder, config, stop_at=None, die_at=None, **options):
    """The weights that a run ends with; it may be stopped, or end by `Killed`, in a step."""
    made, calls = task_of(folder, **options), 0

    def losses(model, batch):
        nonlocal calls
        if model.training and torch.is_grad_enabled():
            calls += 1
            if calls == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if calls == die_at:
                raise Killed
        return made.loss_fn(model, batch)

    task = Task(**{**vars(made), "loss_fn": losses})
    models = []
    task = Task(**{**vars(task), "evaluate": lambda m, b: (models.append(m), evaluate(m, b))[1]})
    train(config, task)
    return weights_of(models[-1]) if models else {}


def refusal(folder, config, **options):
    """The error of a run, as class and text."""
    try:
        train(config, task_of(folder, **options))
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# --- cases ----------------------------------------------------------------------------------------


def whole(folder, rank):
    """Runs of each layout and strategy, without an interruption."""
    found = {}
    for name, select, parallel in RUNS:
        config = config_of(folder, name, select, parallel=parallel)
        found[name] = trained(folder, config)
    return found


INFLUENCE = {"strategy": "influence"}
AHEAD = {"strategy": "influence", "horizon": 2, "interval": 2}
GLOBAL = {"strategy": "influence", "scope": "global"}
AUTO = {"strategy": "influence", "horizon": "auto", "lr": "auto"}
RUNS = [
    ("uniform-ddp", {}, "auto"),
    ("uniform-fsdp2", {}, "fsdp2"),
    ("influence-ddp", INFLUENCE, "ddp"),
    ("influence-fsdp2", INFLUENCE, "fsdp2"),
    ("global-ddp", GLOBAL, "ddp"),
    ("global-fsdp2", GLOBAL, "fsdp2"),
]


def resumed(folder, rank):
    """Runs with dropout and batch norm: whole; and ended in step 6, resumed, stopped, resumed."""
    found, model = {}, {"dropout": 0.3, "norm": True}
    for strategy, parallel in product(RESUMED, ("ddp", "fsdp2")):
        options = {"parallel": parallel, "resume": "auto", "checkpoint_every": 3}
        for name, ends in (("whole", ()), ("ended", ({"die_at": 6}, {"stop_at": 2 * rank}))):
            full = f"{strategy}-{parallel}-{name}"
            config = config_of(folder, full, RESUMED[strategy], **options)
            for end in ends:
                with suppress(Killed):
                    trained(folder, config, **model, **end)
            found[full] = trained(folder, config, **model)
    return found


RESUMED = {"plain": {}, "ahead": AHEAD, "auto": AUTO}


def several(folder, rank):
    """Gradients summed up over micro-batches and pools."""
    options = {"train": {"accumulate": 4}, "steps": 5}
    select = {"pools_per_update": 2}
    found = {}
    for parallel in ("ddp", "fsdp2"):
        config = config_of(folder, f"s-{parallel}", select, parallel=parallel, **options)
        found[parallel] = trained(folder, config)
    return found


def mixed(folder, rank):
    """Target examples in every batch, beside what is kept; stopped early where that is known."""
    found = {}
    for parallel, patience in (("ddp", 50), ("fsdp2", None)):
        data, options = {"target_share": 0.25}, {"parallel": parallel, "patience": patience}
        config = config_of(folder, f"mixed-{parallel}", INFLUENCE, data, **options)
        found[parallel] = trained(folder, config)
    return found


def scored(folder, rank):
    """A small model scores: whole, and ended in a step and resumed; its weights, too."""
    found = {}
    scorer = {"optimizer": {"lr": 0.02, "max_grad_norm": 0.5}}
    for parallel, end in product(("ddp", "fsdp2"), ({}, {"die_at": 6})):
        name = f"scored-{parallel}-{next(iter(end), 'whole')}"
        options = {"parallel": parallel, "resume": "auto", "checkpoint_every": 3}
        config = config_of(folder, name, INFLUENCE, scorer=scorer, **options)
        if end:
            with suppress(Killed):
                trained(folder, config, scorer=small(), **end)
        found[name] = trained(folder, config, scorer=(scoring := small())), weights_of(scoring)
    return found


def replayed(folder, rank):
    """The run `uniform-ddp` again, by what its ledger says."""
    config = config_of(folder, "replayed", {"replay": folder / "uniform-ddp"})
    return trained(folder, config)


def unequal(folder, rank):
    """Processes that were started with other options, models or target sets."""
    config = config_of(folder, "unequal")
    found = {"steps": refusal(folder, config.model_copy(update={"steps": 5 + rank}))}
    made = task_of(folder, norm=rank == 1)
    for name, task in (
        ("model", made),
        ("target", replace(task_of(folder), target=made.target[rank:])),
    ):
        try:
            train(config, task)
        except ValueError as error:
            found[name] = type(error).__name__, str(error)
    return found


def refused(folder, rank):
    """What must not start, and is refused in both processes."""
    held = folder / "held"
    with lock(held) if rank == 0 else warnings.catch_warnings():
        here().wait()
        found = {"held": refusal(folder, config_of(folder, "held"))}
        here().wait()
    found["other"] = refusal(folder, config_of(folder, "uniform-ddp", resume="auto", steps=10))
    found["again"] = refusal(folder, config_of(folder, "uniform-ddp"))
    offline = {"horizon": float("inf"), "strategy": "influence"}
    found["offline"] = refusal(folder, config_of(folder, "offline", offline))
    found["few"] = refusal(folder, config_of(folder, "few", data={"pool": 700}), pool=700)
    found["replay"] = refusal(folder, config_of(folder, "r", {"replay": folder / "alone"}))
    compiled = {"train": {"compile": True}, "parallel": "fsdp2"}
    found["compiled"] = refusal(folder, config_of(folder, "compiled", **compiled))
    stopping = {"patience": 2, "parallel": "fsdp2"}
    found["patience"] = refusal(folder, config_of(folder, "patience", **stopping))
    return found


def damaged(folder, rank):
    """Three rows that cannot be read, within the budget and beyond."""
    found, root = {}, folder / "damaged"
    for name, budget in (("within", 3), ("beyond", 2)):
        config = config_of(folder, name, data={"max_errors": budget}, steps=30)
        found[name] = refusal(folder, config, root=root, max_errors=budget, memory_gib=0.0)
    return found


def not_finite(folder, rank):
    """A loss that is infinite in one process alone."""
    made = task_of(folder)

    def losses(model, batch):
        found = made.loss_fn(model, batch)
        return found * float("inf") if rank == 1 and torch.is_grad_enabled() else found

    config = config_of(folder, "infinite")
    try:
        train(config, Task(**{**vars(made), "loss_fn": losses}))
    except FloatingPointError as error:
        return str(error)
    return None


def changed(folder, rank):
    """Runs of other numbers of processes, which go on in these."""
    found = {}
    for name in ("from-one", "from-three"):
        for parallel in ("ddp", "fsdp2"):
            config = config_of(folder, f"{name}-{parallel}", parallel=parallel, resume="auto")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[config.name] = trained(folder, config)
            said = [str(each.message) for each in caught if "resumed in" in str(each.message)]
            found[f"{config.name}-said"] = said
    return found


def begun(folder, rank):
    """The first steps of runs that go on in another number of processes."""
    for name, parallel in BEGUN:
        config = config_of(folder, name, parallel=parallel, resume="auto")
        trained(folder, config, stop_at=5)
    return {}


BEGUN = [("from-three-ddp", "ddp"), ("from-three-fsdp2", "fsdp2")]


def shortened(folder, rank):
    """The first steps of runs that one process ends."""
    for parallel in ("ddp", "fsdp2"):
        config = config_of(folder, f"to-one-{parallel}", parallel=parallel, resume="auto")
        trained(folder, config, stop_at=5)
    return {}


def killed(folder, rank):
    """A run whose second process is really killed, in its sixth step; the first one waits."""
    made = task_of(folder)

    def losses(model, batch):
        if rank == 1 and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(model.training)
        return made.loss_fn(model, batch)

    calls = []
    train(killed_config(folder), Task(**{**vars(made), "loss_fn": losses}))


def killed_config(folder):
    return config_of(folder, "killed", resume="auto")


def revived(folder, rank):
    return trained(folder, killed_config(folder))


def at_random(folder, rank):
    """A longer run, in which a process is killed after the seconds in KILL_AFTER."""
    parallel, seconds = os.environ["PARALLEL"], float(os.environ["KILL_AFTER"])
    config = config_of(
        folder, f"random-{parallel}", parallel=parallel, resume="auto", steps=300,
        checkpoint_every=10, keep_checkpoints=1,
    )  # fmt: skip
    if seconds and rank == int(os.environ["VICTIM"]):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    trained(folder, config, dropout=0.2, norm=True)
    return {}


CASES = (
    whole, resumed, several, mixed, scored, replayed, refused, unequal, damaged, not_finite,
    changed, begun, shortened, killed, revived, at_random,
)  # fmt: skip


def make_data(folder):
    """Digits, and images of which a shard of three is lost."""
    make_digits(digits(folder), label_noise=0.2)
    images = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    samples = [sample(f"s{i}", i % 10, npy=image) for i, image in enumerate(images)]
    root = folder / "damaged"
    shards = write_split(root, "train", samples, 3)
    write_manifest(root, Manifest({"train": tuple(shards)}, ("cls", "json", "npy"), {}, 0))
    (root / "train-000007.tar").unlink()


def main(folder, names):
    folder = Path(folder)
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout_s=60) as group:
        for case in CASES:
            if case.__name__ in names:
                found = case(folder, group.rank)
                torch.save(found, folder / f"{case.__name__}-rank{group.rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(sys.argv[1], sys.argv[2:])
