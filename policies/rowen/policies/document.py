"""Read a YAML file into a pydantic document and name every mistake by file, line, field and value.

Used by the policy loader and by every other configuration file of Rowen, so that all of them fail
in the same words.  Reads the one file it is given and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_FILE_BYTES = 1_000_000
"""A configuration file is a few kilobytes; more is a wrong path."""

MAX_DEPTH = 32
"""Ours have six levels."""

Document = TypeVar("Document", bound=BaseModel)
Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file."""

    file: Path
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else str(self.file)
        return (
            f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"
        )


class DocumentError(Exception):
    """A configuration file cannot be used; ``problems`` holds every mistake.  Nothing changed."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def read_document(path: Path, model: type[Document]) -> Document:
    """Read and validate one YAML document.

    Raises:
        DocumentError: the file is missing, unreadable, not YAML, or not a valid ``model``; all
            mistakes at once.
    """
    root, content = _parse(path, _read_text(path))
    duplicates = [
        Problem(path, line, _dotted(where), "the key stands twice; keep one of them")
        for where, line in _duplicate_keys(root, ())
    ]
    if duplicates:
        raise DocumentError(duplicates)
    if not isinstance(content, dict):
        message = f"holds a {type(content).__name__}, expected a mapping of fields"
        raise DocumentError([Problem(path, 1, "", message)])
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = dict(_lines(root, ()))
        problems = [
            _describe(path, lines, detail, model)
            for detail in error.errors(include_url=False, include_context=True)
        ]
        raise DocumentError(problems) from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            message = f"larger than {MAX_FILE_BYTES} bytes; this is not a configuration file"
            raise DocumentError([Problem(path, None, "", message)])
        return raw.decode("utf-8")
    except FileNotFoundError:
        message = "no such file; create it or give the right path"
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start}); save it as UTF-8"
    except OSError as error:
        message = f"cannot be read ({error.strerror}); give a readable file"
    raise DocumentError([Problem(path, None, "", message)])


def _parse(path: Path, text: str) -> tuple[yaml.Node, Any]:
    """The nodes, which know their lines, and the plain values."""
    try:
        _refuse_traps(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark_line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        message = f"not YAML: {error.problem}"
        raise DocumentError([Problem(path, mark_line, "", message)]) from None
    except (yaml.YAMLError, ValueError) as error:
        message = f"not YAML: {str(error).splitlines()[0]}"
        raise DocumentError([Problem(path, None, "", message)]) from None
    if root is None:
        raise DocumentError([Problem(path, None, "", "the file is empty")])
    return root, content


def _refuse_traps(path: Path, text: str) -> None:
    """Refuse what a few lines of can fill the memory or the stack, before any of it is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        message = ""
        if isinstance(event, yaml.AliasEvent):
            message = f"uses the YAML alias *{event.anchor}; write the value out instead"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            message = f"nested deeper than {MAX_DEPTH} levels; this is not a configuration file"
        if message:
            line = event.start_mark.line + 1 if event.start_mark is not None else None
            raise DocumentError([Problem(path, line, "", message)])


def _lines(node: yaml.Node, where: Location) -> Iterator[tuple[Location, int]]:
    """The line of every field, that of its key where it has one."""
    if not where:
        yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = (*where, str(key.value))
            yield field, key.start_mark.line + 1
            yield from _lines(value, field)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield (*where, place), value.start_mark.line + 1
            yield from _lines(value, (*where, place))


def _duplicate_keys(node: yaml.Node, where: Location) -> Iterator[tuple[Location, int]]:
    """YAML forbids a key twice in one mapping, but PyYAML silently takes the last."""
    if isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, value in node.value:
            field = (*where, str(key.value))
            if str(key.value) in known:
                yield field, key.start_mark.line + 1
            known.add(str(key.value))
            yield from _duplicate_keys(value, field)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield from _duplicate_keys(value, (*where, place))


def _describe(
    path: Path, lines: dict[Location, int], detail: ErrorDetails, model: type[BaseModel]
) -> Problem:
    where: Location = detail["loc"]
    line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), None)
    kind, given = detail["type"], detail["input"]
    if kind == "missing":
        message = "is missing; add it"
    elif kind == "extra_forbidden":
        message = "is not a field of this document" + _suggestion(where, model)
    else:
        text = detail["msg"].removeprefix("Value error, ")
        text = text[:1].lower() + text[1:]
        is_scalar = isinstance(given, str | int | float | bool) or given is None
        message = f"is {given!r}: {text}" if is_scalar else text
    return Problem(path, line, _dotted(where), message)


def _suggestion(where: Location, model: type[BaseModel]) -> str:
    parent = _model_at(model, where[:-1])
    if parent is None:
        return "; remove it"
    near = difflib.get_close_matches(str(where[-1]), list(parent.model_fields), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(parent.model_fields)}"


def _model_at(model: type[BaseModel], where: Location) -> type[BaseModel] | None:
    """The model that describes the mapping at ``where``, where it is a plain nested one."""
    for part in where:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return None
        if not issubclass(field.annotation, BaseModel):
            return None
        model = field.annotation
    return model


def _dotted(where: Location) -> str:
    return ".".join(str(part) for part in where)
