"""An engine's command line says everything that matters, and refuses contradictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from rowen.executor.engine import GATED_SCHEDULER, PROBE_SCHEDULER, EngineSpec

LANE = Path("/run/node.lane")


def spec(**fields: object) -> EngineSpec:
    return EngineSpec.model_validate(
        {"name": "one", "role": "rollout", "model": "/models/one", **fields}
    )


def option(argv: list[str], name: str) -> str | None:
    return argv[argv.index(name) + 1] if name in argv else None


@pytest.mark.parametrize(
    ("role", "lane", "scheduler"),
    [
        ("serving", LANE, PROBE_SCHEDULER),
        ("rollout", LANE, GATED_SCHEDULER),
        ("serving", None, None),
        ("rollout", None, None),
    ],
)
def test_the_lane_decides_the_scheduler(role: str, lane: Path | None, scheduler: str) -> None:
    argv = spec(role=role, lane=lane).argv(8001)
    assert option(argv, "--scheduler-cls") == scheduler
    additional = option(argv, "--additional-config")
    assert (additional is None) == (lane is None)
    if additional is not None:
        bounds = {"probe_silent_ms": 500, "daemon_silent_ms": 500} if role == "rollout" else {}
        assert json.loads(additional) == {"rowen": {"lane": str(lane), **bounds}}
    assert option(argv, "--port") == "8001"


def test_only_rollout_engines_take_weights_and_open_the_rl_routes() -> None:
    serving, rollout = spec(role="serving"), spec()
    assert "--weight-transfer-config" not in serving.argv()
    assert option(rollout.argv(), "--weight-transfer-config") == '{"backend": "rowen"}'
    assert "VLLM_SERVER_DEV_MODE" not in serving.environment()
    assert rollout.environment()["VLLM_SERVER_DEV_MODE"] == "1"
    assert serving.environment()["ROWEN_ENGINE_ROLE"] == "serving"


def test_extra_arguments_come_last() -> None:
    assert spec(extra_args=("--seed", "3")).argv()[-2:] == ["--seed", "3"]


def test_production_is_never_put_into_the_idle_class() -> None:
    with pytest.raises(ValidationError, match="set idle_class to false"):
        spec(role="serving", idle_class=True)


@pytest.mark.parametrize(
    "fields",
    [{"host": "0.0.0.0"}, {"port": 65536}, {"name": "Über"}, {"cores": [0]}, {"max_num_seqs": 0}],
)
def test_bad_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        spec(**fields)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model of engine one: .* holds no config\.json"):
        spec(model=tmp_path).check_model()
