"""The state store of a single machine: an in-process Redis that ordinary clients reach over TCP.

It speaks the same protocol as a real one, so that daemons and supervisors use their normal client.
Its content lives as long as this process, which is right for leases: they are renewed twice a
second by whoever owns the engine.
"""

from __future__ import annotations

import threading
from types import TracebackType

from fakeredis import TcpFakeServer


class EmbeddedRedis:
    """Context manager; ``url`` is what ``redis.from_url`` takes.

    Raises:
        OSError: the port is in use; nothing was started.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = TcpFakeServer((host, port), server_type="redis", server_version=(7, 0))
        chosen: int = self._server.server_address[1]
        self.url = f"redis://{host}:{chosen}/0"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="embedded-redis", daemon=True
        )

    def __enter__(self) -> EmbeddedRedis:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port; may be called again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
