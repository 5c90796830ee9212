"""The daemon as a process, with the real lane, gate and supervisor, and a stand-in for vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import redis
from fakeredis import TcpFakeServer

from rowen.executor.admission import AdmissionBounds, GateReason, may_compute
from rowen.executor.lane import Lane
from rowen.policies.lease import ENGINES_KEY, Grant, decode_lease, lease_key

StartDaemon = Callable[..., Any]
Eventually = Callable[..., Any]
ENGINE_ID = "node-1.rollout"


def engine_processes(node: Any) -> list[int]:
    """Processes of rollout engines (and their keepers) that were started for this node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(node.folder) in line and "vllm.entrypoints" in line:
            found.append(process.pid)
    return found


@pytest.fixture
def redis_port() -> Iterator[int]:
    """A server that speaks Redis' protocol on loopback."""
    server = TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_whole_life(
    node: Any, stand_in: StartDaemon, eventually: Eventually, redis_port: int
) -> None:
    url = f"redis://127.0.0.1:{redis_port}"
    store = redis.Redis.from_url(url)

    def grant() -> Grant | None:
        stored = store.get(lease_key(ENGINE_ID))
        return None if stored is None else decode_lease(stored).grant  # type: ignore[arg-type]  # sync client

    daemon = stand_in(redis_url=url)
    status = daemon.wait_for_status(gate="open", rung="run", sequence_cap=16, reason="at_maximum")
    ready = eventually("engine ready", lambda: daemon.status()["engine"]["phase"] == "ready")
    assert ready
    eventually("lane open", lambda: node.word().gate_open)
    assert node.word().sequence_cap == 16
    eventually("run lease", lambda: grant() is Grant.RUN)
    assert {member.decode() for member in store.smembers(ENGINES_KEY)} == {ENGINE_ID}  # type: ignore[union-attr]  # sync client
    lease = decode_lease(store.get(lease_key(ENGINE_ID)))  # type: ignore[arg-type]  # sync client
    assert lease.url == daemon.status()["engine"]["url"]
    assert lease.fencing_epoch == 1
    assert status["readings"]["ttft"]["samples"] == 0

    node.serving.requests_running = 2
    daemon.wait_for_status(rung="gate", cause="serving_busy", gate="open")
    daemon.wait_for_status(rung="drain")
    eventually("draining lease", lambda: grant() is Grant.DRAINING)
    node.serving.requests_running = 0
    daemon.wait_for_status(rung="run")
    eventually("run lease again", lambda: grant() is Grant.RUN)

    node.kill_file.touch()
    eventually("lane closed", lambda: not node.word().gate_open)
    daemon.wait_for_status(rung="stopped", reason="kill_switch")
    eventually("no engine", lambda: not engine_processes(node))
    eventually("no lease", lambda: grant() is None)
    node.kill_file.unlink()
    daemon.wait_for_status(gate="open", rung="run")
    eventually("lane open", lambda: node.word().gate_open)
    lease = decode_lease(store.get(lease_key(ENGINE_ID)))  # type: ignore[arg-type]  # sync client
    assert lease.fencing_epoch == 2

    assert daemon.end() == 0
    assert not engine_processes(node)
    assert grant() is None
    assert not store.smembers(ENGINES_KEY)
    assert not (node.run_dir / "admin-url").exists()
    store.close()


def test_a_killed_daemon_leaves_a_closed_gate_and_no_engine_and_can_be_started_again(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    eventually("lane open", lambda: node.word().gate_open)
    first = set(engine_processes(node))
    assert first

    def reason() -> GateReason:
        lane = Lane.open(node.lane, role="reader")
        try:
            probe, word = lane.read_probe_and_daemon()
            return may_compute(probe, word, time.monotonic_ns(), AdmissionBounds()).reason
        finally:
            lane.close()

    daemon.end(signal.SIGKILL)
    eventually("gate closed", lambda: reason() is GateReason.DAEMON_SILENT)

    second = stand_in()
    eventually("lane open again", lambda: node.word().gate_open)
    eventually("only the new engine", lambda: not first & set(engine_processes(node)))
    assert second.status()["engine"]["generation"] == 1
    assert second.end() == 0
    eventually("nothing left", lambda: not engine_processes(node))


def test_leftovers_end_with_the_kill_switch_on(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    eventually("lane open", lambda: node.word().gate_open)
    front = daemon.status()["engine"]["pid"]
    keeper = psutil.Process(front).ppid()
    os.kill(keeper, signal.SIGSTOP)  # so that it cannot see its owner die
    daemon.end(signal.SIGKILL)
    assert engine_processes(node)
    node.kill_file.touch()
    second = stand_in()
    assert not engine_processes(node)
    assert second.status()["reason"] == "kill_switch"
    assert second.end() == 0


def test_a_stopped_daemon_closes_by_silence_and_starts_slowly_when_it_continues(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    daemon.wait_for_status(reason="at_maximum")
    os.kill(daemon.process.pid, signal.SIGSTOP)
    stamp_ns = node.word().heartbeat_ns
    eventually("silence", lambda: time.monotonic_ns() - stamp_ns > 700_000_000)
    os.kill(daemon.process.pid, signal.SIGCONT)
    daemon.wait_for_status(gate="open", reason="at_maximum")
    reasons = [entry["reason"] for entry in daemon.ask("/history?since=0")["entries"]]
    late = len(reasons) - 1 - reasons[::-1].index("tick_late")
    assert reasons[late + 1] == "cool_down"


def test_a_silent_probe_closes_and_a_returning_one_opens_after_the_cool_down(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    eventually("lane open", lambda: node.word().gate_open)
    node.serving.is_beating = False
    eventually("lane closed", lambda: not node.word().gate_open)
    assert daemon.status()["reason"] == "probe_stale"
    node.serving.is_beating = True
    eventually("lane open", lambda: node.word().gate_open)


def test_an_engine_that_dies_while_starting_is_shown_with_its_last_lines_and_tried_again(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in("dies")
    eventually("a retry", lambda: daemon.status()["engine"]["restarts_total"] >= 1)
    engine = daemon.status()["engine"]
    assert engine["last_exit"]["returncode"] == 3
    assert "OutOfEverything: no weights today" in engine["last_exit"]["last_lines"]
    assert not node.word().gate_open
    assert daemon.end() == 0


def test_an_engine_deaf_to_sigterm_is_killed_by_the_kill_switch(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in("deaf")
    eventually("lane open", lambda: node.word().gate_open)
    node.kill_file.touch()
    daemon.wait_for_status(rung="stopped")
    assert not engine_processes(node)


def test_an_engine_killed_by_someone_else_comes_back_under_a_new_generation(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    pid = eventually("engine", lambda: daemon.status()["engine"]["pid"])
    eventually("lane open", lambda: node.word().gate_open)
    os.kill(pid, signal.SIGKILL)
    eventually("new generation", lambda: daemon.status()["engine"]["generation"] == 2)
    eventually("lane open for it", lambda: node.word().gate_open and node.word().epoch == 2)


def test_an_absent_redis_never_delays_a_decision(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in(redis_url="redis://127.0.0.1:1")
    eventually("lane open", lambda: node.word().gate_open)
    problem = eventually("problem", lambda: daemon.status()["lease"]["problem"])
    assert "Connect call failed" in problem
    assert daemon.end() == 0


def test_redis_that_returns_gets_the_lease(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    # A listener that accepts and never answers is the slow Redis.
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        daemon = stand_in(redis_url=f"redis://127.0.0.1:{port}")
        eventually("lane open", lambda: node.word().gate_open)
        eventually("problem", lambda: daemon.status()["lease"]["problem"])
        # Were a tick to wait for this Redis, it would be late, and the gate closed.
        eventually("lane still open", lambda: node.word().gate_open)
    server = TcpFakeServer(("127.0.0.1", port))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        eventually("lease", lambda: daemon.status()["lease"]["is_published"])
        assert daemon.end() == 0
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_operators_mode_holds_and_releases_the_harvest_over_a_restart(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    eventually("lane open", lambda: node.word().gate_open)
    answer = daemon.ask("/mode", {"mode": "off"})
    assert answer == {"operator": "off", "in_force": "off"}
    eventually("lane closed", lambda: not node.word().gate_open)
    assert daemon.end() == 0
    daemon = stand_in()
    assert daemon.wait_for_status(reason="mode_off")["mode"]["operator"] == "off"
    daemon.ask("/mode", {"mode": "preview"})
    assert "would" in daemon.wait_for_status(reason="preview")["detail"]
    daemon.ask("/mode", {"mode": "enforce"})
    eventually("lane open", lambda: node.word().gate_open)
    with pytest.raises(urllib.error.HTTPError) as caught:
        daemon.ask("/mode", {"mode": "harvest"})
    assert caught.value.code == 400
    caught.value.close()
    with pytest.raises(urllib.error.HTTPError) as caught:
        daemon.ask("/history?since=-1")
    assert caught.value.code == 400
    caught.value.close()
    assert "rowen_gate_open 1.0" in daemon.ask("/metrics")
    url = (node.run_dir / "admin-url").read_text(encoding="utf-8").strip() + "/status"
    request = urllib.request.Request(url, headers={"Host": "rebound.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 403
    caught.value.close()


def test_a_deleted_lane_is_made_anew_and_everybody_follows(
    node: Any, stand_in: StartDaemon, eventually: Eventually
) -> None:
    daemon = stand_in()
    eventually("lane open", lambda: node.word().gate_open)
    node.lane.unlink()
    eventually("a new lane", node.lane.exists)
    eventually("open on the new one", lambda: node.word().gate_open)
    assert daemon.status()["engine"]["generation"] == 1


def run_to_the_end(node: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rowen.daemon", "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=60,
        env=node.environment,
        check=False,
    )


def test_a_second_daemon_on_the_lane_refuses_with_2(node: Any, stand_in: StartDaemon) -> None:
    first = stand_in()
    second = run_to_the_end(node)
    assert second.returncode == 2
    assert "already has a living daemon; stop it, or give this one a lane" in second.stderr
    assert first.process.poll() is None
    assert first.status()["node"] == "node-1"


def test_a_taken_admin_port_refuses_with_2_and_starts_nothing(
    node: Any, stand_in: StartDaemon
) -> None:
    assert stand_in().end() == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = node.config.read_text(encoding="utf-8").replace("port: 0", f"port: {port}")
        node.config.write_text(text, encoding="utf-8")
        done = run_to_the_end(node)
    assert done.returncode == 2
    assert f"admin.port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not engine_processes(node)
