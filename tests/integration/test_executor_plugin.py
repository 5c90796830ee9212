"""The plugin inside a real vLLM process, and the layer gate on a real module."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rowen.executor import layer_gate
from rowen.executor.gate_state import Gate
from rowen.executor.lane import Lane, ProbeReading
from rowen.executor.lane_config import LaneConfig, read_lane_config
from rowen.executor.plugin import _has_amx

SERVING = """
import os
os.environ["ROWEN_ENGINE_ROLE"] = "serving"
from vllm.model_executor.layers import linear, utils
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory
from vllm.v1.core.sched.scheduler import Scheduler
before = [dict(vars(module)) for module in (linear, utils, Scheduler)]
from rowen.executor.plugin import register
register()
register()
assert before == [dict(vars(module)) for module in (linear, utils, Scheduler)]
assert "rowen" in factory._registry
print("inert")
"""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_B_D: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_B_D = layer(hidden_B_D)
        return hidden_B_D


def engine(lane: Path | None, *, eager: bool = True, backend: str = "uni") -> Any:
    return SimpleNamespace(
        additional_config={} if lane is None else {"rowen": {"lane": str(lane)}},
        model_config=SimpleNamespace(enforce_eager=eager),
        parallel_config=SimpleNamespace(distributed_executor_backend=backend),
    )


def test_the_plugin_changes_nothing_in_a_serving_engine() -> None:
    done = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["inert"], done.stderr


def test_amx_is_asked_for_only_where_the_processor_has_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512f amx_bf16 amx_tile\n")
    assert _has_amx(cpuinfo)
    cpuinfo.write_text("model name : amx_tile\nflags : fpu avx2\n")
    assert not _has_amx(cpuinfo)
    assert not _has_amx(tmp_path / "missing")


@pytest.mark.parametrize(
    "vllm_config",
    [engine(None), engine(Path("/l"), eager=False), engine(Path("/l"), backend="mp")],
    ids=["no lane", "compiled", "worker process"],
)
def test_no_hooks_where_they_would_not_run(vllm_config: Any) -> None:
    model = Model()
    assert layer_gate.attach(model, vllm_config) == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_decoder_is_the_longest_list_of_layers() -> None:
    model = Model()
    assert layer_gate.decoder_layers(model) == list(model.layers)
    assert layer_gate.decoder_layers(torch.nn.Linear(2, 2)) == []


def test_a_closed_gate_holds_a_forward_pass_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "node.lane"
    Lane.create(path)
    probe, daemon = Lane.open(path, role="probe"), Lane.open(path, role="daemon")

    def say(running: int) -> None:
        now_ns = time.monotonic_ns()
        probe.write_probe(ProbeReading(now_ns, 0, running, 0.0, 0, 0.0, 0, 0.0, 1, 0, now_ns))
        daemon.write_daemon(gate_open=True, epoch=1)

    config = read_lane_config(engine(path))
    assert isinstance(config, LaneConfig)
    gate = Gate(LaneConfig(path, config.bounds, layer_hold_ms=60_000))
    model = Model()
    assert layer_gate.attach(model, engine(path)) == 3
    passed: list[int] = []
    arrived = threading.Event()

    def after_layer(_layer: Any, _inputs: Any, _output: Any) -> None:
        passed.append(1)
        if len(passed) == 1:
            say(running=1)  # a serving request comes while the first layer computes
            arrived.set()

    for layer in model.layers:
        layer.register_forward_hook(after_layer)
    layer_gate.use(gate)
    try:
        say(running=0)
        assert gate.check().allowed
        gate.step_started(1)
        forward = threading.Thread(target=model, args=(torch.zeros(1, 4),))
        forward.start()
        assert arrived.wait(10)
        reader = Lane.open(path, role="reader")
        end_s = time.monotonic() + 10
        while reader.read_gate().samples_total == 0:
            assert time.monotonic() < end_s
            time.sleep(0.001)
        assert len(passed) == 1
        say(running=0)
        forward.join(10)
        assert len(passed) == 3
    finally:
        layer_gate.use(None)
        gate.close()
