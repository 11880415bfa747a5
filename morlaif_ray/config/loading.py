"""Reads a config file, applies `--set a.b=c`, and turns every mistake into one line.

    load_config(path, ["policy.num_steps=20"]) -> Config

The line says what is wrong, where it stands, and what to write instead:
`configs/demo.yaml: policy.num_step: unknown key; did you mean 'num_steps'?`
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from morlaif_ray.config.root import Config
from morlaif_ray.errors import ConfigError


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
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}:{line} {problem}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections such as 'policy:', not a {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as section.key=value, e.g. policy.num_steps=20")
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
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    try:
        return float(value)
    except ValueError:
        return value


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = [str(part) for part in problem["loc"]]
    where = _dotted(location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        hint = _nearest_key(location)
        message = f"{where}: unknown key" + (f"; did you mean '{hint}'?" if hint else "")
    elif kind == "value_error":
        text = str(problem["msg"]).removeprefix("Value error, ")
        message = f"{where}: {text}" if where else text
    elif kind == "missing":
        message = f"{where}: is required; add it"
    else:
        given = problem.get("input")
        shown = f" (given: {given!r})" if not isinstance(given, (dict, list)) else ""
        message = f"{where}: {_lower_first(str(problem['msg']))}{shown}"
    more = len(problems) - 1
    return " ".join(message.split()) + (f" (and {more} more problem{'s' * (more > 1)})" if more else "")


def _dotted(location: Iterable[str]) -> str:
    """Drops the names of union members that pydantic puts into a location."""
    kinds = {"testbed", "files", "hub", "scratch", "pretrained", "rules", "openai"}
    parts: list[str] = []
    for part in location:
        if part in kinds or "[" in part or part in {"str", "dict", "list"}:
            continue
        parts.append(part)
    return ".".join(parts)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _nearest_key(location: Sequence[str]) -> str | None:
    """The closest key: first among the siblings, then anywhere in the config (shown with its section)."""
    *parents, wrong = location
    models: list[Any] = [Config]
    for part in parents:
        found: list[Any] = []
        for model in models:
            if part in model.model_fields:
                found.extend(_models_in(model.model_fields[part].annotation))
            elif any(_tag_of(candidate) == part for candidate in [model]):
                found.append(model)
        models = found or models
    siblings = sorted({name for model in models for name in model.model_fields})
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
