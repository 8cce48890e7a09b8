"""Configurations from YAML and `key=value` overrides, with errors that name all that is wrong.

YAML is read as people write it: `1e-3` is a number, `010` is ten, a key given twice is an error.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from selectflow.fields import ConfigError, Section, describe, nearest, nearest_key

# --- reading and writing --------------------------------------------------------------------------


# Scalars as in YAML 1.2, which people expect: 1e-3 is a number, 010 is ten, 2024-01-31 and 1:30 are
# text. YAML 1.1 reads them as text, as eight, as a date and as ninety. Its yes and no stay.
_INT = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$"
    r"|\.(nan|NaN|NAN)$"
)
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {f"{_TAG}int": _INT, f"{_TAG}float": _FLOAT}
_OURS = {*_NUMBERS, f"{_TAG}timestamp", f"{_TAG}value"}  # "=" is text, too


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping of which no key is given twice, as it is written: before merges are put in."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            is_merge = key.tag == f"{_TAG}merge"
            value = key.value if is_merge else self.construct_object(key)  # 1 and "1" are two
            if (is_merge, value) in seen:
                several = "; merge several by <<: [*a, *b]" if is_merge else ""
                problem = f"key {key.value!r} given twice{several}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((is_merge, value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert merged mappings: own keys override them, and the first of several wins."""
        merged, own = [], []
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                own.append((key, value))
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    problem = "<< must be a mapping, or a list of mappings"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                self.flatten_mapping(source)
                merged.append(source.value)
        node.value = [pair for pairs in reversed(merged) for pair in pairs] + own

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A number with leading zeros is decimal."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if text.lstrip("+-")[:2] in ("0b", "0o", "0x") else 10)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number, or .inf or .nan."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return float(re.sub(r"^([-+]?)\.(?=inf|nan)", r"\1", text, flags=re.IGNORECASE))


class _Dumper(yaml.SafeDumper): ...


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _OURS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
    # besides YAML 1.1's own rules: what either version would read as a number is quoted
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)


def parse_yaml(text: str) -> Any:
    """The value of one YAML document in plain Python values.

    Raises:
        ConfigError: the text is not YAML, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"must be YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # !!int and !!float of other text
        raise ConfigError(f"must be YAML: {error}") from error


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The YAML of plain values, which `parse_yaml` reads back to equal ones; lists on one line."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_override(key: str, value: Any) -> str:
    """`key=value` with a plain value as YAML, which `set_key` reads back to an equal one."""
    text = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return f"{key}={text.strip()[1:-1]}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file.

    Raises:
        ConfigError: the file does not exist, is not text, not YAML, empty, or not a mapping.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        message = f"{path}: config must be an existing file{nearest(str(path), known)}"
        raise ConfigError(message) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: config must be a readable text file: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: config {error}") from error
    if values is None:
        raise ConfigError(f"{path}: config must not be empty; give it at least a name")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: config must be a mapping, got {values!r}")
    return values


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options of a configuration by dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- configurations -------------------------------------------------------------------------------


class Configuration(Section):
    """The whole of a configuration, as a YAML file holds it."""

    example: ClassVar[str]  # of an override, for the message about one that is none

    @classmethod
    def disagreements(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """What is wrong between fields that are right each, one line for each.

        Args:
            values: plain values, as read from a file; some fields may be wrong or missing.

        Raises:
            TypeError: a field has a wrong type.
        """
        del values
        return ()

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if problems := list(self.disagreements(self.model_dump())):
            raise ValueError("; ".join(problems))
        return self


Kind = TypeVar("Kind", bound=Configuration)


def load_as(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """The configuration of a YAML file with `key=value` overrides.

    Args:
        kind: what the file's mapping has the fields of.
        path: YAML file.
        overrides: dotted paths and YAML values, as `select.horizon=2` or `model.hidden=[64, 64]`;
            later ones win.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, has the wrong type or is out of
            range; the message has one line for each of them.
    """
    values = read_yaml(path)
    known = keys_of(kind)
    found = [set_key(values, item, known, kind.example) for item in overrides]
    problems = [problem for problem in found if problem]
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        problems += [_describe(dict(item), known) for item in error.errors() if item["loc"]]
        with contextlib.suppress(TypeError):  # of a value that is among the problems already
            problems.extend(kind.disagreements(values))
    if problems:
        count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{path}: {count} in the configuration", *problems]))
    return config


def _describe(error: dict[str, Any], known: Sequence[str]) -> str:
    """One error of pydantic in a line, with the path that the file has."""
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    section, *rest = error["loc"]
    if error["type"] == "union_tag_invalid":  # an unknown value of the field that tells the kind
        name, context = error["ctx"]["discriminator"].strip("'"), error["ctx"]
        error |= {"type": "literal_error", "loc": (section, name), "input": context["tag"]}
        error["ctx"] = {"expected": context["expected_tags"]}
    elif len(rest) > 1 and f"{section}.{rest[0]}" not in known:
        error["loc"] = (section, *rest[1:])  # without the kind of the section
    return describe(error, known)


def keys_of(kind: type[BaseModel]) -> list[str]:
    """Dotted paths of all keys of a configuration, sections included."""
    found: dict[str, None] = {}
    for name, field in kind.model_fields.items():
        found[name] = None
        for part in (field.annotation, *get_args(field.annotation)):  # of a union, each
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= dict.fromkeys(f"{name}.{key}" for key in keys_of(part))
    return list(found)


def set_key(
    values: dict[str, Any], override: str, known: Sequence[str], example: str
) -> str | None:
    """Set one `section.key=value` in a configuration's values.

    Args:
        values: as read from a file; changed in place.
        override: dotted path and YAML value.
        known: dotted paths of all keys.
        example: of an override, for the message.

    Returns:
        What is wrong with the override, in one line, or None.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        return f"{override!r} must be key=value, as in {example}"
    if path not in known:
        return f"{path} must be a known key, got {text!r}{nearest_key(path, known)}"
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        return f"{path} {error}, got {text!r}"
    *sections, leaf = path.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            return None  # the section itself is wrong, which validation reports
        values = values[section]
    values[leaf] = value
    return None
