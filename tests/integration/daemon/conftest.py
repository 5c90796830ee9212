"""A node in miniature: a serving engine's probe and metrics, a daemon process, a rollout engine.

The daemon, the lane, the gate, the supervisor and Redis' protocol are the real ones.  Where a test
needs no tokens, a small stand-in takes vLLM's place on the import path of the engine's process: it
answers /health and /metrics and runs the real gate on the lane.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from rowen.daemon.scrape import TPOT_METRIC, TTFT_METRIC
from rowen.executor.lane import DaemonReading, Lane, LaneError, ProbeReading
from rowen.policies.load import library_policy, load_policy

DEADLINE_S = 30.0
Result = TypeVar("Result")

STAND_IN = """
import http.server, json, os, signal, sys
from pathlib import Path
from rowen.executor.gate_state import Gate
from rowen.executor.lane_config import LaneConfig

def option(name):
    return sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index(name) + 1]

behaviour = option("--served-model-name")
print("the stand-in says:", behaviour, flush=True)
if behaviour == "dies":
    print("OutOfEverything: no weights today", flush=True)
    sys.exit(3)
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
gate = Gate(LaneConfig(Path(json.loads(option("--additional-config"))["rowen"]["lane"])))
gate.start()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 0\\nvllm:num_requests_waiting 0\\n")
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
"""


def wait_for(
    what: str, condition: Callable[[], Result | None], deadline_s: float = DEADLINE_S
) -> Result:
    """Wait until ``condition`` returns something true."""
    until_s = time.monotonic() + deadline_s
    while time.monotonic() < until_s:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s} s: {what}")


class Serving:
    """A serving engine as the daemon sees it: a probe on the lane and a metrics page."""

    def __init__(self, lane: Path) -> None:
        self.requests_running = 0
        self.is_beating = True
        self._lane = lane
        self._ends = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="stand-in-probe")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _MetricsHandler)
        self._http = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._heart.start()
        self._http.start()

    def _beat(self) -> None:
        lane: Lane | None = None
        while not self._ends.wait(0.05):
            if lane is not None and not lane.is_current():
                lane.close()
                lane = None
            try:
                if lane is None:
                    lane = Lane.open(self._lane, role="probe")
                if self.is_beating:
                    now_ns = time.monotonic_ns()
                    running = self.requests_running
                    lane.write_probe(ProbeReading(now_ns, 0, running, 0, 0, 0, 0, 0, 0, 0, now_ns))
            except LaneError:
                continue
        if lane is not None:
            lane.close()

    def close(self) -> None:
        if self._ends.is_set():
            return
        self._ends.set()
        self._heart.join()
        self._server.shutdown()
        self._http.join()
        self._server.server_close()


class _MetricsHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        lines = []
        for name in (TTFT_METRIC, TPOT_METRIC):
            lines += [f'{name}_bucket{{le="{edge}"}} 7' for edge in ("0.01", "1.0", "+Inf")]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("\n".join(lines).encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep test output clean."""


class Daemon:
    """One ``python -m rowen.daemon`` and its admin server."""

    def __init__(self, config: Path, run_dir: Path, environment: dict[str, str]) -> None:
        self.run_dir = run_dir
        self._log = run_dir.parent / f"daemon-{time.monotonic_ns()}.log"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rowen.daemon", "--config", str(config)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until_up(self) -> None:
        wait_for(f"daemon up; its log:\n{self.log}", self._is_up)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return "gate" in self.status()
        except (OSError, ValueError):
            return False

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = (self.run_dir / "admin-url").read_text(encoding="utf-8").strip() + path
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
            return json.loads(text) if "json" in answer.headers["Content-Type"] else text

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("/status")
        return found

    def wait_for_status(self, deadline_s: float = DEADLINE_S, **wanted: Any) -> dict[str, Any]:
        def matches() -> dict[str, Any] | None:
            status = self.status()
            return status if all(status[key] == value for key, value in wanted.items()) else None

        try:
            return wait_for(f"status {wanted}", matches, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\nstatus: {self.status()}\nlog:\n{self.log}") from None

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


class Node:
    """Everything of one node, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.lane = self.run_dir / "lane"
        self.kill_file = self.run_dir / "kill"
        self.config = folder / "node.yaml"
        self.daemons: list[Daemon] = []
        self.environment = dict(os.environ)
        self.run_dir.mkdir()
        Lane.create(self.lane)
        self.serving = Serving(self.lane)

    def use_stand_in(self) -> None:
        module = self.folder / "path" / "vllm" / "entrypoints" / "openai" / "api_server.py"
        module.parent.mkdir(parents=True)
        module.write_text(STAND_IN, encoding="utf-8")
        for folder in list(module.parents)[:3]:  # without these the installed vLLM would win
            (folder / "__init__.py").touch()
        self.environment["PYTHONPATH"] = str(self.folder / "path")

    def configure(
        self, *, model: Path, rollout: dict[str, Any], spec: dict[str, Any], **changes: Any
    ) -> None:
        policy = load_policy(library_policy("demo")).model_dump(mode="json")
        policy["spec"] |= spec
        (self.folder / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
        document = {
            "node": "node-1",
            "policy": "policy.yaml",
            "lane": "run/lane",
            "serving": {"url": self.serving.url},
            "rollout": {"name": "rollout", "role": "rollout", "model": str(model)} | rollout,
            "run_dir": "run",
            "admin": {"port": 0},
        } | changes
        self.config.write_text(yaml.safe_dump(document), encoding="utf-8")

    def start(self) -> Daemon:
        self.daemons.append(Daemon(self.config, self.run_dir, self.environment))
        return self.daemons[-1]

    def word(self) -> DaemonReading:
        """What the daemon says on the lane."""
        lane = Lane.open(self.lane, role="reader")
        try:
            return lane.read_daemon()
        finally:
            lane.close()

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                try:
                    daemon.end()
                except subprocess.TimeoutExpired:
                    daemon.end(signal.SIGKILL)
        self.serving.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with a serving engine; no daemon yet, and nothing configured."""
    with contextlib.closing(Node(tmp_path)) as node:
        yield node


QUICK = {
    "growth": {"initial_sequences": 2, "step_factor": 2, "every_ms": 200, "cool_down_ms": 300},
    "reclaim": {
        "acknowledge_ms": 2000,
        "drain_after_ms": 500,
        "resume_after_ms": 200,
        "terminate_after_ms": 300,
        "kill_after_ms": 1000,
    },
}
"""Deadlines for tests: everything moves within a second."""


@pytest.fixture
def stand_in(node: Node) -> Callable[..., Daemon]:
    """Starts a daemon whose rollout engine is the stand-in; waits until it answers."""
    node.use_stand_in()
    model = node.folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")

    def start(behaviour: str = "lives", **changes: Any) -> Daemon:
        node.configure(model=model, rollout={"served_model_name": behaviour}, spec=QUICK, **changes)
        daemon = node.start()
        daemon.wait_until_up()
        return daemon

    return start


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """``wait_for`` for test modules."""
    return wait_for
