"""Small learning problems that many tests share: a model, its loss and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    loss_fn: Callable[[nn.Module, Any], Tensor]

    def make(self, dtype=torch.float64, seed=0):
        """The model in `dtype`, and a function num_examples -> batch; both from `seed`."""
        torch.manual_seed(seed)
        model = self.build().to(dtype)

        def batch(num):
            made = self.batch(num)
            return {
                key: value.to(dtype)
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
                for key, value in made.items()
            }

        return model, batch


def images(num):
    labels = torch.randint(10, (num,))
    shapes = torch.linspace(-1, 1, 10)[labels, None, None, None]
    return {
        "image": torch.randn(num, 1, 8, 8) + shapes,
        "label": labels,
        "key": [f"sample-{i}" for i in range(num)],
    }


def tokens(num):
    return {"tokens": torch.randint(17, (num, 9))}


def image_loss(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def token_loss(model, batch):
    logits = model(batch["tokens"][:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:], reduction="none")
    return losses.mean(1)


class Transformer(nn.Module):
    """Two causal blocks with fused attention and an output head tied to the embedding."""

    def __init__(self, vocabulary=17, width=16, heads=2, layers=2, context=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, length, width)))
        return x + self.drop(self.mlp(self.norm2(x)))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


PROBLEMS = [
    Problem("mlp", mlp, images, image_loss),
    Problem("cnn", cnn, images, image_loss),
    Problem("transformer", Transformer, tokens, token_loss),
]
