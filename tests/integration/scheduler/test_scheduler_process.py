"""The scheduler as a process: starts from flags, ends cleanly, refuses wrong use in a sentence."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import redis

COMMAND = [sys.executable, "-m", "rowen.scheduler"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_cleanly(number: signal.Signals) -> None:
    with subprocess.Popen(
        [*COMMAND, "--model", "m", "--port", "0", "--redis", "embedded"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"url=(\S+) redis=(\S+)", process.stderr.readline())
            assert found is not None
            with urllib.request.urlopen(f"{found[1]}/health", timeout=20) as answer:
                assert answer.status == 200
            with redis.Redis.from_url(found[2]) as client:
                assert client.ping()
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 0, errors
            assert "Traceback" not in errors
        finally:
            process.kill()


def test_wrong_use_exits_2_with_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--model", "m", "--port", port, "--redis", "none"], f"--port {port}"),
            (["--model", "m", "--port", "0", "--redis", f"embedded:{port}"], f"embedded:{port}"),
            (["--model", "m", "--port", "0", "--redis", "redis"], "--redis is 'redis'"),
            (["--model", "m", "--port", "0", "--stall-s", "0"], "--stall-s is '0'"),
            (["--model", "m", "--port", "0", "--dedicated", "ftp://x"], "--dedicated"),
        ]
        for arguments, shown in cases:
            ended = subprocess.run(
                [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
            )
            assert ended.returncode == 2
            assert shown in ended.stderr
            assert len(ended.stderr.strip().splitlines()) == 1
