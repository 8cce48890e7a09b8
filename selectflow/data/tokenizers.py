"""Tokenizers: UTF-8 bytes, or byte-pair encoding trained on the text and stored with its shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectflow.core.files import atomic_file
from selectflow.data.cache import Cache
from selectflow.data.manifest import TOKENIZER_NAME, DataError, Manifest
from selectflow.data.sources import find_manifest
from selectflow.data.urls import is_remote, member, root_of

_END = "<|endoftext|>"
_ENDS = (_END, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")  # as GPT-2, Llama and others name it
_RARE = "\U00012000"  # a letter of cuneiform, in no usual vocabulary

_log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class ByteTokenizer:
    """The bytes of the UTF-8 encoding. 255, which UTF-8 never uses, ends a document."""

    num_tokens = 256
    end = 255

    def encode(self, text: str) -> Tokens:
        """Bytes of the text, uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8, such as a character cut by a block, as U+FFFD."""
        return bytes(int(token) for token in tokens if token != self.end).decode(errors="replace")


class SubwordTokenizer:
    """A tokenizer of the tokenizers library.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with a token that ends a document.

    Raises:
        DataError: it has none of the usual names for such a token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # "<|endoftext|>" in a text is its letters, and no text is cut or filled up as the file of
        # the tokenizer may say: it was written for the inputs of a model
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [tokenizer.token_to_id(name) for name in _ENDS]
        found = [index for index in ids if index is not None]
        if not found:
            raise DataError(
                f"tokenizer must have one of the tokens {', '.join(_ENDS)} to end a document, "
                "got none; add one to its vocabulary"
            )
        self.end: int = found[0]
        # not the size of the vocabulary, whose ids may have gaps
        self.num_tokens: int = 1 + max(tokenizer.get_vocab().values())
        self._dtype = np.min_scalar_type(self.num_tokens - 1)
        if not tokenizer.encode(_RARE, add_special_tokens=False).ids:
            _log.warning(
                "the tokenizer leaves out characters that it does not know: text may be lost; one "
                "of bytes, or with a token for the unknown, keeps their places"
            )

    def encode(self, text: str) -> Tokens:
        """Ids of the text, without special tokens, in the smallest type that holds them all.

        What reads like a special token is encoded as the letters that it is.

        Raises:
            DataError: the text would hold the token that ends a document, as where the tokenizer
                has it as a word like others.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.end in ids:
            name = self._tokenizer.id_to_token(self.end)
            at = text.find(name)
            raise DataError(
                f"text must not hold {name!r}, which ends a document and is no special token in "
                f"this tokenizer, got {text[max(0, at - 20) : at + 40]!r}; mark it as special, or "
                "replace it in the text"
            )
        return np.array(ids, dtype=self._dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return str(self._tokenizer.decode([int(token) for token in tokens]))

    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return dict(self._tokenizer.get_vocab())

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return str(self._tokenizer.to_str(pretty=True))


Tokenizer = ByteTokenizer | SubwordTokenizer
"""Text to token ids and back.

Ids are below `num_tokens`; `end` ends a document, and fills a block that a document leaves empty.
"""


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of that name.

    Args:
        name: "bytes"; "bpe:SIZE", trained here; or what `load_tokenizer` takes.
        texts: What a new one is trained on; not read for the others.

    Raises:
        DataError: No such tokenizer, or a size that cannot hold all bytes.
    """
    kind, _, size = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if kind != "bpe":
        return load_tokenizer(name)
    if not size.isdecimal() or int(size) < 257:
        raise DataError(
            f"tokenizer must be bpe:SIZE with a size >= 257 (all bytes and an end of document), "
            f"got {name!r}; bpe:4096 suits a small model"
        )
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=[_END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer(tokenizer)


def load_tokenizer(name: str | Path) -> SubwordTokenizer:
    """A tokenizer that exists: a tokenizer.json, a folder with one, or a name on Hugging Face.

    Raises:
        DataError: It cannot be found or read.
    """
    library, path = _library(), Path(name)
    path = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        if path.suffix == ".json":
            return SubwordTokenizer(library.Tokenizer.from_file(str(path)))
        return SubwordTokenizer(library.Tokenizer.from_pretrained(str(name)))
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            "tokenizer must be bytes, bpe:SIZE, a tokenizer.json, a folder with one, or a name on "
            f"Hugging Face, got {str(name)!r} ({reason}); without a network, use a file"
        ) from error


def _library() -> Any:
    try:
        import tokenizers  # noqa: PLC0415 - of the extra "language"
        import tokenizers.decoders  # noqa: PLC0415
        import tokenizers.pre_tokenizers  # noqa: PLC0415
        import tokenizers.trainers  # noqa: PLC0415
    except ImportError as error:
        raise DataError(
            "tokenizer must be bytes where the tokenizers library is missing; "
            "pip install 'selectflow[language]' for the others"
        ) from error
    return tokenizers


def store_tokenizer(root: str | Path, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the tokenizer beside the shards; what the manifest says of it."""
    facts = {"name": name, "num_tokens": tokenizer.num_tokens, "end": tokenizer.end}
    if isinstance(tokenizer, ByteTokenizer):
        return facts
    data = tokenizer.to_json().encode()
    _write(root, data)
    return facts | {"sha256": hashlib.sha256(data).hexdigest()}


def copy_tokenizer(source: str | Path, manifest: Manifest, root: str | Path) -> None:
    """Put the tokenizer of a dataset, if it has one, beside other shards.

    Raises:
        DataError: The file is missing, or another one than the manifest says.
    """
    if "sha256" in manifest.tokenizer:
        _write(root, _read(source, manifest))


def _write(root: str | Path, data: bytes) -> None:
    Path(root).mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(root) / TOKENIZER_NAME) as file:
        file.write(data)


def _read(root: str | Path, manifest: Manifest) -> bytes:
    name = member(root_of(root), TOKENIZER_NAME)
    fix = "restore the file, or write the dataset again"
    try:
        data = Cache().read(name) if is_remote(name) else Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"{name} must be readable, got {error.strerror}; {fix}") from error
    if (digest := hashlib.sha256(data).hexdigest()) != (expected := manifest.tokenizer["sha256"]):
        raise DataError(
            f"{name} must be the tokenizer of the manifest, sha256 {expected[:12]}..., "
            f"got {digest[:12]}...: tokens would mean something else; {fix}"
        )
    return data


def open_tokenizer(root: str | Path) -> Tokenizer:
    """The tokenizer that a dataset was written with.

    Raises:
        DataError: The dataset has no tokens, or its tokenizer is missing or another one.
    """
    manifest = find_manifest(root)
    if not manifest.tokenizer:
        raise DataError(
            f"dataset at {str(root)!r} must name its tokenizer, got none in the manifest; "
            "write it with `selectflow shards make text`"
        )
    if manifest.tokenizer["name"] == "bytes":
        return ByteTokenizer()
    data, library = _read(root, manifest), _library()
    try:
        return SubwordTokenizer(library.Tokenizer.from_str(data.decode()))
    except Exception as error:  # the library raises plain Exceptions
        raise DataError(
            f"{TOKENIZER_NAME} of dataset {str(root)!r} must hold a tokenizer, got {error}; "
            "restore it"
        ) from error


def same_vocabulary(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether every token has the same id in both."""
    if isinstance(ours, ByteTokenizer) or isinstance(theirs, ByteTokenizer):
        return type(ours) is type(theirs)
    return ours.vocabulary() == theirs.vocabulary()
