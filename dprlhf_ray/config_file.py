"""The config as a file: read, with overrides; checked, with one line for what is wrong; written.

Like `config`, it imports no torch, ray or vllm.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dprlhf_ray.config import STAGES, RunConfig
from dprlhf_ray.errors import ConfigError


class _OnceEach(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error: the second would silently win."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config and apply `a.b=value` overrides.

    Raises:
        ConfigError: one line that names the key, what is wrong and what would be right.
    """
    return parse(tree(path, overrides), str(path))


def tree(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A config as it is written, with its overrides, unchecked. Raises ConfigError where it is no mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: {'is a folder, give a YAML file' if path.is_dir() else 'no such config file'}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = str(getattr(e, "problem", None) or e).splitlines()[0]
        raise ConfigError(f"{path}:{where} is not valid YAML: {reason}") from None
    if found is None:
        raise ConfigError(f"{path}: the file is empty: a config has at least `stages`")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not {type(found).__name__}")
    found = _apart(found)
    for item in overrides or []:
        _override(found, item)
    return dict(found)


def parse(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; raises `ConfigError` with one line for the first problem."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{where}: {_one_line(e)}") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(p) for i, p in enumerate(first["loc"]) if not (i == 2 and p in STAGES))  # no key: a union's tag
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("be a valid", "be a")
    message = re.sub(r"should be a (dictionary|model).*", "should be a section of keys and values", message)
    message = re.sub(r"should be an? (valid )?integer.*", "should be a whole number", message)
    message = re.sub(r"(should be a number), unable.*", r"\1", message)
    message = re.sub(r"should be a tuple", "should be a list, each of its items after a dash", message)
    message = re.sub(r"Tuple should have at least (\d+) items?.*", r"should have at least \1", message)
    message = re.sub(r"String should match pattern '\^\[(.).*", r"letters, digits, - and _ only", message)
    if not key:  # a check of the whole config names its keys itself
        return message
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_known_keys(first['loc'])}"
    if first["type"] == "union_tag_invalid":
        got = first.get("ctx", {}).get("tag")
        return f"{key}.kind: no such kind of stage: {got}; there are {', '.join(STAGES)}"
    if first["type"] == "missing":
        return f"{key}: this key is required"
    value = first.get("input")
    shown = "" if isinstance(value, dict | list | tuple) or first["type"] == "value_error" else f" (got {value!r})"
    return f"{key}: {message}{shown}"


def _known_keys(loc: tuple[Any, ...]) -> str:
    """Suggest the nearest known key at that place."""
    model: Any = RunConfig
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is not None:
            model = _section(field.annotation)
        elif part in STAGES:
            model = STAGES[str(part)]
    keys = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(loc[-1]), keys, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(keys)}"


def _section(annotation: Any) -> Any:
    """The section class inside an annotation such as tuple[RLStage, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        found = _section(arg)
        if found is not None:
            return found
    return None


def _apart(node: Any) -> Any:
    """A copy in which sections that a YAML anchor shares are each their own: an override changes one of them."""
    if isinstance(node, dict):
        return {key: _apart(value) for key, value in node.items()}
    return [_apart(value) for value in node] if isinstance(node, list) else node


def _override(tree: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"--set {item!r}: write it as key.subkey=value")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    try:
        value = yaml.load(text, _OnceEach)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item!r}: the value is not valid YAML") from None
    if isinstance(value, str):
        value = _number(value)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _number(text: str) -> Any:
    """YAML reads 1e-5 as text; people mean a number."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {key}: {part!r} is a value, not a section")
    return child


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {key}: {part!r} should be an index below {len(node)}")
    return int(part)
