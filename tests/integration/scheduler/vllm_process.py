"""A real vLLM engine with the tiny random Llama, as a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_DEADLINE_S = 240.0
"""Two at once take about a minute on two cores, mostly imports."""


class VllmProcess:
    """Started at once; ``wait_ready`` later, so that several start side by side."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        arguments = [
            "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1",
            "--port", str(self.port), "--dtype", "float32", "--max-model-len", "512",
            "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 * 1024**2),
            "--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out",
            "--distributed-executor-backend", "uni", "--uvicorn-log-level", "warning",
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = self._log.read_text(errors="replace")[-3000:]
                raise AssertionError(f"vLLM ended with {self._process.returncode}:\n{tail}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"vLLM was not ready within {START_DEADLINE_S} s")

    def kill(self) -> None:
        """SIGKILL to everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
