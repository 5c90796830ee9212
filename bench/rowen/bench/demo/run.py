"""The phases of the demo, in order; each leaves its measurements in ``Measured``.

start      serving, endpoint and dedicated engine, together
calibrate  what a token costs on this machine, to scale the traffic to it
alone      the traffic against serving; the RL job runs on its dedicated engine only
join       the daemon starts the rollout engine beside the (idle) serving engine
free       rollouts without traffic: what the harvest is held against
harvest    the same traffic twice, with harvest; in between the dedicated engine is killed
drill      only if no burst of the traffic had the engine reclaimed: a burst of real requests
finish     the trainer's last evaluation, then the end of every process
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rowen.bench.calibrate import calibrate
from rowen.bench.demo import training
from rowen.bench.demo.budget import HARVEST_PASSES, ROLLOUT_ALONE_S, Budget, divide
from rowen.bench.demo.objectives import write_policy
from rowen.bench.demo.options import Options
from rowen.bench.demo.watch import Watch, page
from rowen.bench.errors import BenchError
from rowen.bench.latency import summarise
from rowen.bench.records import ServingRecord, read_records
from rowen.bench.requests_file import write_requests
from rowen.bench.scale import Scale
from rowen.bench.window import ReplayRequest, WindowGoal, fit_window
from rowen.cli.service import Service, ServiceSpec
from rowen.cli.stack import MODEL_NAME, SERVING_STEP_TOKENS, LocalStack, together
from rowen.executor.supervisor import EngineState
from rowen.policies.schema import HarvestPolicy

VOCABULARY = (1000, 49_000)
"""Ordinary tokens of SmolLM2: its special ones come first, and it has 49,152."""

REQUESTS_PER_S = 0.75
"""About so many per second of the replay (a slice with a burst has more): fewer of them would make
the 99th percentile the largest value, more would shorten the answers until TPOT means little."""

LEAST_OUTPUT_TOKENS = 8
"""Shorter answers are raised to this (the scale says how many): a TPOT that is the mean of one or
two gaps says where a neighbour's prefill fell, and little about the engine."""

JOIN_DEADLINE_S = 240.0
REPLAY_GRACE_S = 60.0
"""For answers that are under way when the last request was sent."""

DRILL_REQUESTS = 24
DRILL_INPUT_TOKENS = 64
DRILL_OUTPUT_TOKENS = 72
"""24 × 72 tokens keep one core busy for longer than the demo's policy lets trajectories wait."""
DRILL_WAIT_S = 20.0


class DemoError(Exception):
    """The demo cannot go on; every process it started has been ended."""


@dataclass(frozen=True)
class Event:
    """Something that was done on purpose, or happened, at a moment of CLOCK_MONOTONIC."""

    monotonic_s: float
    label: str


@dataclass
class Measured:
    """Everything the outcome is made of.  Times are CLOCK_MONOTONIC seconds."""

    scale: Scale | None = None
    policy: HarvestPolicy | None = None
    budget: Budget | None = None
    alone: list[ServingRecord] = field(default_factory=list)
    harvested: list[ServingRecord] = field(default_factory=list)
    alone_from_s: float = 0.0
    alone_to_s: float = 0.0
    free_from_s: float = 0.0
    free_to_s: float = 0.0
    harvest_from_s: float = 0.0
    harvest_to_s: float = 0.0
    events: list[Event] = field(default_factory=list)
    was_drill_needed: bool = False
    was_engine_killed: bool = False
    training_log: Path = Path()


class Demo:
    """One run.  All methods belong to one event loop."""

    def __init__(self, options: Options, local: LocalStack, *, started_s: float) -> None:
        self.options = options
        self.local = local
        self.say = local.say
        self.started_s = started_s
        core = local.stack.cores.accelerator
        self.watch = Watch(local.endpoint, local.admin, local.lane_path, core)
        self.measured = Measured(training_log=local.run_dir / "training.jsonl")
        self.trainer = Service(training.service(options, local, self.measured.training_log))
        self._watching: asyncio.Task[None] | None = None
        self._client: Service | None = None

    async def run(self) -> None:
        """All phases; ends no process except its own load client (the caller calls ``stop``)."""
        engine_start_s = await self._start()
        requests = await self._calibrate(engine_start_s)
        await self.trainer.start()
        self.say("trainer started: it learns over the dedicated engine alone for now")
        await self._alone(requests)
        await self._join()
        await self._free()
        await self._harvest(requests)
        await self._drill()
        await self._finish()

    async def stop(self) -> None:
        """End every process of the demo; safe at any moment, also twice."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        if self._client is not None:
            await self._client.stop(deadline_s=3.0)
        await self.trainer.stop(deadline_s=3.0)
        await self.local.stop()

    async def _start(self) -> float:
        local = self.local
        self.say("starting the serving engine, the dedicated rollout engine and the endpoint")
        began_s = time.monotonic()
        await together(local.start_serving(), local.start_scheduler(), local.start_dedicated())
        self._watching = asyncio.create_task(self.watch.run(), name="watch")
        return time.monotonic() - began_s

    async def _calibrate(self, engine_start_s: float) -> Path:
        options, context = self.options, self.local.stack.serving.max_model_len
        model = await calibrate(
            self.local.serving.url,
            MODEL_NAME,
            vocabulary=VOCABULARY,
            context_tokens=context,
            seed=options.seed,
            repeats=2,
        )
        model = replace(model, step_tokens=SERVING_STEP_TOKENS)
        budget = divide(time.monotonic() - self.started_s, engine_start_s)
        goal = WindowGoal(
            duration_s=budget.window_s,
            busy_ratio=options.busy_ratio,
            requests=round(REQUESTS_PER_S * budget.window_s),
            context_tokens=context,
            rate_factor=options.rate_factor,
            token_factor=options.token_factor,
            least_output_tokens=LEAST_OUTPUT_TOKENS,
        )
        window = fit_window(options.trace, goal, model, source=options.source)
        for line in window.scale.lines():
            self.say(line)
        self.measured.scale, self.measured.budget = window.scale, budget
        return self._write(window.requests, "requests.jsonl", budget.window_s)

    def _write(self, requests: tuple[ReplayRequest, ...], name: str, period_s: float) -> Path:
        path = self.local.run_dir / name
        write_requests(
            path, requests, period_s=period_s, vocabulary=VOCABULARY, seed=self.options.seed
        )
        return path

    async def _alone(self, requests: Path) -> None:
        assert self.measured.budget is not None
        window_s = self.measured.budget.window_s
        self.say(f"serving alone for {window_s:.0f} s")
        self.measured.alone_from_s = time.monotonic()
        self.measured.alone = await self._replay(requests, "alone", passes=1, length_s=window_s)
        self.measured.alone_to_s = time.monotonic()
        summary = summarise(self.measured.alone)
        self.say(
            f"alone: {summary.requests} requests, P99 TTFT {_ms(summary.ttft_p99_ms)}, "
            f"P99 TPOT {_ms(summary.tpot_p99_ms)}"
        )
        policy = write_policy(self.local.stack.policy, summary)
        objectives = policy.spec.objectives
        self.measured.policy = policy
        self.say(
            f"policy {self.local.stack.policy}: P99 TTFT <= {objectives.ttft.threshold_ms:.0f} ms, "
            f"P99 TPOT <= {objectives.tpot.threshold_ms:.0f} ms"
        )

    async def _join(self) -> None:
        self.say("starting the daemon; it starts the rollout engine beside serving, on its core")
        await self.local.start_daemon()
        self.local.publish_addresses()
        assert self.measured.policy is not None
        most = min(
            self.measured.policy.spec.resources.max_sequences, self.local.stack.rollout.max_num_seqs
        )
        until_s = time.monotonic() + JOIN_DEADLINE_S
        while True:
            self._check()
            status = await asyncio.to_thread(page, f"{self.local.admin}/status") or {}
            sample = self.watch.samples[-1] if self.watch.samples else None
            joined = sample is not None and any(
                one.kind == "opportunistic" and one.state == "ready" for one in sample.engines
            )
            if joined and status.get("sequence_cap", 0) >= most:
                break
            if time.monotonic() > until_s:
                raise DemoError(
                    f"the rollout engine did not join within {JOIN_DEADLINE_S:.0f} s; the daemon "
                    f"says: {status.get('reason')} ({status.get('detail')}), engine "
                    f"{status.get('engine')}; logs are under {self.local.run_dir}"
                )
            await asyncio.sleep(0.5)
        self.say("rollout engine ready beside serving; the harvest has grown to its bound")

    async def _free(self) -> None:
        self.say(f"rollouts without serving traffic for {ROLLOUT_ALONE_S:.0f} s")
        self.measured.free_from_s = (await self.watch.look()).monotonic_s
        await self._pause(ROLLOUT_ALONE_S)
        self.measured.free_to_s = (await self.watch.look()).monotonic_s

    async def _harvest(self, requests: Path) -> None:
        assert self.measured.budget is not None
        budget = self.measured.budget
        self.say(f"serving with harvest for {budget.harvest_s:.0f} s: the same traffic, twice")
        self.measured.harvest_from_s = (await self.watch.look()).monotonic_s
        killing = asyncio.create_task(self._kill_dedicated(after_s=0.6 * budget.window_s))
        try:
            self.measured.harvested = await self._replay(
                requests, "harvested", passes=HARVEST_PASSES, length_s=budget.harvest_s
            )
        finally:
            killing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await killing
        self.measured.harvest_to_s = (await self.watch.look()).monotonic_s
        summary = summarise(self.measured.harvested)
        self.say(
            f"harvested: {summary.requests} requests, P99 TTFT {_ms(summary.ttft_p99_ms)}, "
            f"P99 TPOT {_ms(summary.tpot_p99_ms)}"
        )

    async def _kill_dedicated(self, after_s: float) -> None:
        await self._pause(after_s)
        supervisor = self.local.dedicated[0]
        while supervisor.state is not EngineState.READY:
            await self._pause(0.5)
        pids = supervisor.pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.measured.was_engine_killed = True
        self._note(f"dedicated engine killed with SIGKILL (processes {pids})")

    async def _drill(self) -> None:
        """A burst, if the traffic had none that was long enough to have the engine reclaimed."""
        if self.watch.reclaims_since(self.measured.harvest_from_s):
            return
        self.measured.was_drill_needed = True
        self._note(f"drill: a burst of {DRILL_REQUESTS} requests at once")
        burst = tuple(
            ReplayRequest(0.0, DRILL_INPUT_TOKENS, DRILL_OUTPUT_TOKENS)
            for _ in range(DRILL_REQUESTS)
        )
        path = self._write(burst, "drill.jsonl", 1.0)
        await self._replay(path, "drill", passes=1, length_s=1.0)
        until_s = time.monotonic() + DRILL_WAIT_S
        while time.monotonic() < until_s:
            if self.watch.reclaims_since(self.measured.harvest_from_s):
                return
            await self._pause(0.5)
        self._note("drill: the engine was not reclaimed")

    async def _finish(self) -> None:
        until_s = time.monotonic() + training.LEAST_STEPS_DEADLINE_S
        while len(training.read(self.measured.training_log).steps) < training.LEAST_STEPS:
            if time.monotonic() > until_s:
                break
            await self._pause(0.5)
        self.say("trainer: last step and evaluation")
        self.trainer.signal(signal.SIGUSR1)
        try:
            await asyncio.wait_for(self.trainer.wait_exit(), training.END_DEADLINE_S)
        except TimeoutError:
            self._note(f"trainer did not end within {training.END_DEADLINE_S:.0f} s")
            return
        if self.trainer.returncode != 0:
            raise DemoError(self._trainer_ended())
        await self.watch.look()

    async def _replay(
        self, requests: Path, arm: str, *, passes: int, length_s: float
    ) -> list[ServingRecord]:
        out = self.local.run_dir / f"serving-{arm}.jsonl"
        argv = [sys.executable, "-m", "rowen.bench.openloop", "--requests", str(requests)]
        argv += ["--url", self.local.serving.url, "--model", MODEL_NAME, "--out", str(out)]
        argv += ["--arm", arm, "--passes", str(passes)]
        self._client = Service(
            ServiceSpec(
                name=f"client-{arm}",
                argv=argv,
                log=self.local.run_dir / f"client-{arm}.log",
                cores=(self.local.stack.cores.host,),
            )
        )
        await self._client.start()
        ended = asyncio.create_task(self._client.wait_exit())
        until_s = time.monotonic() + length_s + REPLAY_GRACE_S
        began_s = said_s = time.monotonic()
        while not ended.done():
            self._check()
            await asyncio.wait([ended], timeout=0.5)
            now_s = time.monotonic()
            if now_s - said_s >= 10.0 and not ended.done():
                said_s = now_s
                self._say_progress(arm, now_s - began_s, length_s)
            if now_s > until_s:
                await self._client.stop(deadline_s=3.0)
        if ended.result() != 0:
            raise DemoError(f"the load client ended with {ended.result()}: {self._client.tail()}")
        return read_records(out)

    def _say_progress(self, arm: str, at_s: float, length_s: float) -> None:
        words = [f"{arm} {min(at_s, length_s):3.0f} of {length_s:.0f} s"]
        if self.watch.samples:
            for engine in self.watch.samples[-1].engines:
                name = engine.engine_id.partition(".")[2] or engine.engine_id
                words.append(
                    f"{name} {engine.state} v{engine.version} {engine.tokens_total} tokens"
                )
        if self.watch.decisions:
            last = self.watch.decisions[-1]
            words.append(f"gate {last['gate']} rung {last['rung']} ({last['cause']})")
        steps = training.read(self.measured.training_log).steps
        if steps:
            words.append(f"step {steps[-1].step} reward {steps[-1].reward:.2f}")
        self.say(", ".join(words))

    async def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._check()
            await asyncio.sleep(min(0.5, left_s))

    def _check(self) -> None:
        """Raise what makes going on pointless."""
        self.local.raise_failure()
        if self._watching is not None and self._watching.done():
            self._watching.result()
        if self.trainer.returncode is not None:
            raise DemoError(self._trainer_ended())

    def _trainer_ended(self) -> str:
        return (
            f"the trainer ended with status {self.trainer.returncode}; "
            f"the end of its log {self.trainer.spec.log}:\n{self.trainer.tail()}"
        )

    def _note(self, label: str) -> None:
        self.measured.events.append(Event(time.monotonic(), label))
        self.say(label)


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} ms"


PART_ERRORS = (BenchError, DemoError)
"""What a run raises beside the errors of the stack's parts."""
