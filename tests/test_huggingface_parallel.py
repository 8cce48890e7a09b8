"""Selection inside transformers' Trainer in two processes, against our own loop in two."""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import transformers
from test_huggingface import (
    KEEP,
    POOL,
    SelectTrainer,
    Trainer,
    arguments,
    dataset,
    llama,
    texts,
    weights,
)
from test_huggingface_scorer import scorer_of
from test_huggingface_stream import Noted, stream_of, write_sources
from torch.nn.parallel import DistributedDataParallel

from selectflow import Selector
from selectflow.integrations.scorers import placed
from selectflow.models.language import causal_lm_losses

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

NUM = 400  # an epoch of 25 pools in each process


@pytest.fixture(scope="module")
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_torchrun(port):
    """What torchrun tells a process of itself."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def trainer_for(
    folder, model=None, kind=SelectTrainer, keep=KEEP, rows=None, scorer=None, **options
):
    how = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False} | options
    given = {"train_dataset": dataset(texts(NUM, 1)) if rows is None else rows}
    if kind is not Trainer:
        given |= {"target": dataset(texts(40, 2)[::2]), "keep": keep}
        given["select_options"] = {"horizon": 2, "interval": 2, "scorer": scorer}
    return kind(model or llama(), arguments(folder, **how), **given)


def by_trainer(folder, port, num_steps, accumulation):
    as_torchrun(port)
    options = {"max_steps": num_steps, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(folder, **options)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    return trainer.trained_on, weights(trainer.model), logged


def by_hand(num_steps, accumulation, scorer=None):
    """Our loop, under DistributedDataParallel; each process has every second pool of the stream."""
    rank = dist.get_rank()
    inner, rows = llama(), texts(NUM, 1)
    decayed = [p for name, p in inner.named_parameters() if "norm" not in name]
    others = [p for name, p in inner.named_parameters() if "norm" in name]
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3, fused=True,
    )  # fmt: skip
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 5, num_steps)
    target = texts(40, 2)[::2].split(10)[rank::2]
    selector = Selector(
        model, optimizer, causal_lm_losses, [{"input_ids": part} for part in target],
        keep=KEEP, horizon=2, interval=2, lr_scheduler=scheduler, max_grad_norm=1.0, seed=3,
        pools_per_update=accumulation, scorer=scorer,
    )  # fmt: skip
    pools = [{"input_ids": pool} for pool in rows.split(POOL)][rank::2]
    model.train()
    kept = []
    for index, batch in enumerate(selector.stream(pools), 1):
        ids = batch["input_ids"]
        kept.append(ids.tolist())
        with model.no_sync() if index % accumulation else torch.enable_grad():
            num_items = accumulation * ids[:, 1:].numel()
            model(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss.backward()
        if index % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if index == num_steps * accumulation:
                break
    return kept, weights(inner)


@pytest.mark.parametrize(("accumulation", "num_steps"), [(1, 20), (2, 12)])
def test_keeps_and_learns_what_our_own_loop_does(two, port, tmp_path, accumulation, num_steps):
    found = two.run(by_trainer, str(tmp_path), port, num_steps, accumulation)
    expected = two.run(by_hand, num_steps, accumulation)
    for (kept, trained, _), (others, ours) in zip(found, expected, strict=True):
        assert kept == others
        assert len(kept) == num_steps * accumulation
        assert (trained - ours).abs().max() < 1e-6
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] != found[1][0]
    assert found[0][2]
    assert [log["select/score_mean"] for log in found[0][2]] == [
        log["select/score_mean"] for log in found[1][2]
    ]


def on_stream(folder, port, sources, resume=None):
    as_torchrun(port)
    stream = stream_of(sources, rank=dist.get_rank(), world_size=2)
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    trainer = trainer_for(folder, llama(9 if resume else 0), rows=stream, **options)
    trainer.add_callback(noted := Noted(stream))
    trainer.train(resume)
    return trainer.trained_on, noted.shares, weights(trainer.model)


def test_shares_of_a_stream_follow_both_processes_and_resume(two, port, tmp_path):
    sources = write_sources(tmp_path)
    whole = two.run(on_stream, str(tmp_path / "out"), port, sources)
    rest = two.run(
        on_stream, str(tmp_path / "out"), port, sources, str(tmp_path / "out" / "checkpoint-4")
    )
    assert whole[0][1] == whole[1][1]
    assert whole[0][1][3] != whole[0][1][6] != whole[0][1][9]
    assert whole[0][0] != whole[1][0]
    for (kept, shares, trained), (others, those, ours) in zip(rest, whole, strict=True):
        assert kept == others[4:]
        assert shares == those[4:]
        assert torch.equal(trained, ours)


def everything_kept(folder, port, kind):
    """Texts of unequal lengths, so that the count of tokens over the processes matters."""
    as_torchrun(port)
    rows = [
        {"input_ids": row[: 5 + at % 8], "labels": row[: 5 + at % 8]}
        for at, row in enumerate(texts(96, 1))
    ]
    model, kind = llama(), {"select": SelectTrainer, "plain": Trainer}[kind]
    trainer = trainer_for(folder, model, kind, keep=1.0, rows=rows, max_steps=6, logging_steps=1)
    trainer.data_collator = padded
    if kind is SelectTrainer:
        trainer._target = rows[:20]
    trainer.train()
    return weights(trainer.model), [
        log["loss"] for log in trainer.state.log_history if "loss" in log
    ]


def padded(examples):
    longest = max(len(each["input_ids"]) for each in examples)

    def column(name, fill):
        rows = [[*each[name].tolist(), *[fill] * (longest - len(each[name]))] for each in examples]
        return torch.tensor(rows)

    lengths = torch.tensor([len(each["input_ids"]) for each in examples])
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def test_keeping_all_is_the_plain_trainer(two, port, tmp_path):
    """As a set: what is kept comes best first, which moves sums by rounding alone."""
    plain = two.run(everything_kept, str(tmp_path / "a"), port, "plain")
    ours = two.run(everything_kept, str(tmp_path / "b"), port, "select")
    assert ours[0][1] == pytest.approx(plain[0][1], rel=1e-4)
    assert (ours[0][0] - plain[0][0]).abs().max() < 1e-4


def scored_by_trainer(folder, port, is_resumed):
    """The Trainer joins the scorer's model, once."""
    as_torchrun(port)
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    scorer = scorer_of(seed=8 if is_resumed else 5)
    trainer = trainer_for(folder, llama(seed=9 if is_resumed else 0), scorer=scorer, **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if is_resumed else None)
    joined = trainer._select_options["scorer"]
    assert placed(joined, torch.device("cpu"), 2).model is joined.model
    return trainer.trained_on, weights(trainer.model), weights(scorer.model)


def scored_by_hand(num_steps):
    scorer = scorer_of()
    joined = replace(scorer, model=DistributedDataParallel(scorer.model))
    return *by_hand(num_steps, 1, joined), weights(scorer.model)


def test_a_scorer_is_joined_and_resumed(two, port, tmp_path):
    found = two.run(scored_by_trainer, str(tmp_path), port, False)
    expected = two.run(scored_by_hand, 8)
    rest = two.run(scored_by_trainer, str(tmp_path), port, True)
    for rank in range(2):
        (kept, model, scorer), (others, same, twin) = found[rank], expected[rank]
        assert kept == others
        assert (model - same).abs().max() < 1e-6
        assert torch.equal(scorer, found[0][2])
        assert (scorer - twin).abs().max() < 1e-6
        assert rest[rank][0] == kept[3:]
        assert torch.equal(rest[rank][1], model)
        assert torch.equal(rest[rank][2], scorer)
    assert found[0][0] != found[1][0]


def with_checkpoint(folder, port, is_resumed):
    as_torchrun(port)
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 12}
    trainer = trainer_for(folder, llama(seed=9 if is_resumed else 0), **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-7" if is_resumed else None)
    return trainer.trained_on, weights(trainer.model)


def test_resumes_with_the_trainers_checkpoint(two, port, tmp_path):
    whole = two.run(with_checkpoint, str(tmp_path), port, False)
    names = sorted(path.name for path in (tmp_path / "checkpoint-7").glob("selector*"))
    assert names == ["selector-0-of-2.pt", "selector-1-of-2.pt"]
    rest = two.run(with_checkpoint, str(tmp_path), port, True)
    for (kept, trained), (expected, others) in zip(rest, whole, strict=True):
        assert kept == expected[7:]
        assert torch.equal(trained, others)
