"""The weight backend against a small fused model: all or nothing, and nothing unproven computes.

The model is a double of a vLLM model: it fuses q, k and v, pads its vocabulary and reads one
fused checkpoint tensor in parts, through loaders like vLLM's.  Publisher and transport are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rowen.executor import weight_backend
from rowen.executor.checkpoint_trace import trace_places
from rowen.executor.cpu_linear import PackedLinear, pack_again
from rowen.executor.weight_backend import PoisonedError, RowenWeightTransferEngine
from rowen.weightsync.delta import Section, seal, unseal
from rowen.weightsync.elements import dtype_name
from rowen.weightsync.errors import (
    ChecksumError,
    ModelMismatchError,
    PublisherUnreachableError,
    ReplayError,
)
from rowen.weightsync.publisher import Publisher
from rowen.weightsync.receive import check_result
from rowen.weightsync.versions import TensorState

Weights = dict[str, torch.Tensor]

HIDDEN, VOCABULARY, PADDED = 8, 10, 16


def checkpoint(seed: int) -> Weights:
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (VOCABULARY, HIDDEN),
        "q": (HIDDEN, HIDDEN),
        "k": (4, HIDDEN),
        "v": (4, HIDDEN),
        "gate_up": (12, HIDDEN),
        "norm": (HIDDEN,),
    }
    return {
        name: torch.randn(shape, generator=random).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


class FusedModel(nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(PADDED, HIDDEN, dtype=torch.bfloat16))
        self.qkv = nn.Parameter(torch.zeros(16, HIDDEN, dtype=torch.bfloat16))
        self.gate = nn.Parameter(torch.zeros(6, HIDDEN, dtype=torch.bfloat16))
        self.up = nn.Parameter(torch.zeros(6, HIDDEN, dtype=torch.bfloat16))
        self.norm = nn.Parameter(torch.zeros(HIDDEN, dtype=torch.bfloat16))
        self.load_weights(weights.items())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        starts = {"q": 0, "k": 8, "v": 12}
        loaded = set()
        for name, tensor in weights:
            if name in starts:
                self.qkv.data.narrow(0, starts[name], tensor.shape[0]).copy_(tensor)
            elif name == "embed":
                self.embed[:VOCABULARY].data.copy_(tensor)
                self.embed[VOCABULARY:].data.fill_(0)
            elif name == "gate_up":
                for target, part in zip((self.gate, self.up), tensor.chunk(2), strict=True):
                    target.data.copy_(part)
            elif name == "norm":
                self.norm.data[:] = tensor
            elif name != "ignored":
                raise KeyError(name)
            loaded.add(name)
        return loaded

    def forward(self, token: int) -> torch.Tensor:
        hidden = self.embed[token] * self.norm
        return torch.cat((self.qkv @ hidden, self.gate @ hidden, self.up @ hidden))


def nudged(weights: Weights, seed: int) -> Weights:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=random) < 0.4, tensor * 1.5, tensor)
        for name, tensor in weights.items()
    }


def states(weights: Weights) -> list[TensorState]:
    return [
        TensorState(
            name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), xxh3_128="0" * 32
        )
        for name, tensor in weights.items()
    ]


def backend_of(model: nn.Module) -> RowenWeightTransferEngine:
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        model_config=SimpleNamespace(enforce_eager=True),
        additional_config={},
    )
    return RowenWeightTransferEngine(
        SimpleNamespace(backend="rowen"), vllm_config, torch.device("cpu"), model
    )


def take(backend: RowenWeightTransferEngine, publisher: Publisher, version: int) -> None:
    host, port = publisher.address
    backend.start_weight_update()
    backend.update_weights({"version": version, "host": host, "port": port, "run": "r"})
    backend.finish_weight_update()


def holds(model: FusedModel, weights: Weights) -> bool:
    expected = FusedModel(weights)
    return all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True)
    )


@pytest.fixture
def versions() -> list[Weights]:
    chain = [checkpoint(0)]
    for version in range(1, 4):
        chain.append(nudged(chain[-1], version))
    return chain


@pytest.fixture
def publisher(versions: list[Weights]) -> Iterator[Publisher]:
    with Publisher("m", versions[0]) as publisher:
        for version in (1, 2, 3):
            publisher.publish(versions[version], version)
        yield publisher


def test_versions_land_in_the_fused_parameters(
    versions: list[Weights], publisher: Publisher
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    assert backend.version is None
    for version in (1, 2, 3):
        take(backend, publisher, version)
        assert holds(model, versions[version])
        assert backend.version == version
    late = FusedModel(versions[0])
    take(backend_of(late), publisher, 3)
    assert holds(late, versions[3])


def test_a_version_that_is_held_needs_no_publisher(
    versions: list[Weights], publisher: Publisher
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    take(backend, publisher, 2)
    with pytest.raises(ReplayError):
        take(backend, publisher, 1)
    publisher.close()
    take(backend, publisher, 2)
    with pytest.raises(PublisherUnreachableError):
        take(backend, publisher, 3)
    assert holds(model, versions[2])
    assert backend.version == 2


def test_another_checkpoint_takes_a_full_copy(
    versions: list[Weights], publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    model = FusedModel(checkpoint(99))
    backend = backend_of(model)
    caplog.set_level("WARNING", logger="vllm.rowen.weights")
    take(backend, publisher, 3)
    assert holds(model, versions[3])
    assert "6 of 6 tensors differ" in caplog.text


def test_a_trainer_that_starts_over_takes_the_engine_along(
    versions: list[Weights], publisher: Publisher
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    take(backend, publisher, 2)
    with Publisher("m", versions[3]) as restarted:
        restarted.publish(versions[1], 1)
        restarted.publish(versions[0], 2)
        take(backend, restarted, 2)
        assert holds(model, versions[0])


def test_another_model_is_refused(versions: list[Weights]) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    with (
        Publisher("m", {**versions[0], "bias": torch.zeros(3)}) as other,
        pytest.raises(ModelMismatchError, match="bias"),
    ):
        take(backend, other, 0)
    with (
        Publisher("m", versions[0], dtype=torch.float32) as other,
        pytest.raises(ModelMismatchError, match=r"served as bfloat16; give the Publisher dtype"),
    ):
        take(backend, other, 0)
    assert holds(model, versions[0])


def lie(publisher: Publisher, spoil: Callable[[bytes], bytes]) -> None:
    """Let the publisher hand out something else than what it made."""
    store = publisher._store
    original = store.frame

    def frame(have: Any, want: int) -> bytes | None:
        made = original(have, want)
        return None if made is None else spoil(made)

    store.frame = frame  # type: ignore[method-assign] # this publisher lies


def flip_in_payload(frame: bytes) -> bytes:
    spoilt = bytearray(frame)
    spoilt[-3] ^= 1
    return bytes(spoilt)


def other_values(frame: bytes) -> bytes:
    """A delta that is sound in every check but the last: the last tensor gets other values."""
    delta = unseal(frame)
    manifest = delta.manifest
    sections = [
        Section(tensor.result, tensor.codec, tensor.changed, bytes(section))
        for tensor, section in delta.sections()
    ]
    last = sections[-1]
    donor = next(each for each in sections[:-1] if each.result.elements == last.result.elements)
    sections[-1] = Section(last.result, donor.codec, donor.changed, donor.data)
    return seal(
        model_id=manifest.model_id,
        base_version=manifest.base_version,
        base_chain=manifest.base_chain,
        links=manifest.links,
        chain=manifest.chain,
        sections=sections,
    )[1]


@pytest.mark.parametrize("spoil", [flip_in_payload, other_values])
def test_wrong_bytes_leave_the_held_version_whole(
    versions: list[Weights], publisher: Publisher, spoil: Callable[[bytes], bytes]
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    take(backend, publisher, 1)
    honest = publisher._store.frame
    lie(publisher, spoil)
    with pytest.raises(ChecksumError):
        take(backend, publisher, 2)
    assert holds(model, versions[1])
    assert backend.version == 1
    model(3)
    publisher._store.frame = honest  # type: ignore[method-assign] # and now it tells the truth
    take(backend, publisher, 3)
    assert holds(model, versions[3])


def test_weights_that_cannot_be_proven_never_compute_until_a_full_copy(
    versions: list[Weights], publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    take(backend, publisher, 1)

    def fail_and_corrupt(result: TensorState, digest: str) -> None:
        if result.name == "norm":
            with torch.no_grad():
                model.norm += 1.0
                model.qkv += 1.0
            raise ChecksumError("memory is not what it was")
        check_result(result, digest)

    with monkeypatch.context() as patch:
        patch.setattr(weight_backend, "check_result", fail_and_corrupt)
        with pytest.raises(PoisonedError, match="computes no more"):
            take(backend, publisher, 2)
        assert backend.version is None
        with pytest.raises(PoisonedError):
            model(3)
        with pytest.raises(PoisonedError, match="stays poisoned"):
            take(backend, publisher, 3)
    take(backend, publisher, 3)
    assert holds(model, versions[3])
    assert model(3).shape == (28,)


@pytest.mark.parametrize("failing", ["embed", "q", "norm"])
def test_an_interruption_at_any_tensor_is_undone(
    versions: list[Weights], publisher: Publisher, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model = FusedModel(versions[0])
    backend = backend_of(model)
    take(backend, publisher, 1)

    def interrupted(result: TensorState, digest: str) -> None:
        if result.name == failing:
            raise KeyboardInterrupt
        check_result(result, digest)

    monkeypatch.setattr(weight_backend, "check_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take(backend, publisher, 2)
    assert holds(model, versions[1])
    assert backend.version == 1
    model(3)


def test_tracing_finds_every_element_and_changes_none(versions: list[Weights]) -> None:
    model = FusedModel(versions[0])
    places = trace_places(model, states(versions[0]))
    assert holds(model, versions[0])
    assert [len(places[name].pieces) for name in ("q", "gate_up", "embed")] == [1, 2, 1]
    for name, tensor in versions[0].items():
        expected = tensor.reshape(-1).view(torch.int16).numpy()
        assert (places[name].read_all().view("i2") == expected).all()


class _Composing(FusedModel):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor.clone()) for name, tensor in weights)


class _Transposing(FusedModel):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        pairs = list(weights)
        for name, tensor in pairs:
            if name == "q":
                self.qkv.data[:HIDDEN].copy_(tensor.t())
        return super().load_weights((name, tensor) for name, tensor in pairs if name != "q")


@pytest.mark.parametrize(
    ("model", "extra", "sentence"),
    [
        (FusedModel, "ignored", "does not load tensor 'ignored'"),
        (FusedModel, "unknown", "refuses the published tensors"),
        (_Composing, None, "computes a new tensor"),
        (_Transposing, None, "transposes or slices 'q'"),
    ],
)
def test_loaders_that_cannot_be_followed_are_refused(
    model: type[FusedModel], extra: str | None, sentence: str, versions: list[Weights]
) -> None:
    loaded = FusedModel(versions[0])
    loaded.__class__ = model
    published = dict(versions[0])
    if extra is not None:
        published[extra] = torch.zeros(4)
    with pytest.raises(ModelMismatchError, match=sentence):
        trace_places(loaded, states(published))
    assert holds(loaded, versions[0])


def test_split_and_compiled_engines_are_refused_at_start() -> None:
    for world_size, enforce_eager, setting in (
        (2, True, "--tensor-parallel-size 1"),
        (1, False, "--enforce-eager"),
    ):
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=world_size),
            model_config=SimpleNamespace(enforce_eager=enforce_eager),
            additional_config={},
        )
        with pytest.raises(ValueError, match=setting):
            RowenWeightTransferEngine(
                SimpleNamespace(backend="rowen"), vllm_config, torch.device("cpu"), nn.Module()
            )


@pytest.mark.parametrize("info", [{}, {"version": 1}, {"version": -1, "host": "h", "port": 1}])
def test_wrong_update_info_names_what_is_wrong(info: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"version|Invalid update_info"):
        backend_of(FusedModel(checkpoint(0))).update_weights(info)


def test_a_layer_is_packed_when_first_used_and_again_when_it_changed() -> None:
    packings: list[float] = []

    def pack(layer: Any, remove_weight: bool) -> None:
        assert not remove_weight
        copy = layer.weight.detach().clone()
        packings.append(float(copy[0, 0]))
        layer.cpu_linear = lambda x, weight, bias: x @ copy.t()

    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    used: Any = model[0]
    for layer in model:
        layer.cpu_linear = PackedLinear(layer, pack)
    assert packings == []
    x = torch.ones(1, 2)
    assert torch.allclose(used.cpu_linear(x, None, None), used(x))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(3.0)
    assert pack_again(model, set()) == 0
    storages = {layer.weight.untyped_storage().data_ptr() for layer in model}
    assert pack_again(model, storages) == 2
    assert packings[1:] == [3.0]
    assert torch.allclose(used.cpu_linear(x, None, None), torch.full((1, 2), 6.0))
