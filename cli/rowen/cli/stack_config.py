"""The Stack file of ``rowen up``: what runs on this machine, with embedded defaults for all of it.

Only shapes and cross-field rules live here; nothing is started or opened except by ``check_stack``,
which looks at the files and ports that are named, before anything starts.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from rowen.cli.model import ModelError, check_model_folder, embedded_model
from rowen.policies.document import DocumentError, read_document
from rowen.policies.load import PolicyError, library_policy, load_policy
from rowen.policies.schema import Strict

DEFAULT_RUN_DIR = Path("out/up")
EMBEDDED_POLICY = library_policy("demo")
"""The policy of the embedded stack, shipped with the package."""


class StackError(Exception):
    """The stack cannot be started as configured.  Nothing was started."""


class Cores(Strict):
    """Which core plays the shared accelerator and which one carries the hosts' work."""

    accelerator: int = Field(0, ge=0)
    """Both the serving engine and the opportunistic rollout engine compute on this core."""
    host: int = Field(1, ge=0)
    """HTTP front ends, daemon, scheduler, trainer and the dedicated rollout engine run here."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.accelerator == self.host:
            raise ValueError(
                f"accelerator and host are both core {self.host}; "
                "front ends would delay the engine they serve: name two different cores"
            )
        return self


class EngineShape(Strict):
    """The size of one engine."""

    port: int = Field(0, ge=0, le=65535)
    """0 takes any free port."""
    max_model_len: int = Field(1024, ge=32)
    """Longest prompt plus answer, in tokens."""
    max_num_seqs: int = Field(16, ge=1)
    """Most sequences in one step."""
    kv_cache_gib: int = Field(1, ge=1)
    """Memory of the KV block pool."""


class DedicatedShape(EngineShape):
    """Rollout engines that belong to the RL job alone."""

    count: int = Field(1, ge=0)


class PortShape(Strict):
    port: int = Field(0, ge=0, le=65535)


class Stack(Strict):
    """One machine's worth of Rowen."""

    apiVersion: Literal["rowen.dev/v1alpha1"] = "rowen.dev/v1alpha1"
    kind: Literal["Stack"] = "Stack"
    model: str = "embedded"
    """``embedded``, or a Hugging Face model folder."""
    run_dir: Path = DEFAULT_RUN_DIR
    policy: Path = EMBEDDED_POLICY
    cores: Cores = Cores()
    serving: EngineShape = EngineShape(port=8000, max_num_seqs=32)
    rollout: EngineShape = EngineShape()
    dedicated: DedicatedShape = DedicatedShape()
    scheduler: PortShape = PortShape(port=8080)
    admin: PortShape = PortShape(port=8081)
    redis: str = Field("embedded", pattern=r"^(embedded|rediss?://.+|unix://.+)$")

    def model_folder(self) -> Path:
        """The model's folder; unpacks the embedded one on first use."""
        return embedded_model() if self.model == "embedded" else Path(self.model)

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_stack(path: Path | None) -> Stack:
    """Read a Stack file; the embedded defaults without one.

    Raises:
        StackError: every fault of the file in one message, a line each.  Nothing was started.
    """
    if path is None:
        return Stack()
    try:
        return read_document(path, Stack)
    except DocumentError as error:
        raise StackError(f"{error}\n(`rowen up --print-config` shows every field)") from error


def check_stack(stack: Stack) -> None:
    """Look at every file, core and port the stack names, before anything starts.

    Raises:
        StackError: one sentence with the field, both values and the remedy.
    """
    allowed = os.sched_getaffinity(0)
    for name, core in (("accelerator", stack.cores.accelerator), ("host", stack.cores.host)):
        if core not in allowed:
            raise StackError(
                f"cores.{name}: core {core} is not among the cores of this process "
                f"({sorted(allowed)}); name one of those"
            )
    try:
        load_policy(stack.policy)
    except PolicyError as error:
        raise StackError(f"policy: {error}") from error
    if stack.model != "embedded":
        try:
            check_model_folder(Path(stack.model))
        except ModelError as error:
            raise StackError(str(error)) from error
    taken: dict[int, str] = {}
    for field, shape in (
        ("serving.port", stack.serving),
        ("rollout.port", stack.rollout),
        ("dedicated.port", stack.dedicated),
        ("scheduler.port", stack.scheduler),
        ("admin.port", stack.admin),
    ):
        port = shape.port
        if port == 0:
            continue
        if port in taken:
            raise StackError(
                f"{field}: {port} is also {taken[port]}; give one of them another port, or 0"
            )
        taken[port] = field
        _check_free(field, port)
    if stack.dedicated.count > 1 and stack.dedicated.port:
        raise StackError(
            f"dedicated.port: {stack.dedicated.port} cannot serve dedicated.count "
            f"{stack.dedicated.count}; use port 0 for several engines"
        )


def _check_free(field: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(
                f"{field}: port {port} on 127.0.0.1 is in use ({error.strerror}); "
                "end what listens there, or give another port, or 0 for any free one"
            ) from error


def pick_free_port() -> int:
    """A port that is free now; the caller binds it soon (a short race that a retry would cure)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
