"""Services: nothing of one outlives its owner, and one that dies comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rowen.cli.service import Service, ServiceError, ServiceSpec

DEADLINE_S = 20.0

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


async def until(claim: object, deadline_s: float = DEADLINE_S) -> None:
    assert callable(claim)
    end_s = time.monotonic() + deadline_s
    while not claim():
        assert time.monotonic() < end_s, "the claim did not come true in time"
        await asyncio.sleep(0.02)


def test_a_killed_service_comes_back_as_another_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        service = Service(ServiceSpec("sleeper", SLEEPER, tmp_path / "log"))
        await service.start()
        await until(lambda: service.pid is not None)
        keeping = asyncio.create_task(service.keep_running())
        first = service.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: service.pid not in (None, first))
        assert service.restarts_total == 1
        second = service.pid
        await service.stop()
        await keeping
        assert second is not None
        assert not psutil.pid_exists(second)

    asyncio.run(scenario())


def test_a_service_that_dies_while_starting_is_told_with_its_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        argv = [sys.executable, "-c", "import sys; sys.exit('the port of doom is taken')"]
        spec = ServiceSpec("doomed", argv, tmp_path / "log", ready_url="http://127.0.0.1:9/")
        service = Service(spec)
        await service.start()
        with pytest.raises(ServiceError, match="the port of doom is taken"):
            await service.wait_ready(DEADLINE_S)

    asyncio.run(scenario())


def test_a_service_does_not_outlive_an_owner_killed_by_sigkill(tmp_path: Path) -> None:
    owner_code = f"""
import asyncio, pathlib
from rowen.cli.service import Service, ServiceSpec
async def main():
    service = Service(ServiceSpec("sleeper", {SLEEPER!r}, pathlib.Path({str(tmp_path)!r}) / "log"))
    await service.start()
    while service.pid is None:
        await asyncio.sleep(0.02)
    print(service.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        sleeper = int(owner.stdout.readline())
        assert psutil.pid_exists(sleeper)
        owner.kill()
    end_s = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(sleeper):
        assert time.monotonic() < end_s, "the service outlived its owner"
        time.sleep(0.05)  # polling with a deadline, no synchronisation by time
