"""Mistakes of a user of the bench: one sentence each, naming place, value and remedy."""

from __future__ import annotations


class BenchError(Exception):
    """Base of what the bench refuses; nothing was started and nothing was written."""


class TraceError(BenchError):
    """A trace file that cannot be read as its format; no request of it is used."""


class WindowError(BenchError):
    """A window that cannot be cut from the trace with the settings given."""


class RequestsError(BenchError):
    """A file of replay requests or records that is not one of ours."""
