"""Token blocks: the tokens of documents cut into pieces of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from selectflow.data.documents import Document
from selectflow.data.tokenizers import Tokens

Rest = Literal["drop", "pad", "pack"]


class Block(NamedTuple):
    """Consecutive tokens of one domain.

    Attributes:
        tokens: shape (block,).
        origin: the domain, or the kind of dirt that was made of it.
        domain: of the document.
        name: of the document in which the block begins.
        place: position among the blocks of that document.
    """

    tokens: Tokens
    origin: str
    domain: str
    name: str
    place: int


def cut(
    documents: Iterable[tuple[Document, Tokens]], end: int, size: int, rest: Rest
) -> Iterator[Block]:
    """Blocks of the documents of one domain, in order.

    Args:
        documents: All of one domain, each with its tokens.
        end: Id that ends a document.
        size: Tokens of a block.
        rest: What becomes of the tokens of a document that do not fill a block. "drop": left out,
            so that a block holds nothing but text. "pad": a block of their own, filled up with
            end tokens. "pack": the next document follows in the same block after an end token;
            what does not fill a block at the very end is left out. Which documents a block holds
            can be read off its end tokens: `selectflow.models.language.document_positions`.
    """
    if rest == "pack":
        yield from _packed(documents, end, size)
        return
    for document, tokens in documents:
        whole = len(tokens) // size
        for index, part in enumerate(tokens[: whole * size].reshape(whole, size)):
            yield Block(part, document.domain, document.domain, document.name, index)
        if rest == "pad" and len(tokens) % size:
            last = np.full(size, end, tokens.dtype)
            last[: len(tokens) % size] = tokens[whole * size :]
            yield Block(last, document.domain, document.domain, document.name, whole)


def _packed(documents: Iterable[tuple[Document, Tokens]], end: int, size: int) -> Iterator[Block]:
    left, name, index = None, "", 0  # tokens without a block, and where they begin
    for document, tokens in documents:
        ended = np.append(tokens, np.array([end], tokens.dtype))
        if left is None or not len(left):
            left, name, index = ended[:0], document.name, 0
        joined = np.concatenate([left, ended])
        for start in range(0, len(joined) - size + 1, size):
            yield Block(joined[start : start + size], document.domain, document.domain, name, index)
            name, index = document.name, index + 1 if name == document.name else 0
        left = joined[len(joined) // size * size :]
