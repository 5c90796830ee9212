"""Every number of the scheduler that an operator may turn, with the reason for its default."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HttpUrl = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]


class Settings(BaseModel):
    """Configuration of one scheduler process; ``python -m rowen.scheduler`` fills it from flags."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: Annotated[str, Field(min_length=1)]
    """Name under which the engines serve the model; leases of other models are not used."""
    dedicated: tuple[HttpUrl, ...] = ()
    """Engines without a lease, at fixed addresses: always wanted, never reclaimed."""
    dedicated_sequences: Annotated[int, Field(ge=1)] = 16
    """Most requests at once on each engine of ``dedicated``; leased engines say it themselves."""
    request_deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Life of a request, waiting included; RL clients commonly wait ten minutes."""
    stall_s: Annotated[float, Field(gt=0)] = 10.0
    """An engine that may run but sends a request no token for so long is left by that request."""
    poll_ms: Annotated[int, Field(ge=10)] = 200
    """How often leases are read: a draining lease is acted upon within this time."""
    health_every_ms: Annotated[int, Field(ge=10)] = 1000
    """How often each engine is asked for its health while it streams nothing."""
    health_deadline_s: Annotated[float, Field(gt=0)] = 2.0
    """A front end that shares a core with three others answers in far less."""
    health_failures: Annotated[int, Field(ge=1)] = 3
    """Unanswered checks in a row before an engine counts as lost; a refused one counts at once."""
    fault_wait_s: Annotated[float, Field(gt=0)] = 0.5
    """Rest of an engine after a broken stream; doubles with every fault in a row."""
    fault_wait_max_s: Annotated[float, Field(gt=0)] = 30.0
    """Longest rest of an engine after faults."""
    sync_deadline_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest weight update of one engine; a 135 M model takes about a second."""
    sync_retry_s: Annotated[float, Field(gt=0)] = 0.5
    """Wait after a failed weight update; doubles with every failure in a row."""
    sync_retry_max_s: Annotated[float, Field(gt=0)] = 15.0
    """Longest wait between weight updates of one engine."""
    max_open: Annotated[int, Field(ge=1)] = 4096
    """Requests that may be open at once; more are answered 429."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024**2
    """A prompt of a million tokens is about 7 MiB of JSON."""
    retain_s: Annotated[float, Field(gt=0)] = 600.0
    """How long an ended trajectory can be fetched again by its ``X-Request-Id``."""
    retain_count: Annotated[int, Field(ge=0)] = 2048
    """Most ended trajectories that are kept, the oldest going first."""
    history_s: Annotated[int, Field(ge=1)] = 1800
    """Seconds of tokens-per-second history kept per engine."""
