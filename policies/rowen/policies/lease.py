"""The lease document of an engine: what its node says about it, as it stands in Redis.

The node daemon (or, for a dedicated engine, whoever supervises it) writes it, the scheduler reads
it.  This module holds the document and the names of its keys and does no I/O, so that both sides
agree without importing each other.

Keys in Redis:

* ``rowen:engines``: set of all engine ids that ever had a lease; members without a lease are gone.
* ``rowen:lease:{engine_id}``: the document as JSON, expiring after ``lease_ms`` unless renewed.
* ``rowen:epoch:{engine_id}``: the fencing epoch, raised at every (re)start of the engine's process.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NewType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

EngineId = NewType("EngineId", str)

ENGINES_KEY = "rowen:engines"
"""Redis set of engine ids."""

DEFAULT_LEASE_MS = 2000
"""Four renewals of 500 ms: three may be lost before the scheduler takes the engine for gone."""

RENEW_EVERY_MS = 500
"""A quarter of the default lease."""


class EngineKind(StrEnum):
    """Whose hardware the engine runs on."""

    DEDICATED = "dedicated"
    OPPORTUNISTIC = "opportunistic"


class Grant(StrEnum):
    """What the engine may be used for now.

    ``run``: takes requests and makes tokens.  ``throttled``: alive, but its gate is closed for the
    moment, so tokens come late.  ``draining``: give it nothing, go on with its work elsewhere.
    """

    RUN = "run"
    THROTTLED = "throttled"
    DRAINING = "draining"


class LeaseError(ValueError):
    """A stored lease is not a lease document; the reader treats the engine as having none."""


class EngineLease(BaseModel):
    """One engine's lease; valid while its Redis key lives, and only at the highest epoch seen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine_id: Annotated[EngineId, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
    """Stable over restarts of the engine; letters, digits, dot, dash, underscore."""
    url: Annotated[str, Field(pattern=r"^https?://[^/]+$")]
    """Root of the engine's HTTP server, without a trailing slash."""
    kind: EngineKind
    """Whether it runs on its own hardware or on what serving leaves."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which the engine serves its model."""
    node: Annotated[str, Field(min_length=1)]
    """The machine it runs on."""
    grant: Grant
    """What it may be used for now."""
    fencing_epoch: Annotated[int, Field(ge=1)]
    """Raised at every start of the engine; a lease below the highest epoch seen is void."""
    sequence_cap: Annotated[int, Field(ge=0)]
    """Most requests that the engine will run at once; 0 while it may run none."""
    lease_ms: Annotated[int, Field(gt=0)] = DEFAULT_LEASE_MS
    """Life of the document without renewal."""


def lease_key(engine_id: str) -> str:
    """Redis key of the lease of an engine."""
    return f"rowen:lease:{engine_id}"


def epoch_key(engine_id: str) -> str:
    """Redis key of the fencing epoch of an engine."""
    return f"rowen:epoch:{engine_id}"


def encode_lease(lease: EngineLease) -> str:
    """The JSON that is stored."""
    return lease.model_dump_json()


def decode_lease(stored: str | bytes) -> EngineLease:
    """Read a stored lease.

    Raises:
        LeaseError: it is not JSON, or not a lease document.  Treat the engine as having no lease.
    """
    try:
        return EngineLease.model_validate_json(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise LeaseError(f"lease: {field}: {first['msg']}") from error
