"""Where each element of a checkpoint tensor lies in a loaded vLLM model.

vLLM fuses checkpoint tensors (q, k and v into one parameter, gate and up into another), renames
and slices them, and every model's own ``load_weights`` knows how.  So it is asked: it loads
*markers*, tensors of the right form whose memory is never touched, while a dispatch mode takes
every ``copy_`` from a marker into the model, notes both sides, and does not carry it out.

Called once per model by the weight backend.  It never changes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rowen.weightsync.codec import Index
from rowen.weightsync.elements import UNSIGNED, Elements, digest_of, dtype_name, integer_dtype
from rowen.weightsync.errors import ModelMismatchError
from rowen.weightsync.versions import TensorState


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of checkpoint elements that lies as one run in a parameter."""

    start: int
    """Flat position of the first element in the checkpoint tensor."""
    elements: torch.Tensor
    """The live memory, one-dimensional, viewed as integers of the tensor's item size."""

    @property
    def stop(self) -> int:
        """Flat position after the last element."""
        return self.start + int(self.elements.numel())


@dataclass(frozen=True, slots=True)
class Place:
    """One checkpoint tensor in the model: pieces in the order of the checkpoint, without holes."""

    name: str
    pieces: tuple[Piece, ...]

    def read(self, index_N: Index) -> Elements:
        """The elements at sorted flat positions."""
        parts = [piece.elements[where] for piece, where, _ in self._split(index_N)]
        return _to_numpy(torch.cat(parts) if len(parts) != 1 else parts[0])

    def write(self, index_N: Index, value_N: Elements) -> None:
        """Put elements at sorted flat positions; the work grows with their number."""
        for piece, where, part in self._split(index_N):
            piece.elements[where] = _to_torch(value_N[part], piece.elements)

    def read_all(self) -> Elements:
        """All elements; shares memory with the model where it lies in one piece on the host."""
        parts = [_to_numpy(piece.elements) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def write_all(self, values: Elements) -> None:
        """Replace all elements."""
        for piece in self.pieces:
            piece.elements.copy_(_to_torch(values[piece.start : piece.stop], piece.elements))

    def digest(self) -> str:
        """The xxh3-128 of the tensor as a checkpoint would hold it."""
        return digest_of(self.read_all())

    def _split(self, index_N: Index) -> Iterable[tuple[Piece, torch.Tensor, slice]]:
        for piece in self.pieces:
            first, last = np.searchsorted(index_N, (piece.start, piece.stop))
            where = torch.from_numpy(index_N[first:last] - piece.start)
            yield piece, where.to(piece.elements.device), slice(int(first), int(last))


def trace_places(model: torch.nn.Module, tensors: Iterable[TensorState]) -> dict[str, Place]:
    """Find where the model holds each of these checkpoint tensors.

    Args:
        model: a loaded vLLM model with live weights (see cpu_linear.py for the CPU).
        tensors: name, shape and dtype of each checkpoint tensor.

    Raises:
        ModelMismatchError: the model has no such tensor, holds it in another dtype, or its loader
            does more than copy runs of elements.  No weight was changed.
    """
    markers = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in tensors
    }
    recorder = _CopyRecorder(model, markers)
    try:
        with torch.no_grad(), recorder:
            model.load_weights(markers.items())
    except ModelMismatchError:
        raise
    except Exception as error:
        raise ModelMismatchError(
            f"the model's loader refuses the published tensors ({type(error).__name__}: {error}); "
            "publish the checkpoint that the engine serves, and start a CPU engine with "
            "ROWEN_ENGINE_ROLE=rollout, which keeps its linear weights"
        ) from error
    return {name: _place(name, marker, recorder.copies[name]) for name, marker in markers.items()}


@dataclass(frozen=True, slots=True)
class _Copy:
    source: torch.Tensor
    target: torch.Tensor


class _CopyRecorder(TorchDispatchMode):
    """Takes writes into the model: notes those from markers, refuses what it cannot follow."""

    def __init__(self, model: torch.nn.Module, markers: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {_storage(marker): name for name, marker in markers.items()}
        self._model = {_storage(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        self.copies: dict[str, list[_Copy]] = {name: [] for name in markers}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        target = args[0] if args and func._schema.is_mutable else None
        if not isinstance(target, torch.Tensor) or _storage(target) not in self._model:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            name = self._names.get(_storage(args[1]))
            if name is None:
                raise ModelMismatchError(
                    "the model's loader computes a new tensor from the checkpoint's before it "
                    "copies it; such weights cannot be patched in place"
                )
            self.copies[name].append(_Copy(args[1], target))
        elif func not in _PADDING_WRITES:
            raise ModelMismatchError(f"the model's loader writes weights by {func}, not by copy_")
        return target


_PADDING_WRITES = (
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
)
"""How loaders clear the rows with which they pad a vocabulary; they were cleared at load."""


def _place(name: str, marker: torch.Tensor, copies: list[_Copy]) -> Place:
    if not copies:
        raise ModelMismatchError(
            f"the model does not load tensor {name!r}; publish only what the checkpoint that the "
            "engine serves holds"
        )
    pieces = sorted((_piece(name, copy) for copy in copies), key=lambda piece: piece.start)
    covered = 0
    for piece in pieces:
        if piece.start != covered:
            raise ModelMismatchError(
                f"the model holds only parts of {name!r} or holds parts twice (element {covered}); "
                "tensor parallel engines are not supported yet"
            )
        covered = piece.stop
    if covered != marker.numel():
        raise ModelMismatchError(
            f"the model holds {covered} of the {marker.numel()} elements of {name!r}; tensor "
            "parallel engines are not supported yet"
        )
    return Place(name, tuple(pieces))


def _piece(name: str, copy: _Copy) -> Piece:
    source, target = copy.source, copy.target
    if source.dtype != target.dtype:
        raise ModelMismatchError(
            f"{name!r} is published as {dtype_name(source.dtype)} and served as "
            f"{dtype_name(target.dtype)}; give the Publisher dtype=torch.{dtype_name(target.dtype)}"
        )
    if source.numel() != target.numel() or not (source.is_contiguous() and target.is_contiguous()):
        raise ModelMismatchError(
            f"the model transposes or slices {name!r} across rows; such weights cannot be patched "
            "in place yet"
        )
    live = torch.empty(0, dtype=integer_dtype(target.element_size()), device=target.device)
    live.set_(target.untyped_storage(), target.storage_offset(), (target.numel(),), (1,))
    return Piece(source.storage_offset(), live)


def _storage(tensor: torch.Tensor) -> int:
    """An identity of a tensor's memory; empty tensors have none and count as 0."""
    pointer: int = tensor.untyped_storage().data_ptr()
    return pointer


def _to_numpy(elements: torch.Tensor) -> Elements:
    array: Elements = elements.to("cpu").numpy().view(UNSIGNED[elements.element_size()])
    return array


def _to_torch(values: Elements, like: torch.Tensor) -> torch.Tensor:
    signed = np.ascontiguousarray(values).view(
        f"i{values.itemsize}" if values.itemsize > 1 else "u1"
    )
    return torch.from_numpy(signed).to(like.device)
