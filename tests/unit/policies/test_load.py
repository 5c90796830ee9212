"""Policy files: what is accepted, and how every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rowen.policies.document import MAX_FILE_BYTES
from rowen.policies.load import PolicyError, library_policy, load_policy
from rowen.policies.schema import Mode

DEMO = library_policy("demo").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    return [str(problem) for problem in caught.value.problems]


def test_the_shipped_demo_policy_is_valid_and_enforces() -> None:
    policy = load_policy(library_policy("demo"))
    assert policy.spec.mode is Mode.ENFORCE
    assert policy.spec.objectives.ttft.threshold_ms == 1000
    assert policy.spec.reclaim.drain_after_ms == 1500


def test_an_unknown_shipped_policy_names_those_that_exist() -> None:
    with pytest.raises(PolicyError, match="no shipped policy 'nope'; known: demo"):
        library_policy("nope")


def test_every_mistake_is_named_at_once_with_line_field_and_value(tmp_path: Path) -> None:
    text = DEMO.replace("mode: enforce", "mode: harvest").replace(
        "threshold_ms: 150", "threshold_ms: -5"
    )
    text = text.replace("max_sequences: 16", "max_sequence: 16")
    path = write(tmp_path, text)
    lines = text.splitlines()
    found = problems_of(path)
    assert len(found) == 4
    mode_line = next(n for n, line in enumerate(lines, 1) if "mode: harvest" in line)
    assert f"{path}:{mode_line}: spec.mode: is 'harvest': input should be" in found[0]
    assert "spec.objectives.tpot.threshold_ms: is -5: input should be greater than 0" in found[1]
    assert "spec.resources.max_sequences: is missing; add it" in found[2]
    assert found[3].endswith(
        "spec.resources.max_sequence: is not a field of this document; did you mean max_sequences?"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "initial_sequences: 2",
            "initial_sequences: 20",
            "growth.initial_sequences (20) is above resources.max_sequences (16): lower it",
        ),
        (
            "      min_samples: 15 # an SLO",
            "      cut_ratio: 0.5\n      min_samples: 15 # an SLO",
            "recover_ratio (0.9) must be below cut_ratio (0.5)",
        ),
        ("probe_heartbeat_ms: 800", "probe_heartbeat_ms: 2000", "less than or equal to 900"),
        ("apiVersion: rowen.dev/v1alpha1", "apiVersion: v1", "is 'v1': input should be"),
        ("window_s: 10", "window_s: .nan", "window_s: is nan: input should be"),
        ("name: demo", "name: De mo", "metadata.name: is 'De mo': string should match"),
        ("mode: enforce", "mode: enforce\n  mode: off", "spec.mode: the key stands twice"),
    ],
)
def test_a_wrong_value_is_refused_with_a_remedy(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in DEMO
    found = problems_of(write(tmp_path, DEMO.replace(old, new)))
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"- 1\n", "holds a list, expected a mapping"),
        (b"a: [1\n", ":2: not YAML"),
        (b"\xff\xfe\xfa", "not UTF-8 text"),
        (b"a: \x07", "not YAML"),
        (b"#" * (MAX_FILE_BYTES + 1), "this is not a configuration file"),
        (b"a: !!python/object:os.system {}\n", "not YAML"),
        (b"? [a]\n: 1\n", "not YAML"),
        (b"a: &x [*x]\n", "uses the YAML alias *x; write the value out"),
        (b"[" * 5000, "nested deeper than 32 levels"),
        (b"a: 2026-99-99\n", "not YAML"),
    ],
)
def test_what_is_no_policy_at_all_is_refused_plainly(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    assert any(expected in problem for problem in problems_of(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "no such file" in problems_of(tmp_path / "absent.yaml")[0]
    assert "cannot be read (Is a directory)" in problems_of(tmp_path)[0]


def test_a_policy_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    policy = load_policy(library_policy("demo"))
    path = write(tmp_path, yaml.safe_dump(policy.model_dump(mode="json")))
    assert load_policy(path) == policy
