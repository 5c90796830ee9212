"""One engine to start: what the owner wants, as the command line and environment of vLLM.

Used by the daemon (rollout engine beside production), by ``rowen up`` and the demo (serving and
dedicated engines).  Starts nothing itself: ``supervisor.py`` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

GIB = 1024**3

PROBE_SCHEDULER = "rowen.executor.probe.ProbeScheduler"
GATED_SCHEDULER = "rowen.executor.gate.GatedScheduler"


class EngineSpec(BaseModel):
    """A vLLM engine on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Names log, state file and lease; unique on the node."""
    role: Literal["serving", "rollout"]
    """serving: production, only watched.  rollout: takes weight versions and may be gated."""
    model: Path
    """Folder of a Hugging Face model (config.json and weights)."""
    served_model_name: str = "rowen"
    """Name under which clients address the model."""
    host: Literal["127.0.0.1"] = "127.0.0.1"
    """Engines listen on loopback only: vLLM's RL routes carry no authentication."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one at each start."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "bfloat16"
    """Type of weights and activations."""
    max_model_len: int = Field(default=2048, ge=16)
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences in one step, at most."""
    kv_cache_bytes: int = Field(default=1 * GIB, ge=1024**2)
    """Size of the KV cache."""
    engine_cores: tuple[int, ...] = ()
    """Cores of the process that computes, one thread per core; empty: one thread, placed by the
    kernel."""
    front_cores: tuple[int, ...] = ()
    """Cores of everything else (HTTP, tokenizer, heartbeats); empty: left to the kernel."""
    idle_class: bool = False
    """Run all threads in SCHED_IDLE: they only get what nobody else wants."""
    lane: Path | None = None
    """The lane file: a serving engine writes its probe there, a rollout engine is gated by it."""
    probe_silent_ms: int = Field(default=500, ge=1, le=1000)
    """Age from which a gated engine no longer believes the serving engine's heartbeat."""
    daemon_silent_ms: int = Field(default=500, ge=1, le=1000)
    """Age from which a gated engine no longer believes the daemon's heartbeat."""
    log: Path | None = None
    """File that gets the engine's output; by default NAME.log in the run folder."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for vLLM's API server, appended last."""

    @model_validator(mode="after")
    def _idle_class_is_for_rollouts(self) -> Self:
        if self.role == "serving" and self.idle_class:
            raise ValueError(
                "role is serving and idle_class is true: production would only get what is left "
                "over; set idle_class to false"
            )
        return self

    def check_model(self) -> None:
        """Say plainly when the model cannot be there.

        Raises:
            ValueError: ``model`` is no folder with a config.json.
        """
        if not (self.model / "config.json").is_file():
            raise ValueError(
                f"model of engine {self.name}: {self.model} holds no config.json; give the folder "
                "of a Hugging Face model"
            )

    def argv(self, port: int | None = None) -> list[str]:
        """The command line; ``port`` replaces a 0 in the spec with the chosen one."""
        arguments: dict[str, str | None] = {
            "--model": str(self.model),
            "--served-model-name": self.served_model_name,
            "--host": self.host,
            "--port": str(port if port is not None else self.port),
            "--dtype": self.dtype,
            "--max-model-len": str(self.max_model_len),
            "--max-num-seqs": str(self.max_num_seqs),
            "--kv-cache-memory-bytes": str(self.kv_cache_bytes),
            # The model runs inside EngineCore.  With a worker process of its own, that worker
            # spins on sched_yield for a second after each step and starves an idle-class
            # neighbour of the core: rollouts kept 14 % instead of 58 %.
            "--distributed-executor-backend": "uni",
            "--enforce-eager": None,
            "--enable-scale-out": None,  # opens /inference/v1/generate
            "--uvicorn-log-level": "warning",
        }
        if self.lane is not None:
            is_serving = self.role == "serving"
            arguments["--scheduler-cls"] = PROBE_SCHEDULER if is_serving else GATED_SCHEDULER
            arguments["--additional-config"] = json.dumps({"rowen": self._lane_settings()})
        if self.role == "rollout":
            arguments["--weight-transfer-config"] = json.dumps({"backend": "rowen"})
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for option, value in arguments.items():
            command += [option] if value is None else [option, value]
        return [*command, *self.extra_args]

    def _lane_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"lane": str(self.lane)}
        if self.role == "rollout":
            settings["probe_silent_ms"] = self.probe_silent_ms
            settings["daemon_silent_ms"] = self.daemon_silent_ms
        return settings

    def environment(self) -> dict[str, str]:
        """The variables to set over the owner's own environment."""
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(max(1, len(self.engine_cores))),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "ROWEN_ENGINE_ROLE": self.role,
        }
        if self.role == "rollout":
            variables["VLLM_SERVER_DEV_MODE"] = "1"  # opens the RL routes
        return variables

    def summary(self) -> dict[str, Any]:
        """What status pages show of this engine."""
        return {"name": self.name, "role": self.role, "model": self.served_model_name}
