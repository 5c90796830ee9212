"""The node file: which serving engine is guarded, and which rollout engine runs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from rowen.executor.engine import EngineSpec
from rowen.policies.document import DocumentError, Problem, read_document
from rowen.policies.load import load_policy
from rowen.policies.schema import HarvestPolicy, Strict

HttpUrl = Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")]
LoopbackHost = Literal["127.0.0.1", "localhost", "::1"]


class ConfigError(Exception):
    """The daemon cannot run as configured; one sentence per mistake.  Nothing was started."""


class Serving(Strict):
    """The production engine.  It is only read, never written to."""

    url: HttpUrl
    """Root of its HTTP server."""
    metrics_url: HttpUrl | None = None
    """Its Prometheus page; by default ``url`` + ``/metrics``."""

    @property
    def scrape_url(self) -> str:
        """Where the metrics are read."""
        return self.metrics_url or self.url.rstrip("/") + "/metrics"


class Admin(Strict):
    """The daemon's own HTTP server."""

    host: LoopbackHost = "127.0.0.1"
    """Loopback only: it has no authentication."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9470
    """0 takes a free one, which is written to ``run_dir/admin-url``."""


class NodeConfig(Strict):
    """The node file.  Relative paths count from the folder of the file."""

    apiVersion: Literal["rowen.dev/v1alpha1"] = "rowen.dev/v1alpha1"
    """May be left out."""
    kind: Literal["Node"] = "Node"
    """May be left out."""
    node: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]
    """Name of this machine in leases and logs."""
    policy: Path
    """The harvest policy file."""
    lane: Path
    """The lane file shared with the serving engine's probe, best in memory (``/dev/shm``)."""
    serving: Serving
    """The production engine that is watched."""
    rollout: EngineSpec
    """The rollout engine; role ``rollout``, and its lane is the one above.  ``idle_class`` is true
    unless this file says false."""
    redis_url: Annotated[str, Field(pattern=r"^(rediss?|unix)://\S+$")] | None = None
    """Where leases are kept; without it no scheduler learns of the engine."""
    admin: Admin = Admin()
    """The daemon's own HTTP server."""
    kill_file: Path = Path("kill")
    """The local kill switch: while a file of this name exists, nothing is harvested.  A relative
    path counts from ``run_dir``."""
    run_dir: Path
    """Folder for logs and for the record of running engines; made when missing."""

    @field_validator("rollout")
    @classmethod
    def _rollouts_stand_last(cls, rollout: EngineSpec) -> EngineSpec:
        """In the normal class they would share serving's core with it."""
        if "idle_class" in rollout.model_fields_set:
            return rollout
        return rollout.model_copy(update={"idle_class": True})

    @field_validator("redis_url")
    @classmethod
    def _redis_url_can_be_used(cls, redis_url: str | None) -> str | None:
        if redis_url is not None:
            try:
                # Makes the client, connects to nothing yet.
                ConnectionPool.from_url(redis_url).make_connection()  # type: ignore[no-untyped-call]  # redis-py
            except (ValueError, TypeError, RedisError) as error:
                raise ValueError(
                    f"no Redis client can be made from this ({error}); write it as "
                    "redis://HOST:PORT/NUMBER"
                ) from None
        return redis_url

    @model_validator(mode="after")
    def _rollout_engine_is_gated_here(self) -> Self:
        if self.rollout.role != "rollout":
            raise ValueError(
                f"rollout.role is {self.rollout.role!r}, expected 'rollout': this daemon starts "
                "rollout engines only"
            )
        if self.rollout.lane is not None and self.rollout.lane != self.lane:
            raise ValueError(
                f"rollout.lane ({self.rollout.lane}) differs from lane ({self.lane}): "
                "leave rollout.lane out"
            )
        return self

    @property
    def engine_id(self) -> str:
        """Identity of the rollout engine in the registry; stable over restarts."""
        return f"{self.node}.{self.rollout.name}"

    def resolved(self, base: Path) -> NodeConfig:
        """The same document with absolute paths and the lane filled in."""
        run_dir = base / self.run_dir
        lane = base / self.lane
        log = base / self.rollout.log if self.rollout.log is not None else None
        rollout = self.rollout.model_copy(
            update={"lane": lane, "model": base / self.rollout.model, "log": log}
        )
        return self.model_copy(
            update={
                "policy": base / self.policy,
                "lane": lane,
                "rollout": rollout,
                "run_dir": run_dir,
                "kill_file": run_dir / self.kill_file,
            }
        )


def gated_spec(config: NodeConfig, policy: HarvestPolicy) -> EngineSpec:
    """The rollout engine with the policy's freshness bounds, so that gate and guard agree."""
    freshness = policy.spec.freshness
    return config.rollout.model_copy(
        update={
            "probe_silent_ms": freshness.probe_heartbeat_ms,
            "daemon_silent_ms": freshness.daemon_heartbeat_ms,
        }
    )


def load_config(path: Path) -> tuple[NodeConfig, HarvestPolicy]:
    """Read the node file and its policy, and check what must be there before anything starts.

    Raises:
        ConfigError: a file is missing or broken, or the model is not there.  Nothing was started.
    """
    try:
        config = read_document(path, NodeConfig).resolved(path.resolve().parent)
        policy = load_policy(config.policy)
    except DocumentError as error:
        raise ConfigError(str(error)) from None
    try:
        config.rollout.check_model()
    except ValueError as error:
        raise ConfigError(f"{path}: rollout: {error}") from None
    try:
        for folder in (config.run_dir, config.lane.parent, config.kill_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(path, None, "run_dir", f"{error.filename}: {error.strerror}")
        raise ConfigError(f"{problem}; name folders that can be written") from None
    return config, policy
