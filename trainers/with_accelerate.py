r"""Train an image classifier with Accelerate and data selection, in one process or several.

    python trainers/with_accelerate.py --steps 400
    accelerate launch --num_processes 2 trainers/with_accelerate.py --accumulate 2

Built-in digits, of which 40% have wrong labels: selection has to find the others. (A file called
accelerate.py would be what `import accelerate` finds here.)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from selectflow import Selector
from selectflow.data import PoolStream, make_digits, read_batches
from selectflow.models.vision import mlp

CLIP = 1.0  # of gradients, by norm


def losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example, shape (N,), on the model's device wherever the batch is."""
    device = next(model.parameters()).device
    logits, labels = model(batch["image"].to(device)), batch["label"].to(device)
    return F.cross_entropy(logits, labels, reduction="none")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--pool", type=int, default=64, help="candidates of each process")
    parser.add_argument("--keep", type=int, default=16, help="of them, trained on")
    parser.add_argument("--horizon", type=int, default=0, help="updates to look ahead")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one optimizer step")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """The parts of a training, by name."""
    data = options.folder / "data"
    with accelerator.main_process_first():
        make_digits(data, label_noise=0.4)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    pools = PoolStream(data, pool=options.pool, seed=options.seed, **share)
    torch.manual_seed(options.seed)
    model: Any = mlp(64, 10, (64,))
    plain = torch.optim.AdamW(model.parameters(), 3e-3)
    # Prepared, it would take a step for each process, and a look-ahead would not know.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        plain, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.steps))
    )
    model, optimizer = accelerator.prepare(model, plain)
    selector = Selector(
        model,
        optimizer,
        losses,
        read_batches(data, "target", 100),
        options.keep,
        options.horizon,
        lr_scheduler=scheduler,
        max_grad_norm=CLIP,
        pools_per_update=options.accumulate,
    )
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "selector": selector,
        "pools": pools,
    }


def train(options: argparse.Namespace, accelerator: Accelerator, parts: dict[str, Any]) -> None:
    """Take the steps, with a checkpoint now and then."""
    model, optimizer, step = parts["model"], parts["optimizer"], 0
    file = f"selection-{accelerator.process_index}.pt"  # each process has pools of its own
    if options.resume:
        accelerator.load_state(str(options.resume))
        saved = torch.load(options.resume / file)
        step = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for batch in parts["selector"].stream(parts["pools"]):
        with accelerator.accumulate(model):
            accelerator.backward(losses(model, batch).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        parts["scheduler"].step()
        step += 1
        if step % options.save_every == 0 or step == options.steps:
            folder = options.folder / f"checkpoint-{step}"
            accelerator.save_state(str(folder))
            own = {name: parts[name].state_dict() for name in ("selector", "pools", "scheduler")}
            torch.save(own | {"step": step}, folder / file)
        if step == options.steps:
            return


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the accuracy on the test set."""
    options = parse(arguments)
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.cpu,
    )
    parts = build(options, accelerator)
    train(options, accelerator, parts)
    model = parts["model"].eval()
    (test,) = read_batches(options.folder / "data", "test", 400)
    with torch.no_grad():
        found = model(test["image"].to(accelerator.device)).argmax(1).cpu()
    accuracy = (found == test["label"]).float().mean()
    accelerator.print(f"accuracy on the test set: {accuracy:.3f}")
    accelerator.free_memory()


if __name__ == "__main__":
    main()
