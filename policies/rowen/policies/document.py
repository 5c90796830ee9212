"""Read a YAML file into a pydantic document and name every mistake by file, line, field and value.

Used by the policy loader and by every other configuration file of Rowen, so that all of them fail in
the same words.  Reads the one file it is given and nothing else.
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
    """A configuration file cannot be used.  ``problems`` holds every mistake; nothing was changed."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def read_document(path: Path, model: type[Document]) -> Document:
    """Read and validate one YAML document.

    Raises:
        DocumentError: the file is missing, unreadable, not YAML, or not a valid ``model``; all
            mistakes at once.
    """
    root = _compose(path, _read_text(path))
    duplicates = [
        Problem(path, line, _dotted(where), "the key stands twice; keep one of them")
        for where, line in _duplicate_keys(root, ())
    ]
    if duplicates:
        raise DocumentError(duplicates)
    content: Any = yaml.SafeLoader.construct_document(yaml.SafeLoader(""), root)
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


def _compose(path: Path, text: str) -> yaml.Node:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        raise DocumentError([Problem(path, line, "", f"not YAML: {error.problem}")]) from None
    except yaml.YAMLError as error:
        message = f"not YAML: {str(error).splitlines()[0]}"
        raise DocumentError([Problem(path, None, "", message)]) from None
    if root is None:
        raise DocumentError([Problem(path, None, "", "the file is empty")])
    return root


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
