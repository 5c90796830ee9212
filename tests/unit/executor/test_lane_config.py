"""The plugin's settings: absent is None, wrong is a sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rowen.executor.admission import AdmissionBounds
from rowen.executor.lane_config import LaneConfig, read_lane_config


def engine(section: object) -> SimpleNamespace:
    return SimpleNamespace(additional_config={} if section is None else {"rowen": section})


def test_an_engine_without_the_section_has_no_lane() -> None:
    assert read_lane_config(engine(None)) is None


def test_the_defaults_are_the_contracts() -> None:
    config = read_lane_config(engine({"lane": "/run/l"}))
    assert config == LaneConfig(Path("/run/l"), AdmissionBounds(500, 500), 1000)


def test_settings_are_taken() -> None:
    section = {"lane": "/l", "probe_silent_ms": 300, "daemon_silent_ms": 400, "layer_hold_ms": 0}
    expected = LaneConfig(Path("/l"), AdmissionBounds(300, 400), 0)
    assert read_lane_config(engine(section)) == expected


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({}, "lacks the key 'lane'"),
        ({"lane": "/l", "lanes": 1}, "unknown key 'lanes'"),
        ({"lane": "/l", "layer_hold_ms": -1}, "layer_hold_ms is -1"),
        ({"lane": "/l", "probe_silent_ms": 1500}, "probe_silent_ms is 1500"),
    ],
)
def test_wrong_settings_are_named(section: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_lane_config(engine(section))
