"""The node file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rowen.daemon.__main__ import main
from rowen.daemon.config import ConfigError, gated_spec, load_config
from rowen.policies.load import library_policy


def document(folder: Path, **changes: Any) -> dict[str, Any]:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    return {
        "node": "node-1",
        "policy": str(library_policy("demo")),
        "lane": "run/lane",
        "serving": {"url": "http://127.0.0.1:8000"},
        "rollout": {"name": "rollout", "role": "rollout", "model": "model"},
        "run_dir": "run",
    } | changes


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "node.yaml"
    path.write_text(yaml.safe_dump(document(folder, **changes)), encoding="utf-8")
    return path


def test_paths_count_from_the_file_and_the_engine_gets_lane_and_bounds(tmp_path: Path) -> None:
    config, policy = load_config(write(tmp_path))
    assert config.lane == tmp_path / "run" / "lane"
    assert config.kill_file == tmp_path / "run" / "kill"
    assert config.rollout.model == tmp_path / "model"
    assert config.engine_id == "node-1.rollout"
    assert config.serving.scrape_url == "http://127.0.0.1:8000/metrics"
    assert config.run_dir.is_dir()
    argv = gated_spec(config, policy).argv(9000)
    last = len(argv) - 1 - argv[::-1].index("--additional-config")
    assert json.loads(argv[last + 1])["rowen"] == {
        "lane": str(tmp_path / "run" / "lane"),
        "probe_silent_ms": 800,
        "daemon_silent_ms": 500,
    }


@pytest.mark.parametrize(("said", "expected"), [({}, True), ({"idle_class": False}, False)])
def test_rollouts_are_in_the_idle_class_unless_the_file_says_no(
    tmp_path: Path, said: dict[str, bool], expected: bool
) -> None:
    rollout = {"name": "rollout", "role": "rollout", "model": "model"} | said
    config, _ = load_config(write(tmp_path, rollout=rollout))
    assert config.rollout.idle_class == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"policy": "absent.yaml"}, "absent.yaml: no such file"),
        ({"nodes": "x"}, "nodes: is not a field of this document; did you mean node?"),
        ({"admin": {"host": "0.0.0.0"}}, "admin.host: is '0.0.0.0': input should be"),
        ({"redis_url": "http://x"}, "redis_url: is 'http://x'"),
        ({"redis_url": "redis://h:port"}, "no Redis client can be made from this (Port could not"),
        ({"redis_url": "redis://h?colour=red"}, "no Redis client can be made from this"),
        ({"redis_url": "rediss://h?ssl_cert_reqs=odd"}, "no Redis client can be made from this"),
        (
            {"rollout": {"name": "rollout", "role": "serving", "model": "model"}},
            "rollout.role is 'serving', expected 'rollout'",
        ),
        (
            {"rollout": {"name": "r", "role": "rollout", "model": "nowhere"}},
            "nowhere holds no config.json",
        ),
        (
            {"rollout": {"name": "r", "role": "rollout", "model": "model", "lane": "other"}},
            "rollout.lane (other) differs from lane (run/lane)",
        ),
    ],
)
def test_a_wrong_node_file_exits_2_with_the_field_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert main(["--config", str(path)]) == 2
    assert expected in capsys.readouterr().err


def test_check_prints_the_resolved_node_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write(tmp_path)), "--check"]) == 0
    assert json.loads(capsys.readouterr().out)["lane"] == str(tmp_path / "run" / "lane")


def test_a_run_dir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="name folders that can be written"):
        load_config(write(tmp_path, run_dir="file/run"))
