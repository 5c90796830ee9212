"""What vLLM's ``--additional-config '{"rowen": {...}}'`` tells the plugin classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowen.executor.admission import AdmissionBounds


@dataclass(frozen=True)
class LaneConfig:
    """The ``rowen`` section; see ``EngineSpec.argv`` for who writes it."""

    lane: Path
    bounds: AdmissionBounds = field(default_factory=AdmissionBounds)
    layer_hold_ms: int = 1000
    """A hold between layers lasts at most this long per step, then the step is finished so that
    the engine can handle aborts, pauses and weight updates; the step gate then holds."""


_KEYS = {"lane", "probe_silent_ms", "daemon_silent_ms", "layer_hold_ms"}


def read_lane_config(vllm_config: Any) -> LaneConfig | None:
    """The lane settings of an engine, or None when it was started without them.

    Raises:
        ValueError: the section names an unknown key, no lane, or a value out of range.
    """
    additional = vllm_config.additional_config
    section = additional.get("rowen") if isinstance(additional, dict) else None
    if section is None:
        return None
    if unknown := set(section) - _KEYS:
        raise ValueError(
            f"additional-config rowen has the unknown key {sorted(unknown)[0]!r}; "
            f"known are {', '.join(sorted(_KEYS))}"
        )
    if not isinstance(section.get("lane"), str):
        raise ValueError("additional-config rowen lacks the key 'lane', the path of the lane file")
    hold_ms = int(section.get("layer_hold_ms", LaneConfig.layer_hold_ms))
    if hold_ms < 0:
        raise ValueError(f"additional-config rowen.layer_hold_ms is {hold_ms}; give 0 or more")
    bounds = {name: int(section[name]) for name in section if name.endswith("_silent_ms")}
    return LaneConfig(Path(section["lane"]), AdmissionBounds(**bounds), hold_ms)
