"""Load a policy file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rowen.policies.document import DocumentError, Problem, read_document
from rowen.policies.schema import HarvestPolicy


class PolicyError(DocumentError):
    """A policy file cannot be used; ``problems`` names every mistake with file, line and field."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)


def load_policy(path: Path | str) -> HarvestPolicy:
    """Read one policy file.

    Raises:
        PolicyError: it is missing, not YAML or not a policy.  The policy in force stays so.
    """
    try:
        return read_document(Path(path), HarvestPolicy)
    except DocumentError as error:
        raise PolicyError(error.problems) from error


def library_policy(name: str) -> Path:
    """Path of a policy that ships with Rowen, for example ``library_policy("demo")``.

    Raises:
        PolicyError: there is none of that name; the message lists those that exist.
    """
    folder = Path(__file__).parent / "library"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise PolicyError([Problem(path, None, "", f"no shipped policy {name!r}; known: {known}")])
    return path
