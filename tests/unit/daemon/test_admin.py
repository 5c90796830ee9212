"""Who may talk to the admin server."""

from __future__ import annotations

import pytest

from rowen.daemon.admin import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1:9470", "localhost", "LOCALHOST:1", "[::1]:9470"])
def test_loopback_names_are_served(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "evil.example:9470", "127.0.0.1.evil.example", "evil@", "[::1", "localhost@evil"]
)
def test_any_other_name_is_refused(host: str) -> None:
    assert not is_loopback(host)
