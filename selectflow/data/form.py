"""What a batch asks of the values of a sample: one shape and type of array, labels in range."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from selectflow.data.fields import Sample, array_field
from selectflow.data.manifest import DataError

LOOKED_AT = 64
"""Samples, the first of a split, whose most common shape is that of all."""


_NOTHING: dict[str, Any] = {}
_MOST = 2**31  # no label above it is a class


class Form(NamedTuple):
    """The array of each sample: where it is, its shape and type; None: not known, or none."""

    field: str | None
    shape: tuple[int, ...] | None
    dtype: Any


NO_FORM = Form(None, None, None)


class Rules(NamedTuple):
    """What the values of a sample must be, besides having the form of the others.

    Attributes:
        num_classes: labels are below it, and none below 0; None: 2^31.
    """

    num_classes: int | None = None


def common_form(samples: Iterable[Sample]) -> Form:
    """The form of most samples; of equally many, the one met first."""
    forms = Counter[Form]()
    for sample in samples:
        if field := array_field(sample):
            forms[Form(field, sample[field].shape, sample[field].dtype)] += 1
    return forms.most_common(1)[0][0] if forms else NO_FORM


def fit_quickly(samples: Sequence[Sample], form: Form, rules: Rules) -> bool:
    """Whether `check_sample` lets all pass, json apart; False where each has to be asked."""
    end = rules.num_classes or _MOST
    try:
        arrays = [sample[form.field] for sample in samples] if form.field else []
        labels = [sample["cls"] for sample in samples] if "cls" in samples[0] else [0]
    except KeyError:  # an image of another format, or no label
        return False
    # counted by `list.count`, a third of the time of a loop
    return (
        [array.shape for array in arrays].count(form.shape or ()) == len(arrays)
        and [array.dtype for array in arrays].count(form.dtype) == len(arrays)
        and 0 <= min(labels) <= max(labels) < end
    )


def check_sample(sample: Sample, form: Form, rules: Rules, shard: str) -> None:
    """Refuse a sample that cannot be in a batch with those of the form.

    Raises:
        DataError: names its key, the field and the shard.
    """
    label, end = sample.get("cls", 0), rules.num_classes or _MOST
    if not 0 <= label < end:
        rule = "at least 0" if label < 0 else f"below {end}, the number of classes"
        raise _error("label", sample, rule, label, "cls", shard)
    if not isinstance(made := sample.get("json", _NOTHING), dict):
        raise _error("json", sample, "an object", type(made).__name__, "json", shard)
    field = array_field(sample)
    if form.shape is None:
        return
    if field is None:
        raise _error("sample", sample, "with an array", "none", str(form.field), shard)
    array = sample[field]
    if array.shape != form.shape or array.dtype != form.dtype:
        name = "tokens" if field == "npy" and "cls" not in sample else "image"
        rule = f"of shape {form.shape} and {form.dtype} like most"
        raise _error(name, sample, rule, f"{array.shape} and {array.dtype}", field, shard)


def _error(name: str, sample: Sample, rule: str, got: object, field: str, shard: str) -> DataError:
    return DataError(
        f"{name} of key {sample['__key__']!r} must be {rule}, got {got} in field {field!r} of "
        f"shard {shard}; write the sample anew, or leave it out"
    )
