"""The section of a run's configuration on its data."""

import re
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from selectflow.options import Count, Directory, Section, must_be


def _path_or_url(value: object) -> object:
    return Path(value) if isinstance(value, str) and "://" not in value else value


def _holds_splits(value: object) -> bool:
    """Whether a location may have a target set and a test set besides what is trained on."""
    return not re.search(r"[{]|\.tar$|^pipe:", str(value))


# a path would lose one of the slashes of "s3://"
Location = Directory | Annotated[str, Field(pattern="^[a-z0-9+]+://")]


class TextConfig(Section):
    """What blocks of text are made of, as `selectflow shards make text` makes them."""

    source: str = Field(
        default="python",
        description="python: what comes with it; files:FOLDER; jsonl:FILE; hf:NAME",
    )
    tokenizer: str = Field(
        default="bytes", description="bytes; bpe:SIZE, trained on the text; or an existing one"
    )
    block: Annotated[int, Field(ge=2)] = Field(default=128, description="tokens of an example")
    rest: Literal["drop", "pad", "pack"] = Field(
        default="drop", description="what becomes of tokens that fill no block"
    )
    target_domain: str | None = Field(
        default="code", description="domain of the target and test sets; null: all"
    )
    mixture: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None,
        description="shares of domains and of dirt (shuffled, duplicate, boilerplate) in the "
        "stream; null: all clean text",
    )
    num_train: Count | None = Field(
        default=None, description="examples of the stream; null: all; needed for a mixture"
    )
    num_target: Count = Field(default=200, description="examples of the target set")
    num_test: Count = Field(default=400, description="examples of the test set")


class DataConfig(Section):
    """Where the examples come from."""

    name: Literal["digits", "text", "shards"] = Field(
        default="digits",
        description="digits, text: written on first use; shards: an existing directory",
    )
    text: TextConfig = Field(default=TextConfig(), description="how text is made (text)")
    root: Annotated[
        Location | None,
        BeforeValidator(_path_or_url),
        must_be("a directory with the splits train, target and test, or its URL", _holds_splits),
    ] = Field(
        default=None,
        description="directory of the shards, or its URL (s3, gs, hf, https: extra `remote`); "
        "null: data/<name and options> for digits and text",
    )
    label_noise: float = Field(
        default=0.0, ge=0, lt=1, description="share of training labels made wrong (digits)"
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the written shards: which labels are altered"
    )
    separate_documents: bool = Field(
        default=False,
        description="documents that share a block (text.rest: pack) do not see each other: "
        "positions begin again after each end token. A block's loss and score are then the means "
        "of its documents', weighted by their predicted tokens (language)",
    )
    pool: Count = Field(default=64, description="P: candidate examples of one optimizer step")
    num_workers: int = Field(
        default=0, ge=0, description="processes that read and decode; 0: the training process"
    )
    buffer: Count = Field(default=4096, description="samples that are shuffled together")
    memory_gib: float = Field(
        default=1.0, ge=0, description="decoded data up to this size, in GiB, are held in memory"
    )
    max_errors: int = Field(
        default=0, ge=0, description="unreadable samples before the run stops; 0: the first does"
    )
    target_batch: Count = Field(default=200, description="examples of one batch of the target set")

    @property
    def directory(self) -> Path | str:
        """The directory or URL of the shards, `root` or the one derived from the options."""
        if self.root is not None:
            return self.root
        if self.name == "text":
            options = zlib.crc32(self.text.model_dump_json().encode())
            return Path("data", f"text-{options:08x}-seed{self.seed}")
        return Path("data", f"digits-noise{self.label_noise:g}-seed{self.seed}")

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of `PoolStream` that say how shards are read, not what comes of them."""
        return self.model_dump(include={"buffer", "num_workers", "memory_gib", "max_errors"})
