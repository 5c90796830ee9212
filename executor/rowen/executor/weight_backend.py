"""The rollout engine's side of weightsync: vLLM's weight-transfer backend ``rowen``.

vLLM calls it inside the process that computes, between two steps, through its own routes
``/init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights`` with
``{"update_info": {"version": …, "host": …, "port": …}}`` and ``/finish_weight_update``.

An update is all or nothing.  Everything is fetched, checked and decoded before the first write;
each written tensor is hashed as a whole afterwards; on any failure the old values are put back and
hashed again.  Should even that not be provable, the model is *poisoned*: it refuses to compute
(vLLM then ends the engine and its supervisor starts a fresh one) until a full copy of a version
was taken.  So the engine never serves mixed weights.

What is verified when: at the first update every tensor of the engine is hashed and compared with
the publisher's version 0.  From then on the checksums of untouched tensors are carried over from
the version in which they were last hashed; a tensor that an update touches is hashed in full.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rowen.executor.checkpoint_trace import Place, trace_places
from rowen.executor.cpu_linear import pack_again
from rowen.weightsync.codec import Index
from rowen.weightsync.delta import unseal
from rowen.weightsync.elements import Elements
from rowen.weightsync.errors import BaseUnknownError, ModelMismatchError, WeightSyncError
from rowen.weightsync.fetch import PublisherClient
from rowen.weightsync.receive import Holding, TensorUpdate, check_base, check_result, decode
from rowen.weightsync.versions import Catalogue

logger = logging.getLogger("vllm.rowen.weights")  # under vllm's logger, whose handler is set up


class PoisonedError(WeightSyncError):
    """An update failed and the old weights could not be proven to be back."""

    code = "poisoned"


@dataclass
class RowenInitInfo(WeightTransferInitInfo):
    """Nothing: each update says where its publisher is, which may change."""


@dataclass
class RowenUpdateInfo(WeightTransferUpdateInfo):
    """Which version to take from where."""

    version: int
    host: str
    port: int
    run: str = ""
    """Training run of the version; empty for a publisher that does not say."""

    def __post_init__(self) -> None:
        if self.version < 0 or not 0 < self.port < 65536:
            raise ValueError(
                f"update_info has version {self.version} and port {self.port}; a version is 0 or "
                "more and a port 1 to 65535"
            )


class RowenWeightTransferEngine(WeightTransferEngine[RowenInitInfo, RowenUpdateInfo]):
    """Patches the loaded model in place; holds one verified version at a time."""

    init_info_cls = RowenInitInfo
    update_info_cls = RowenUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        """Attach to a loaded model.

        Raises:
            ValueError: the engine is split over several workers, or compiled on the CPU.  vLLM
                then does not start.
        """
        super().__init__(config, vllm_config, device, model)
        world_size = vllm_config.parallel_config.world_size
        if world_size != 1:
            raise ValueError(
                f"weight transfer backend 'rowen' supports one worker per engine, this one has "
                f"{world_size}; set --tensor-parallel-size 1 and --pipeline-parallel-size 1"
            )
        if device.type == "cpu" and not vllm_config.model_config.enforce_eager:
            raise ValueError(
                "weight transfer backend 'rowen' patches weights that a compiled CPU model has "
                "packed into its code; add --enforce-eager"
            )
        from rowen.executor import layer_gate

        layer_gate.attach(model, vllm_config)
        model.register_forward_pre_hook(self._refuse_if_poisoned)
        self._holding: Holding | None = None
        self._publisher: tuple[str, int, str] | None = None
        self._places: dict[str, Place] = {}
        self._is_poisoned = False

    @property
    def version(self) -> int | None:
        """The verified version; None before the first update and while poisoned."""
        return None if self._holding is None or self._is_poisoned else self._holding.version

    def init_transfer_engine(self, init_info: RowenInitInfo) -> None:
        """Nothing to do; see `RowenInitInfo`."""

    def start_weight_update(self) -> None:
        """Nothing to do: each update is complete in itself."""

    def finish_weight_update(self) -> None:
        """Nothing to do: each update is complete in itself."""

    def shutdown(self) -> None:
        """Nothing to do: nothing outlives an update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take a version; see `receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: RowenUpdateInfo) -> None:
        """Fetch a version, patch the model, prove the result.

        A version that is held already, of the same run and publisher, costs nothing; where no run
        is named, the publisher is asked whether the held chain is its own.

        Raises:
            PoisonedError: the old weights could not be proven to be back; the model refuses to
                compute.
            WeightSyncError: anything else; the engine holds the version that it held before.
        """
        publisher = (update_info.host, update_info.port, update_info.run)
        is_held = self.version == update_info.version and self._publisher == publisher
        if update_info.run and is_held:
            return
        started = time.perf_counter()
        with PublisherClient(update_info.host, update_info.port) as client:
            frame = self._fetch(client, update_info.version)
        if frame is None:
            self._publisher = publisher
            return
        fetched = time.perf_counter()
        delta = unseal(frame)
        result = check_base(delta.manifest, self._holding)
        if result.tensors.keys() != self._places.keys():
            raise ModelMismatchError(
                f"version {result.version} has {len(result.tensors)} tensors and the publisher's "
                f"version 0 had {len(self._places)}; announce a publisher of the same model"
            )
        updates = list(decode(delta, self._read_base))
        with torch.no_grad():
            self._apply(updates)
        self._holding, self._publisher, self._is_poisoned = result, publisher, False
        logger.info(
            "rowen weights: version=%d base=%s tensors=%d changed=%d bytes=%d fetch_s=%.3f "
            "apply_s=%.3f",
            result.version,
            delta.manifest.base_version,
            len(updates),
            sum(tensor.changed for tensor in delta.manifest.tensors),
            len(frame),
            fetched - started,
            time.perf_counter() - fetched,
        )

    def _fetch(self, client: PublisherClient, version: int) -> bytearray | None:
        if self._holding is None and not self._is_poisoned:
            self._holding = self._verified_start(client.catalogue())
        if self._holding is None or self._is_poisoned:
            return client.fetch(None, version)
        try:
            return client.fetch(self._holding.have, version)
        except BaseUnknownError as error:
            logger.warning("rowen weights: taking a full copy, because %s", error)
            return client.fetch(None, version)

    def _verified_start(self, catalogue: Catalogue) -> Holding | None:
        """Compare the loaded checkpoint with version 0, tensor by tensor; None if it differs."""
        holding = Holding.of(catalogue)
        self._places = trace_places(self.model, catalogue.tensors)
        different = [
            tensor.name
            for tensor in catalogue.tensors
            if self._places[tensor.name].digest() != tensor.xxh3_128
        ]
        if different:
            logger.warning(
                "rowen weights: taking a full copy, because %d of %d tensors differ from the "
                "trainer's version 0, as %s; start both from the same checkpoint",
                len(different),
                len(catalogue.tensors),
                different[0],
            )
            return None
        return holding

    def _read_base(self, name: str, index_N: Index) -> Elements:
        return self._places[name].read(index_N)

    def _apply(self, updates: list[TensorUpdate]) -> None:
        undo: list[_Undo] = []
        try:
            for update in updates:
                self._write(update, undo)
            self._pack_changed(update.result.name for update in updates)
        except BaseException as error:
            self._roll_back(undo, error)
            raise

    def _write(self, update: TensorUpdate, undo: list[_Undo]) -> None:
        name = update.result.name
        place = self._places[name]
        if not self._is_poisoned:  # a poisoned model has nothing worth going back to
            undo.append(self._remember(place, update.index_N))
        if update.index_N is None:
            place.write_all(update.value_N)
        else:
            place.write(update.index_N, update.value_N)
        check_result(update.result, place.digest())

    def _remember(self, place: Place, index_N: Index | None) -> _Undo:
        known = None if self._holding is None else self._holding.tensors[place.name].xxh3_128
        old = place.read_all().copy() if index_N is None else place.read(index_N)
        return _Undo(place, index_N, old, known or place.digest())

    def _roll_back(self, undo: list[_Undo], cause: BaseException) -> None:
        if self._is_poisoned:
            raise PoisonedError(f"the model stays poisoned: {cause}") from cause
        self._is_poisoned = True
        for step in reversed(undo):
            if step.index_N is None:
                step.place.write_all(step.old_N)
            else:
                step.place.write(step.index_N, step.old_N)
        wrong = [step.place.name for step in undo if step.place.digest() != step.digest]
        if wrong:
            raise PoisonedError(
                f"an update failed ({cause}) and {len(wrong)} tensors, as {wrong[0]!r}, are not "
                "what they were before; the model computes no more until a full copy is taken"
            ) from cause
        self._pack_changed(step.place.name for step in undo)
        self._is_poisoned = False
        logger.warning("rowen weights: rolled back to version %s: %s", self.version, cause)

    def _pack_changed(self, names: Iterable[str]) -> None:
        if self.device.type == "cpu":
            storages = {
                piece.elements.untyped_storage().data_ptr()
                for name in names
                for piece in self._places[name].pieces
            }
            pack_again(self.model, storages)

    def _refuse_if_poisoned(self, _module: torch.nn.Module, _inputs: Any) -> None:
        if self._is_poisoned:
            raise PoisonedError("the model's weights are not proven; take a full copy or restart")


@dataclass(frozen=True, slots=True)
class _Undo:
    """How to take one tensor's write back, and how to prove it."""

    place: Place
    index_N: Index | None
    old_N: Elements
    digest: str
