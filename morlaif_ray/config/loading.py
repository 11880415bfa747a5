"""Reads a config file, applies `--set a.b=c`, and turns every mistake into one line.

    load_config(path, ["policy.num_steps=20"]) -> Config

The line says what is wrong, where it stands, and what to write instead:
`configs/demo.yaml: policy.num_step: unknown key; did you mean 'num_steps'?`
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from morlaif_ray.config.root import Config
from morlaif_ray.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A section written twice is an error; plain YAML would silently drop the first one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is written twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` (None: all defaults) and applies `overrides`; raises ConfigError with a one-line message."""
    raw: dict[str, Any] = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    where = "config" if path is None else str(path)
    return parse_config(raw, where)


def parse_config(raw: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a YAML file such as configs/demo.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; see configs/ for examples") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}:{line} {problem}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: must hold sections such as 'policy:', not a {type(raw).__name__}"
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"--set {override!r}: write it as section.key=value, e.g. policy.num_steps=20"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML; quote it") from None
    if isinstance(value, str):
        value = _number_or_text(value)
    *parents, leaf = key.strip().split(".")
    node: dict[str, Any] = raw
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: '{part}' is not a section")
        node = child
    node[leaf] = value


def _number_or_text(value: str) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean the number. Words such as nan and inf stay text."""
    return float(value) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value) else value


def _first_problem(error: ValidationError) -> str:
    """The first mistake in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    places = [".".join(_walk(problem["loc"])[0]) for problem in problems]
    # The members of a union each report the same value: the member that got furthest says it best.
    alike = [i for i, place in enumerate(places) if _is_under(place, places[0])]
    deepest = max(alike, key=lambda i: len(places[i]))
    texts = [_describe(problems[i]) for i in alike if places[i] == places[deepest]]
    where = places[deepest]
    given = problems[deepest].get("input")
    named = problems[deepest]["type"] in _SELF_EXPLAINING
    shown = "" if named or isinstance(given, (dict, list)) else f" (given: {given!r})"
    message = (f"{where}: " if where else "") + " or ".join(texts) + shown
    more = len({place for place in places if not _is_under(place, places[0])})
    return " ".join(message.split()) + (
        f" (and {more} more problem{'s' * (more > 1)})" if more else ""
    )


_SELF_EXPLAINING = {
    "extra_forbidden",
    "value_error",
    "missing",
    "union_tag_invalid",
    "union_tag_not_found",
}
"""Problems whose text needs no "(given: ...)" behind it."""


def _is_under(place: str, top: str) -> bool:
    return place == top or place.startswith(f"{top}.")


def _describe(problem: Any) -> str:
    """What is wrong and what to write instead, without the place."""
    kind, location = problem["type"], problem["loc"]
    if kind == "extra_forbidden":
        hint = _nearest_key(location)
        return "unknown key" + (f"; did you mean '{hint}'?" if hint else "")
    if kind == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        return "is required; add it"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        kinds = [str(_tag_of(model)) for model in _walk(location)[1]]
        wrong = (
            "" if kind == "union_tag_not_found" else f"kind {problem['ctx']['tag']!r} is unknown; "
        )
        return f"{wrong}write kind: {', '.join(kinds[:-1])} or {kinds[-1]}"
    if kind in ("model_type", "model_attributes_type"):
        return "must be a section with keys of its own"
    return str(problem["msg"])[:1].lower() + str(problem["msg"])[1:]


def _walk(location: Iterable[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """(keys as written, sections that may stand there); drops the union members that pydantic adds to a location."""
    keys: list[str] = []
    models: list[type[BaseModel]] = [Config]
    for part in map(str, location):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        member = [model for model in models if _tag_of(model) == part]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        elif member and len(models) > 1:
            models = member
            continue
        elif "[" in part:
            continue
        keys.append(part)
    return keys, models


def _nearest_key(location: Sequence[Any]) -> str | None:
    """The closest key: first among the siblings, then anywhere in the config (shown with its section)."""
    wrong = str(location[-1])
    siblings = sorted({name for model in _walk(location[:-1])[1] for name in model.model_fields})
    close = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6)
    if close:
        return close[0]
    everywhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in _all_keys(Config, "")}
    close = difflib.get_close_matches(wrong, list(everywhere), n=1, cutoff=0.75)
    return everywhere[close[0]] if close else None


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Config sections named in a type annotation, through unions, lists and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list, dict, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _all_keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in _models_in(info.annotation):
            yield from _all_keys(child, f"{prefix}{name}.")
