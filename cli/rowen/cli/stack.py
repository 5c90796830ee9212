"""The processes of one machine's Rowen, started and ended as one.

``rowen up`` runs all of it until it is told to end; the demo starts the same parts in its own
order.  Each part is a real process of its own, as in production:

    core `accelerator`   serving engine  <- lane ->  rollout engine (idle class, daemon's child)
    core `host`          front ends, daemon, scheduler with embedded Redis,
                         dedicated rollout engines (idle class)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import yaml

from rowen.cli.addresses import Addresses, remove_addresses, write_addresses
from rowen.cli.service import GRACE_S, Service, ServiceSpec
from rowen.cli.stack_config import EngineShape, Stack, StackError, pick_free_port
from rowen.daemon.leases import LeaseKeeper
from rowen.executor.engine import GIB, EngineSpec
from rowen.executor.lane import Lane
from rowen.executor.supervisor import EngineError, EngineState, EngineSupervisor
from rowen.policies.lease import EngineKind, EngineLease, Grant
from rowen.policies.load import load_policy

MODEL_NAME = "rowen"
"""Name under which every engine and the endpoint serve the model."""

ENGINE_DEADLINE_S = 240.0
"""An engine needs 35 s to start on an idle core of 2026; one of three on a slow machine, more."""

SERVICE_DEADLINE_S = 60.0

SERVING_STEP_TOKENS = 128
SERVING_ARGUMENTS = ("--max-num-batched-tokens", str(SERVING_STEP_TOKENS))
"""Chunked prefill in small chunks, as production that promises a TPOT has it: a step of 128 prompt
tokens takes about 0.2 s on one core; one with a whole long prompt would hold all decodes up."""


class LocalStack:
    """Everything that one machine runs.  All methods belong to one event loop."""

    def __init__(self, stack: Stack, *, say: Callable[[str], None]) -> None:
        """Choose ports and write the files that the processes read; nothing is started.

        Args:
            stack: checked by ``check_stack``.
            say: takes one line of progress.

        Raises:
            StackError: the run folder cannot be written, or another stack runs in it.
        """
        self.stack = stack
        self.say = say
        self.run_dir = stack.run_dir.resolve()
        self._lock_fd = _lock(self.run_dir)
        # In memory: production writes it at every step, and a disk may make a write wait.
        name = hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:12]
        self.lane_path = Path("/dev/shm") / f"rowen-{name}.lane"
        self.model = stack.model_folder().resolve()
        self.scheduler_port = stack.scheduler.port or pick_free_port()
        self.admin_port = stack.admin.port or pick_free_port()
        self.redis_port = pick_free_port() if stack.redis == "embedded" else None
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Gets the exception that ends the stack: production has ended."""
        self.part_failures: list[str] = []
        """Parts that are not started again; production goes on without them."""
        self.serving = EngineSupervisor(
            self._engine("serving", stack.serving, stack.cores.accelerator, role="serving"),
            run_dir=self.run_dir,
        )
        self.dedicated = [
            EngineSupervisor(
                self._engine(f"dedicated-{i}", stack.dedicated, stack.cores.host, role="rollout"),
                run_dir=self.run_dir,
            )
            for i in range(stack.dedicated.count)
        ]
        self.scheduler = Service(self._scheduler_spec())
        self.daemon = Service(self._daemon_spec())
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def redis_url(self) -> str:
        return (
            self.stack.redis if self.redis_port is None else f"redis://127.0.0.1:{self.redis_port}"
        )

    @property
    def endpoint(self) -> str:
        """What a trainer is given."""
        return f"http://127.0.0.1:{self.scheduler_port}"

    @property
    def admin(self) -> str:
        """The daemon's page."""
        return f"http://127.0.0.1:{self.admin_port}"

    async def start_serving(self) -> None:
        """Start production.  It is not restarted: that is not ours to do.

        Raises:
            EngineStartError: with the last lines of its log.
        """
        Lane.create(self.lane_path)
        await self.serving.start()
        await self.serving.wait_ready(ENGINE_DEADLINE_S)
        self.say(f"serving engine ready on {self.serving.url}")
        self._watch(self._serving_must_live(), "serving")

    async def start_scheduler(self) -> None:
        """Start the endpoint (and the embedded Redis in it); it is kept running.

        Raises:
            ServiceError: with the last lines of its log.
        """
        await self.scheduler.start()
        await self.scheduler.wait_ready(SERVICE_DEADLINE_S)
        self.say(f"endpoint ready on {self.endpoint}")
        self._watch(self.scheduler.keep_running(), "scheduler")

    async def start_dedicated(self) -> None:
        """Start the dedicated engines and their leases; they are kept running.

        Raises:
            EngineError: one died while starting, with the last lines of its log.
        """
        for supervisor in self.dedicated:
            running = self._watch(
                supervisor.keep_running(ready_deadline_s=ENGINE_DEADLINE_S), "dedicated"
            )
            self._watch(self._lease_dedicated(supervisor), "lease")
            while supervisor.state is not EngineState.READY and not running.done():
                await asyncio.wait([running], timeout=0.2)
            if running.done():
                await running
            self.say(f"{supervisor.spec.name} engine ready on {supervisor.url}")

    async def start_daemon(self) -> None:
        """Start the node daemon, which starts the rollout engine; it is kept running.

        Raises:
            ServiceError: with the last lines of its log.
        """
        self._write_node_file()
        await self.daemon.start()
        await self.daemon.wait_ready(SERVICE_DEADLINE_S)
        self.say(f"daemon ready on {self.admin}")
        self._watch(self.daemon.keep_running(), "daemon")

    def publish_addresses(self) -> None:
        """Let ``rowen status`` find this stack."""
        write_addresses(
            Addresses(
                run_dir=self.run_dir,
                serving=self.serving.url,
                scheduler=self.endpoint,
                daemon=self.admin,
            )
        )

    def raise_failure(self) -> None:
        """Raise what ended the stack, if anything did."""
        if self.failure.done():
            raise self.failure.result()

    async def stop(self) -> None:
        """End everything, rollouts first and production last; nothing is left afterwards."""
        remove_addresses(self.run_dir)
        for task in self._tasks:
            if task.get_name() in ("serving", "lease"):
                task.cancel()
        ended = await asyncio.gather(
            self.daemon.stop(self._daemon_deadline_s()),
            *(supervisor.stop(deadline_s=5.0) for supervisor in self.dedicated),
            return_exceptions=True,
        )
        ended += await asyncio.gather(self.scheduler.stop(), return_exceptions=True)
        ended += await asyncio.gather(self.serving.stop(deadline_s=5.0), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, BaseException):
                self.say(f"ending: {problem}")
        self.lane_path.unlink(missing_ok=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _daemon_deadline_s(self) -> float:
        """The daemon ends its engine by the ladder of the policy, and needs that long at most."""
        if not self.stack.policy.is_file():
            return GRACE_S
        reclaim = load_policy(self.stack.policy).spec.reclaim
        return GRACE_S + (reclaim.terminate_after_ms + reclaim.kill_after_ms) / 1000

    def _watch(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)
        return task

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """Only the end of production ends the stack; without another part it serves on."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if task.get_name() == "serving":
            if not self.failure.done():
                self.failure.set_result(error)
            return
        self.part_failures.append(f"{task.get_name()}: {error}")
        self.say(f"{task.get_name()} is not started again, production goes on: {error}")

    async def _serving_must_live(self) -> None:
        ended = await self.serving.wait_exit()
        if not ended.was_asked:
            raise EngineError(
                f"the serving engine ended by itself (status {ended.returncode}); Rowen does not "
                "restart production. The end of its log:\n" + "\n".join(ended.last_lines)
            )

    async def _lease_dedicated(self, supervisor: EngineSupervisor) -> None:
        """Offer a dedicated engine while it is ready, under a new epoch after each start."""
        lease: LeaseKeeper | None = None
        renewal: asyncio.Task[None] | None = None
        offered = 0
        try:
            while True:
                is_ready = supervisor.state is EngineState.READY
                if is_ready and lease is None:
                    lease = LeaseKeeper(self.redis_url, self._dedicated_lease(supervisor))
                    renewal = self._watch(lease.run(), "lease")
                if lease is not None and is_ready and supervisor.generation != offered:
                    lease.restarted(url=supervisor.url)
                    offered = supervisor.generation
                elif lease is not None and not is_ready:
                    lease.withdraw()
                await asyncio.sleep(0.1)
        finally:
            if renewal is not None:
                renewal.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await renewal

    def _dedicated_lease(self, supervisor: EngineSupervisor) -> EngineLease:
        return EngineLease.model_validate(
            {
                "engine_id": f"local.{supervisor.spec.name}",
                "url": supervisor.url,
                "kind": EngineKind.DEDICATED,
                "model": MODEL_NAME,
                "node": "local",
                "grant": Grant.RUN,
                "fencing_epoch": 1,  # replaced by the one from Redis
                "sequence_cap": supervisor.spec.max_num_seqs,
            }
        )

    def _engine(self, name: str, shape: EngineShape, core: int, *, role: str) -> EngineSpec:
        is_serving = role == "serving"
        is_idle = not is_serving
        return EngineSpec.model_validate(
            {
                "name": name,
                "role": role,
                "model": self.model,
                "served_model_name": MODEL_NAME,
                "port": shape.port,
                "max_model_len": shape.max_model_len,
                "max_num_seqs": shape.max_num_seqs,
                "kv_cache_bytes": shape.kv_cache_gib * GIB,
                "engine_cores": (core,),
                # The harvesting engine's front end may use its accelerator's core too, where it
                # only gets what is left like all of it; starting on one busy core took 75 s.
                "front_cores": sorted({self.stack.cores.host} | ({core} if is_idle else set())),
                "idle_class": not is_serving,
                "lane": self.lane_path if is_serving else None,
                "extra_args": SERVING_ARGUMENTS if is_serving else (),
            }
        )

    def _scheduler_spec(self) -> ServiceSpec:
        redis = f"embedded:{self.redis_port}" if self.redis_port is not None else self.stack.redis
        argv = [sys.executable, "-m", "rowen.scheduler", "--host", "127.0.0.1"]
        argv += ["--port", str(self.scheduler_port), "--redis", redis, "--model", MODEL_NAME]
        return ServiceSpec(
            name="scheduler",
            argv=argv,
            log=self.run_dir / "scheduler.log",
            cores=(self.stack.cores.host,),
            ready_url=f"{self.endpoint}/health",
        )

    @property
    def _node_file(self) -> Path:
        return self.run_dir / "node.yaml"

    def _daemon_spec(self) -> ServiceSpec:
        return ServiceSpec(
            name="daemon",
            argv=[sys.executable, "-m", "rowen.daemon", "--config", str(self._node_file)],
            log=self.run_dir / "daemon.log",
            cores=(self.stack.cores.host, self.stack.cores.accelerator),
            ready_url=f"{self.admin}/status",
        )

    def _write_node_file(self) -> None:
        rollout = self._engine(
            "rollout", self.stack.rollout, self.stack.cores.accelerator, role="rollout"
        )
        document = {
            "apiVersion": "rowen.dev/v1alpha1",
            "kind": "Node",
            "node": "local",
            "policy": str(self.stack.policy.resolve()),
            "lane": str(self.lane_path),
            "serving": {"url": self.serving.url},
            "rollout": rollout.model_dump(mode="json", exclude={"lane"}),
            "redis_url": self.redis_url,
            "admin": {"port": self.admin_port},
            "run_dir": str(self.run_dir),
        }
        self._node_file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all at once; when one fails, cancel the others, wait for them and raise its error."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _lock(run_dir: Path) -> int:
    """Make the run folder ours; the lock goes with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StackError(
            f"run_dir: {run_dir} cannot be used ({error.strerror}: {error.filename}); "
            "name a folder that can be written"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StackError(
            f"run_dir: another stack runs under {run_dir}; end it, or name another folder"
        ) from error
    return descriptor
