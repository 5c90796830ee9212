"""What can go wrong with weight versions, as one small hierarchy.

Every error says what was seen and what to do.  The state after an error stands with the function
that raises it; none of them leaves a half-written version behind.
"""

from __future__ import annotations


class WeightSyncError(Exception):
    """Base of all errors of this package."""

    code = "weightsync"
    """The word that stands for this class on the wire and in metrics."""


class UnsupportedTensorError(WeightSyncError):
    """A tensor cannot be published as it is (sharded, wrong dtype, wrong shape, unknown name)."""

    code = "unsupported_tensor"


class VersionOrderError(WeightSyncError):
    """A version was published that is not newer than the newest one."""

    code = "version_order"


class MalformedDeltaError(WeightSyncError):
    """Bytes that are no delta: truncated, foreign, or with a manifest that contradicts itself."""

    code = "malformed"


class ChecksumError(WeightSyncError):
    """Bytes or a result that do not have the checksum they were announced with."""

    code = "checksum"


class WrongBaseError(WeightSyncError):
    """A delta for another base than the weights at hand."""

    code = "wrong_base"


class ReplayError(WeightSyncError):
    """A version older than the one at hand, of the same chain."""

    code = "replay"


class ModelMismatchError(WeightSyncError):
    """A delta for another model: other names, shapes or dtypes."""

    code = "model_mismatch"


class VersionUnknownError(WeightSyncError):
    """The publisher does not have the wanted version (not yet, or no longer)."""

    code = "version_unknown"


class BaseUnknownError(WeightSyncError):
    """The publisher cannot make a delta from the receiver's version; a full copy is needed."""

    code = "base_unknown"


class ProtocolError(WeightSyncError):
    """A peer that does not speak this protocol, or speaks nonsense."""

    code = "protocol"


class PublisherBusyError(WeightSyncError):
    """The publisher serves as many receivers as it may; try again."""

    code = "busy"


class PublisherUnreachableError(WeightSyncError):
    """Nobody listens at the publisher's address."""

    code = "unreachable"


class PeerLostError(WeightSyncError):
    """The other side went away in the middle of a transfer."""

    code = "peer_lost"


class TransferTimeoutError(WeightSyncError):
    """No progress within the deadline."""

    code = "timeout"


BY_CODE: dict[str, type[WeightSyncError]] = {
    error.code: error
    for error in (
        VersionUnknownError,
        BaseUnknownError,
        ReplayError,
        ProtocolError,
        PublisherBusyError,
    )
}
"""The errors that a publisher may answer with."""
