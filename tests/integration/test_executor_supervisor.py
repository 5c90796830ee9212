"""The supervisor with small real processes: whatever happens, nothing of an engine is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from rowen.executor.engine import EngineSpec
from rowen.executor.identity import ProcessIdentity, Record, identify, write_record
from rowen.executor.isolation import command_line, threads_of
from rowen.executor.restart import RestartPolicy
from rowen.executor.supervisor import (
    EngineCrashLoopError,
    EngineStartError,
    EngineState,
    EngineSupervisor,
)

DEADLINE_S = 20.0

# An HTTP front with /health and a child titled like vLLM's that computes; argv: port, traits.
ENGINE = '''
import http.server, mmap, multiprocessing, os, signal, subprocess, sys, threading, time
port, traits = int(sys.argv[1]), sys.argv[2].split(",")
print("loading the model", flush=True)
if "dies" in traits:
    print("cannot allocate 12 GiB of KV cache", flush=True)
    sys.exit(3)
if "stubborn" in traits:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = """
import mmap, os, signal, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
passing = sys.argv[1] + "-passing"  # as glibc makes a named semaphore
open(passing, "wb").write(bytes(4096))
held = mmap.mmap(os.open(passing, os.O_RDWR), 4096)
os.link(passing, sys.argv[1])
os.unlink(passing)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("child ready", flush=True)
time.sleep(600)
"""
shared = f"/dev/shm/rowen-test-{os.getpid()}"
if "semaphore" in traits:
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    print("semaphore", semaphore._semlock.name[1:], flush=True)
core = subprocess.Popen(["VLLM::EngineCore", "-c", child, shared], executable=sys.executable,
                        stdout=subprocess.PIPE)
core.stdout.readline()
class Front(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "never-ready" in traits else 200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Front).serve_forever()
'''

OWNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import test_executor_supervisor as cases
from pathlib import Path
async def own():
    supervisor = cases.supervise(Path(sys.argv[2]))
    await supervisor.start()
    await supervisor.wait_ready(20)
    print(supervisor.keeper_pid, *supervisor.pids, flush=True)
    await asyncio.sleep(600)
asyncio.run(own())
"""


def supervise(folder: Path, traits: str = "plain", **fields: Any) -> EngineSupervisor:
    (folder / "config.json").write_text("{}")
    (folder / "engine.py").write_text(ENGINE)
    restart, on_change = fields.pop("restart", None), fields.pop("on_change", None)
    isolation = fields.pop("isolation", None)
    spec = EngineSpec.model_validate(
        {"name": "double", "role": "rollout", "model": folder, "idle_class": True, **fields}
    )
    return EngineSupervisor(
        spec,
        run_dir=folder / "run",
        restart=restart,
        on_change=on_change,
        isolation=isolation,
        argv=lambda port: [sys.executable, str(folder / "engine.py"), str(port), traits],
    )


def run(case: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(case, 60))


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.01)


async def ready(supervisor: EngineSupervisor) -> list[int]:
    await supervisor.start()
    await supervisor.wait_ready(DEADLINE_S)
    pids = supervisor.pids
    assert len(pids) == 2
    return pids


def lives(pid: int) -> bool:
    return identify(pid) is not None  # a zombie that init has yet to reap does not live


def remove_shared_memory() -> int:
    left = list(Path("/dev/shm").glob("rowen-test-*"))
    for path in left:
        path.unlink()
    return len(left)


def assert_nothing_is_left(supervisor: EngineSupervisor, pids: list[int]) -> None:
    assert not [pid for pid in pids if lives(pid)]
    assert not psutil.Process().children(recursive=True)  # no zombie of ours either
    assert not list(Path("/dev/shm").glob("rowen-test-*"))
    assert not list(supervisor.log.parent.glob("*.json"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", supervisor.port))


def test_a_stopped_engine_leaves_nothing(tmp_path: Path) -> None:
    async def case() -> None:
        states: list[EngineState] = []
        supervisor = supervise(tmp_path, on_change=states.append)
        pids = await ready(supervisor)
        ended = await supervisor.stop(deadline_s=10)
        assert ended is not None
        assert (ended.returncode, ended.was_asked, ended.was_ready) == (-15, True, True)
        assert_nothing_is_left(supervisor, pids)
        assert states == ["starting", "ready", "stopping", "exited", "stopped"]
        assert await supervisor.stop() is None

    run(case())


def test_every_thread_is_placed(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    engine, front = cores[0], cores[-1]

    async def case() -> None:
        supervisor = supervise(tmp_path, engine_cores=(engine,), front_cores=(front,))
        pids = await ready(supervisor)
        computing = [pid for pid in pids if "EngineCore" in command_line(pid)]
        assert len(computing) == 1
        for pid in pids:
            expected = {engine} if pid in computing else {front}
            threads = threads_of(pid)
            assert len(threads) >= (2 if pid in computing else 1)
            assert all(os.sched_getaffinity(thread) == expected for thread in threads)
            assert all(os.sched_getscheduler(thread) == os.SCHED_IDLE for thread in threads)
        await supervisor.stop()

    run(case())


def test_an_engine_that_dies_while_starting_shows_its_last_lines(tmp_path: Path) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path, "dies")
        await supervisor.start()
        with pytest.raises(EngineStartError, match=r"exit code 3") as error:
            await supervisor.wait_ready(DEADLINE_S)
        assert "cannot allocate 12 GiB of KV cache" in str(error.value)
        assert_nothing_is_left(supervisor, [])

    run(case())


def test_an_engine_that_is_never_ready_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path, "never-ready")
        await supervisor.start()
        until(lambda: "loading" in supervisor.log.read_text())
        with pytest.raises(EngineStartError, match=r"was not ready within 1 s.*\n(.*\n)*.*loading"):
            await supervisor.wait_ready(1)
        assert_nothing_is_left(supervisor, [])

    run(case())


def test_a_port_in_use_is_named_and_nothing_starts(tmp_path: Path) -> None:
    async def case() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            supervisor = supervise(tmp_path, port=port)
            with pytest.raises(EngineStartError, match=rf"port {port} of engine double"):
                await supervisor.start()
        assert supervisor.state is EngineState.STOPPED
        assert not psutil.Process().children()

    run(case())


def test_a_core_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def case() -> None:
        with pytest.raises(EngineStartError, match="front_cores of engine double names core 4095"):
            await supervise(tmp_path, front_cores=(4095,)).start()

    run(case())


def test_an_engine_that_ignores_sigterm_is_killed_at_the_deadline(tmp_path: Path) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path, "stubborn")
        pids = await ready(supervisor)
        ended = await supervisor.stop(deadline_s=0.3)
        assert ended is not None
        assert ended.returncode == -9
        assert_nothing_is_left(supervisor, pids)

    run(case())


@pytest.mark.parametrize("victim", ["front", "keeper", "all"])
def test_sigkill_of_any_process_ends_the_whole_engine(tmp_path: Path, victim: str) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path)
        pids = await ready(supervisor)
        assert supervisor.keeper_pid is not None
        keeper = supervisor.keeper_pid
        for pid in {"front": pids[:1], "keeper": [keeper], "all": [keeper, *pids]}[victim]:
            os.kill(pid, signal.SIGKILL)
        ended = await supervisor.wait_exit()
        assert (ended.returncode, ended.was_asked) == (-9, False)
        if victim != "front":  # the keeper is dead: nobody was left to remove it
            assert remove_shared_memory() == 1
        assert_nothing_is_left(supervisor, pids)

    run(case())


@pytest.mark.parametrize("how", ["front", "stop"])
def test_a_killed_engine_leaves_no_semaphore(tmp_path: Path, how: str) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path, "semaphore,stubborn")
        await supervisor.start()
        await supervisor.wait_ready(DEADLINE_S)
        semaphore = Path(
            "/dev/shm/sem." + supervisor.log.read_text().split("semaphore ")[1].strip()
        )
        assert os.access(semaphore, os.R_OK)
        pids = supervisor.pids
        assert len(pids) == 3  # with Python's resource tracker
        if how == "front":
            os.kill(pids[0], signal.SIGKILL)
            await supervisor.wait_exit()
        else:
            await supervisor.stop(deadline_s=0.1)
        assert not os.access(semaphore, os.F_OK)
        assert_nothing_is_left(supervisor, pids)

    run(case())


def start_owner(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(Path(__file__).parent), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 3
    return owner, pids


def reap(owner: subprocess.Popen[str]) -> None:
    owner.wait(DEADLINE_S)
    assert owner.stdout is not None
    owner.stdout.close()


def test_an_engine_ends_with_its_owner_even_by_sigkill(tmp_path: Path) -> None:
    owner, pids = start_owner(tmp_path)
    owner.kill()
    reap(owner)
    until(lambda: not any(lives(pid) for pid in pids))
    assert not list(Path("/dev/shm").glob("rowen-test-*"))


def test_a_new_owner_ends_what_outlived_owner_and_keeper(tmp_path: Path) -> None:
    owner, (keeper, front, core) = start_owner(tmp_path)
    os.kill(keeper, signal.SIGSTOP)  # so that it cannot see its owner die
    owner.kill()
    reap(owner)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not lives(front))  # by PR_SET_PDEATHSIG
    assert lives(core)

    async def case() -> None:
        supervisor = supervise(tmp_path)
        pids = await ready(supervisor)
        assert not lives(core)
        await supervisor.stop()
        assert remove_shared_memory() == 1  # the first life's: nobody was left to remove it
        assert_nothing_is_left(supervisor, pids)

    run(case())


def test_leftovers_end_also_when_no_engine_is_started(tmp_path: Path) -> None:
    owner, (keeper, front, core) = start_owner(tmp_path)
    os.kill(keeper, signal.SIGSTOP)
    owner.kill()
    reap(owner)
    assert lives(core)

    async def case() -> None:
        supervisor = supervise(tmp_path)
        await supervisor.end_leftovers()
        assert not any(lives(pid) for pid in (keeper, front, core))
        assert not list(supervisor.log.parent.glob("*.json"))
        assert supervisor.state is EngineState.STOPPED
        await supervisor.end_leftovers()

    run(case())
    assert remove_shared_memory() == 1


def test_an_engine_of_another_living_owner_is_left_alone(tmp_path: Path) -> None:
    owner, pids = start_owner(tmp_path)

    async def case() -> None:
        supervisor = supervise(tmp_path)
        for attempt in (supervisor.end_leftovers, supervisor.start):
            with pytest.raises(
                EngineStartError, match=rf"another owner \(process {owner.pid}\) runs engine double"
            ):
                await attempt()

    try:
        run(case())
        assert all(lives(pid) for pid in pids)
    finally:
        owner.kill()
        reap(owner)
    until(lambda: not any(lives(pid) for pid in pids))


def test_an_engine_that_cannot_be_recorded_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "run" / f".double.processes.json.{os.getpid()}").mkdir(parents=True)

    async def case() -> None:
        supervisor = supervise(tmp_path)
        with pytest.raises(EngineStartError, match="cannot be placed or recorded"):
            await supervisor.start()
        assert supervisor.state is EngineState.EXITED
        assert_nothing_is_left(supervisor, [])

    run(case())


class RefusedIsolation:
    def place(self, pid: int) -> int:
        raise PermissionError(f"process {pid} must stay where it is")


def test_an_engine_that_cannot_be_placed_does_not_run(tmp_path: Path) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path, isolation=RefusedIsolation())
        await supervisor.start()
        with pytest.raises(EngineStartError, match="must stay where it is"):
            await supervisor.wait_ready(DEADLINE_S)
        assert_nothing_is_left(supervisor, [])

    run(case())


def test_a_record_of_another_process_with_the_same_id_harms_nobody(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    (tmp_path / "run").mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stranger = ProcessIdentity(bystander.pid, 1, boot)
    record = tmp_path / "run" / "double.processes.json"
    write_record(record, Record(owner=stranger, keeper=stranger, members=(stranger,)))

    async def case() -> None:
        supervisor = supervise(tmp_path)
        await ready(supervisor)
        assert bystander.poll() is None
        await supervisor.stop()

    try:
        run(case())
    finally:
        bystander.kill()
        bystander.wait()


def test_a_killed_engine_is_started_again_as_a_new_generation(tmp_path: Path) -> None:
    async def case() -> None:
        states: asyncio.Queue[EngineState] = asyncio.Queue()
        policy = RestartPolicy(first_delay_s=0.01)
        supervisor = supervise(tmp_path, restart=policy, on_change=states.put_nowait)
        keeping = asyncio.create_task(supervisor.keep_running())
        first = await next_ready(states, supervisor)
        os.kill(first, signal.SIGKILL)
        second = await next_ready(states, supervisor)
        assert supervisor.generation == 2
        assert second != first
        assert supervisor.restarts_total == 1
        await supervisor.stop()
        await keeping
        assert_nothing_is_left(supervisor, [first, second])

    run(case())


async def next_ready(states: asyncio.Queue[EngineState], supervisor: EngineSupervisor) -> int:
    await reached(states, EngineState.READY)
    assert supervisor.pid is not None
    return supervisor.pid


async def reached(states: asyncio.Queue[EngineState], wanted: EngineState) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await states.get() is not wanted:
            pass


def test_a_crash_loop_ends_with_the_last_lines(tmp_path: Path) -> None:
    async def case() -> None:
        policy = RestartPolicy(first_delay_s=0.01, longest_delay_s=0.02, crashes_in_window=3)
        supervisor = supervise(tmp_path, "dies", restart=policy)
        with pytest.raises(EngineCrashLoopError, match="3 crashes") as error:
            await supervisor.keep_running()
        assert "cannot allocate 12 GiB" in str(error.value)
        assert supervisor.generation == 3
        assert_nothing_is_left(supervisor, [])

    run(case())


def test_a_stop_between_restarts_ends_the_keeping(tmp_path: Path) -> None:
    async def case() -> None:
        states: asyncio.Queue[EngineState] = asyncio.Queue()
        policy = RestartPolicy(first_delay_s=3600)
        supervisor = supervise(tmp_path, "dies", restart=policy, on_change=states.put_nowait)
        keeping = asyncio.create_task(supervisor.keep_running())
        await reached(states, EngineState.EXITED)
        await supervisor.stop()
        await keeping
        assert supervisor.state is EngineState.STOPPED

    run(case())


def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    async def case() -> None:
        supervisor = supervise(tmp_path)
        starting = asyncio.create_task(supervisor.start())
        await asyncio.sleep(0)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await supervisor.stop(deadline_s=5)

    run(case())
    until(lambda: not psutil.Process().children(recursive=True))
