"""A receiver reaches the wanted version bit by bit, or refuses and keeps what it holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowen.weightsync.delta import Delta, Section, seal, unseal
from rowen.weightsync.elements import Elements, digest_of
from rowen.weightsync.errors import (
    BaseUnknownError,
    ChecksumError,
    MalformedDeltaError,
    ModelMismatchError,
    ReplayError,
    UnsupportedTensorError,
    VersionOrderError,
    VersionUnknownError,
    WeightSyncError,
    WrongBaseError,
)
from rowen.weightsync.receive import Holding, check_base, check_result, decode
from rowen.weightsync.store import NamedElements, VersionStore
from rowen.weightsync.versions import Have

Model = dict[str, Elements]

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (64, 16),
    "layer.0.weight": (16, 48),
    "layer.1.weight": (48, 16),
    "norm.weight": (16,),
    "scale": (),
    "unused.bias": (0,),
}


def random_model(seed: int) -> Model:
    random = np.random.default_rng(seed)
    return {
        name: random.integers(0, 2**16, int(np.prod(shape)), dtype=np.uint16)
        for name, shape in SHAPES.items()
    }


def nudged(model: Model, seed: int, density: float = 0.05) -> Model:
    """A copy in which some elements differ by one unit in the last place."""
    random = np.random.default_rng(seed)
    return {
        name: elements + (random.random(elements.size) < density).astype(np.uint16)
        for name, elements in model.items()
    }


def named(model: Model) -> list[NamedElements]:
    return [
        NamedElements(name, SHAPES[name], "bfloat16", elements) for name, elements in model.items()
    ]


def chain(
    versions: int, *, retained_versions: int = 32, density: float = 0.05
) -> tuple[VersionStore, list[Model]]:
    """A store with versions 0 to ``versions``, and what each of them is."""
    models = [random_model(1)]
    store = VersionStore("test", named(models[0]), retained_versions=retained_versions)
    for version in range(1, versions + 1):
        models.append(nudged(models[-1], seed=version, density=density))
        store.publish(named(models[-1]), version)
    return store, models


class Replica:
    """A receiver over plain arrays: what an engine does, without an engine."""

    def __init__(self, model: Model, holding: Holding | None) -> None:
        self.model = {name: elements.copy() for name, elements in model.items()}
        self.holding = holding

    @property
    def have(self) -> Have | None:
        return None if self.holding is None else self.holding.have

    def take(self, frame: bytes | bytearray | None) -> Delta:
        assert frame is not None
        delta = unseal(frame)
        after = check_base(delta.manifest, self.holding)
        written = {name: elements.copy() for name, elements in self.model.items()}
        for update in decode(delta, lambda name, index_N: self.model[name][index_N]):
            target = written[update.result.name]
            target[slice(None) if update.index_N is None else update.index_N] = update.value_N
            check_result(update.result, digest_of(target))
        self.model, self.holding = written, after
        return delta

    def equals(self, model: Model) -> bool:
        return all(np.array_equal(self.model[name], model[name]) for name in SHAPES)


def at_start(store: VersionStore, model: Model) -> Replica:
    return Replica(model, Holding.of(store.catalogue))


def test_a_receiver_follows_step_by_step() -> None:
    store, models = chain(4)
    replica = at_start(store, models[0])
    for version in range(1, 5):
        replica.take(store.frame(replica.have, version))
        assert replica.equals(models[version])
    assert replica.have == store.newest
    assert store.frame(replica.have, 4) is None


@pytest.mark.parametrize("density", [0.05, 0.9])
@pytest.mark.parametrize(("have", "want"), [(0, 5), (0, 3), (2, 5), (1, 4), (3, 5)])
def test_a_receiver_that_is_behind_gets_there_in_one_step(
    have: int, want: int, density: float
) -> None:
    store, models = chain(5, density=density)
    replica = at_start(store, models[0])
    if have:
        replica.take(store.frame(replica.have, have))
    delta = replica.take(store.frame(replica.have, want))
    assert (delta.manifest.base_version, delta.manifest.version) == (have, want)
    assert replica.equals(models[want])


def test_all_ways_lead_to_the_same_chain_hash() -> None:
    store, models = chain(3)
    by_steps, merged, full = (at_start(store, models[0]) for _ in range(3))
    for version in (1, 2, 3):
        by_steps.take(store.frame(by_steps.have, version))
    merged.take(store.frame(merged.have, 3))
    full.take(store.frame(None, 3))
    assert by_steps.have == merged.have == full.have == store.newest


def test_a_merged_delta_is_smaller_than_its_steps() -> None:
    store, models = chain(8)
    start = at_start(store, models[0]).have
    steps = [store.frame(Have(version=0, chain=store.catalogue.chain), 1)]
    replica = at_start(store, models[0])
    for version in range(1, 9):
        frame = store.frame(replica.have, version)
        replica.take(frame)
        steps.append(frame)
    assert len(store.frame(start, 8) or b"") < sum(len(step or b"") for step in steps) / 2


def test_values_that_return_to_the_base_vanish_from_a_merged_delta() -> None:
    model = random_model(1)
    store = VersionStore("test", named(model))
    store.publish(named(nudged(model, seed=2)), 1)
    store.publish(named(model), 2)
    store.publish(named(model), 3)
    replica = at_start(store, model)
    for want in (2, 3):
        delta = at_start(store, model).take(store.frame(replica.have, want))
        assert delta.manifest.tensors == ()


def test_a_base_older_than_the_retained_versions_takes_a_full_copy() -> None:
    store, models = chain(6, retained_versions=2)
    late = at_start(store, models[0])
    behind = Replica(models[1], None)
    known, _ = chain(1)
    with pytest.raises(BaseUnknownError, match="full copy"):
        store.frame(known.newest, 6)
    with pytest.raises(VersionUnknownError, match="newest is 6"):
        store.frame(late.have, 3)
    with pytest.raises(VersionUnknownError, match="fetch version 6"):
        store.frame(None, 5)
    late.take(store.frame(late.have, 6))
    behind.take(store.frame(None, 6))
    assert late.equals(models[6])
    assert behind.equals(models[6])


def test_versions_only_go_forward() -> None:
    store, models = chain(2)
    with pytest.raises(VersionOrderError, match="version 2 is not newer than version 2"):
        store.publish(named(models[0]), 2)
    with pytest.raises(ReplayError):
        store.frame(store.newest, 1)
    with pytest.raises(VersionUnknownError, match="not published; the newest is 2"):
        store.frame(store.newest, 3)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda items: items[:-1], "lacks 1 tensors"),
        (lambda items: [*items, items[0]], "given twice"),
        (
            lambda items: [*items, NamedElements("new", (1,), "bfloat16", np.zeros(1, np.uint16))],
            "'new' is bfloat16\\[1\\] and was absent",
        ),
        (
            lambda items: [NamedElements("scale", (), "float16", items[4].elements), *items],
            "'scale' is float16\\[\\] and was bfloat16\\[\\]",
        ),
    ],
)
def test_a_version_of_another_form_is_refused_and_the_newest_stays(
    spoil: Callable[[list[NamedElements]], list[NamedElements]], sentence: str
) -> None:
    store, models = chain(1)
    before = store.newest
    with pytest.raises(UnsupportedTensorError, match=sentence):
        store.publish(spoil(named(nudged(models[1], seed=9))), 2)
    assert store.newest == before
    replica = at_start(store, models[0])
    replica.take(store.frame(replica.have, 1))
    assert replica.equals(models[1])
    store.publish(named(models[0]), 2)
    replica.take(store.frame(replica.have, 2))
    assert replica.equals(models[0])


def test_replayed_foreign_and_wrong_base_deltas_change_nothing() -> None:
    store, models = chain(3)
    start = at_start(store, models[0])
    first = store.frame(start.have, 1)
    start.take(first)
    second = store.frame(start.have, 2)
    with pytest.raises(ReplayError, match="version 1 is not newer than version 1"):
        start.take(first)
    third = store.frame(_have_after(second), 3)
    with pytest.raises(WrongBaseError, match="needs base 2"):
        start.take(third)
    foreign = VersionStore("other", named(models[0]))
    foreign.publish(named(models[1]), 1)
    foreign.publish(named(models[2]), 2)
    with pytest.raises(WrongBaseError):
        start.take(foreign.frame(Have(version=1, chain=foreign._steps[1].have.chain), 2))
    with pytest.raises(WrongBaseError, match="no base is verified"):
        Replica(models[0], None).take(first)
    assert start.equals(models[1])
    assert start.holding is not None
    assert start.holding.version == 1


def _have_after(frame: bytes | None) -> Have:
    manifest = unseal(frame or b"").manifest
    return Have(version=manifest.version, chain=manifest.chain)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_mutated_delta_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    store, models = chain(1)
    replica = at_start(store, models[0])
    frame = bytearray(store.frame(replica.have, 1) or b"")
    kind = data.draw(st.sampled_from(["flip", "cut", "append"]))
    if kind == "flip":
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
    else:
        frame += data.draw(st.binary(min_size=1, max_size=20))
    with pytest.raises((MalformedDeltaError, ChecksumError)):
        replica.take(frame)
    assert replica.equals(models[0])


def forged(store: VersionStore, changes: dict[str, object]) -> bytes:
    """A delta that is sound in itself but says something else than version 1."""
    step = store._steps[1]
    delta = unseal(step.frame)
    sections = [
        Section(
            tensor.result.model_copy(update=changes) if number == 0 else tensor.result,
            tensor.codec,
            tensor.changed,
            bytes(section),
        )
        for number, (tensor, section) in enumerate(delta.sections())
    ]
    return seal(
        model_id="test",
        base_version=0,
        base_chain=step.base.chain,
        links=[step.link],
        chain=step.have.chain,
        sections=sections,
    )[1]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"xxh3_128": "0" * 32}, ChecksumError),
        ({"name": "absent"}, ModelMismatchError),
        ({"dtype": "float16"}, ModelMismatchError),
        ({"shape": (16, 64)}, ModelMismatchError),
        ({"dtype": "complex256"}, MalformedDeltaError),
        ({"shape": (1,)}, MalformedDeltaError),
    ],
)
def test_a_forged_manifest_is_refused(
    changes: dict[str, object], error: type[WeightSyncError]
) -> None:
    store, models = chain(1)
    replica = at_start(store, models[0])
    replica.take(forged(store, {}))
    assert replica.equals(models[1])
    replica = at_start(store, models[0])
    with pytest.raises(error):
        replica.take(forged(store, changes))
    assert replica.equals(models[0])


def test_a_full_copy_that_lacks_a_tensor_is_refused() -> None:
    store, models = chain(1)
    smaller = VersionStore("test", named(models[0])[1:])
    with pytest.raises(ModelMismatchError, match="lacks 1 tensors"):
        at_start(store, models[0]).take(smaller.frame(None, 0))
