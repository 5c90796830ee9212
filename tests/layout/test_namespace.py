"""Seven components, portions of one namespace; every list in pyproject.toml names them all."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPONENTS = sorted(p.parent.name for p in ROOT.glob("*/rowen/*/__init__.py"))


def test_rowen_is_a_namespace_package() -> None:
    assert importlib.import_module("rowen").__file__ is None
    assert not list(ROOT.glob("*/rowen/__init__.py"))


def test_there_are_components_at_all() -> None:
    assert len(COMPONENTS) == 7


def test_every_component_is_listed_everywhere() -> None:
    tool = CONFIG["tool"]
    assert sorted(tool["hatch"]["build"]["dev-mode-dirs"]) == COMPONENTS
    wheel = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(wheel) == [f"{c}/rowen" for c in COMPONENTS]
    assert sorted(tool["ruff"]["src"]) == COMPONENTS
    assert sorted(tool["mypy"]["mypy_path"]) == COMPONENTS
    assert sorted(tool["importlinter"]["root_packages"]) == [f"rowen.{c}" for c in COMPONENTS]
    banned = tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(banned) == COMPONENTS


def test_every_component_has_a_readme_and_types() -> None:
    for component in COMPONENTS:
        assert (ROOT / component / "README.md").is_file(), component
        assert (ROOT / component / "rowen" / component / "py.typed").is_file(), component


def test_every_pure_core_of_the_contract_exists() -> None:
    contracts = CONFIG["tool"]["importlinter"]["contracts"]
    (pure,) = [c for c in contracts if c["name"] == "decision cores do no I/O"]
    for module in pure["source_modules"]:
        _, component, *rest = module.split(".")
        path = ROOT / component / "rowen" / component / Path(*rest)
        assert path.with_suffix(".py").is_file(), module


def test_no_heap_modules() -> None:
    heaps = re.compile(r"(utils?|common|helpers?)\.py$")
    assert not [p for c in COMPONENTS for p in (ROOT / c).rglob("*.py") if heaps.search(p.name)]
