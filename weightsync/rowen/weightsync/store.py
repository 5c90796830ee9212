"""The versions that a publisher holds, and the deltas it can make from them.

Knows nothing of transport.  Holds the newest weights, the anchor (version 0; a tensor that never
changed is held once), and the deltas of the last ``retained_versions`` versions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from rowen.weightsync.codec import MAXIMUM_ELEMENTS, Index
from rowen.weightsync.delta import Manifest, Section, seal, unseal
from rowen.weightsync.elements import Elements, changed_positions, digest_of
from rowen.weightsync.errors import (
    BaseUnknownError,
    ReplayError,
    UnsupportedTensorError,
    VersionOrderError,
    VersionUnknownError,
)
from rowen.weightsync.merge import changed_section, merge, whole_section
from rowen.weightsync.versions import (
    ITEM_BYTES,
    Catalogue,
    Have,
    Link,
    TensorState,
    chain_hash,
    root_hash,
    state_hash,
)

RETAINED_VERSIONS: Final = 32
"""Deltas kept by default; at 0.5 % density together about a tenth of the model's size."""

MADE_FRAMES: Final = 2
"""Merged or full copies kept until the next version, for several receivers that ask alike."""

DENSE_RATIO: Final = 0.5
"""Above this share of changed elements their positions cost more than they save."""


@dataclass(frozen=True, slots=True)
class NamedElements:
    """A tensor as the store takes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: Elements

    def state(self) -> TensorState:
        """Hash the elements.

        Raises:
            UnsupportedTensorError: unknown dtype or more than 2^32 - 1 elements.
        """
        if self.dtype not in ITEM_BYTES or self.elements.size > MAXIMUM_ELEMENTS:
            raise UnsupportedTensorError(
                f"tensor {self.name!r} is {self.dtype}{list(self.shape)}; publish at most "
                f"{MAXIMUM_ELEMENTS} elements of one of {', '.join(sorted(ITEM_BYTES))}"
            )
        digest = digest_of(self.elements)
        return TensorState(name=self.name, shape=self.shape, dtype=self.dtype, xxh3_128=digest)


@dataclass(frozen=True, slots=True)
class Step:
    """One published version: where it leads on from, its tensors, and its delta."""

    base: Have
    have: Have
    link: Link
    base_tensors: Mapping[str, TensorState]
    tensors: Mapping[str, TensorState]
    manifest: Manifest
    frame: bytes
    changed: int
    """Elements whose bits differ from the version before."""


@dataclass(slots=True)
class _Pending:
    """A version that is being encoded and not yet committed."""

    tensors: dict[str, TensorState]
    seen: set[str] = field(default_factory=set)
    sections: list[Section] = field(default_factory=list)
    writes: list[tuple[str, Index, Elements]] = field(default_factory=list)


class VersionStore:
    """All versions of one model that can still be handed out.  Thread-safe."""

    def __init__(
        self,
        model_id: str,
        initial: Iterable[NamedElements],
        *,
        retained_versions: int = RETAINED_VERSIONS,
    ) -> None:
        """Take version 0, whose elements are copied.

        Raises:
            UnsupportedTensorError: a tensor cannot be published or a name occurs twice.
        """
        self._publishing = threading.Lock()  # one publish at a time, held while it encodes
        self._data = threading.RLock()  # the fields below, held while they change or are read
        self._newest_elements: dict[str, Elements] = {}
        states: list[TensorState] = []
        for item in initial:
            if item.name in self._newest_elements:
                raise UnsupportedTensorError(f"tensor {item.name!r} is given twice; once is enough")
            self._newest_elements[item.name] = item.elements.copy()
            states.append(item.state())
        self._anchor_elements = dict(self._newest_elements)
        self._retained_versions = retained_versions
        self._steps: OrderedDict[int, Step] = OrderedDict()
        self._made: OrderedDict[tuple[int | None, int], bytes] = OrderedDict()
        self.catalogue: Final = Catalogue.of(model_id, states)
        self._links: list[Link] = [self.catalogue.link]
        self._newest = Have(version=0, chain=self.catalogue.chain)
        self._tensors: Mapping[str, TensorState] = self.catalogue.indexed()
        self.full_bytes: Final = sum(each.nbytes for each in self._newest_elements.values())

    @property
    def newest(self) -> Have:
        """The newest version."""
        return self._newest

    def publish(self, named: Iterable[NamedElements], version: int) -> Step:
        """Encode the step from the newest version to these weights and make it the newest.

        Args:
            named: all tensors of version 0 with the same shapes and dtypes, in any order; read
                once, one at a time.
            version: larger than the newest.

        Raises:
            VersionOrderError: ``version`` is not larger than the newest one.
            UnsupportedTensorError: a tensor is missing, unknown, given twice or of another form.
            After either (and after any error of the iterable) the newest version is what it was.
        """
        with self._publishing:
            base = self._newest
            if version <= base.version:
                raise VersionOrderError(
                    f"version {version} is not newer than version {base.version}; count up"
                )
            pending = _Pending(dict(self._tensors))
            for item in named:
                self._encode(item, pending)
            missing = sorted(self._tensors.keys() - pending.seen)
            if missing:
                raise UnsupportedTensorError(
                    f"version {version} lacks {len(missing)} tensors of version 0, as "
                    f"{missing[0]!r}; pass all of them"
                )
            link = Link(version=version, state=state_hash(pending.tensors.values()))
            chain = chain_hash(base.chain, [link])
            sections = sorted(pending.sections, key=lambda each: each.result.name)
            manifest, frame = self._seal(base, [link], chain, sections)
            step = Step(
                base=base,
                have=Have(version=version, chain=chain),
                link=link,
                base_tensors=self._tensors,
                tensors=pending.tensors,
                manifest=manifest,
                frame=frame,
                changed=sum(int(index.size) for _, index, _ in pending.writes),
            )
            self._commit(step, pending.writes)
            return step

    def frame(self, have: Have | None, want: int) -> bytes | None:
        """The bytes that lead a receiver from what it has to the wanted version.

        Args:
            have: what the receiver verified, or None for a full copy (of the newest version only).
            want: a version number.

        Returns:
            A delta, or None when the receiver has it already.

        Raises:
            VersionUnknownError: not published yet, never published, or no longer reachable.
            BaseUnknownError: ``have`` is of another chain or older than the retained versions.
            ReplayError: ``want`` is older than ``have``.
        """
        with self._data:
            if want > self._newest.version:
                raise VersionUnknownError(
                    f"version {want} is not published; the newest is {self._newest.version}"
                )
            if have is None:
                return self._full(want)
            if not self._knows(have):
                raise BaseUnknownError(
                    f"version {have.version} of chain {have.chain[:12]} is unknown here or dropped;"
                    " fetch a full copy"
                )
            if want < have.version:
                raise ReplayError(f"version {want} is older than version {have.version} held there")
            return None if want == have.version else self._lead(have, want)

    def _encode(self, item: NamedElements, pending: _Pending) -> None:
        known = self._tensors.get(item.name)
        if known is None or (known.shape, known.dtype) != (item.shape, item.dtype):
            form = "absent" if known is None else f"{known.dtype}{list(known.shape)}"
            raise UnsupportedTensorError(
                f"tensor {item.name!r} is {item.dtype}{list(item.shape)} and was {form} in version "
                "0; publish the same names, shapes and dtypes"
            )
        if item.name in pending.seen:
            raise UnsupportedTensorError(f"tensor {item.name!r} is given twice; once is enough")
        pending.seen.add(item.name)
        old = self._newest_elements[item.name]
        index = changed_positions(old, item.elements)
        if not index.size:
            return
        values = item.elements[index]
        result = item.state()
        pending.tensors[item.name] = result
        pending.writes.append((item.name, index, values))
        if index.size > DENSE_RATIO * old.size:
            pending.sections.append(whole_section(result, item.elements))
        else:
            pending.sections.append(changed_section(result, index, old[index], values))

    def _commit(self, step: Step, writes: Sequence[tuple[str, Index, Elements]]) -> None:
        with self._data:
            for name, _, _ in writes:
                if self._newest_elements[name] is self._anchor_elements[name]:
                    self._newest_elements[name] = self._newest_elements[name].copy()
            for name, index, values in writes:
                self._newest_elements[name][index] = values
            self._steps[step.have.version] = step
            while len(self._steps) > self._retained_versions:
                self._steps.popitem(last=False)
            self._made.clear()
            self._links.append(step.link)
            self._tensors = step.tensors
            self._newest = step.have

    def _seal(
        self, base: Have | None, links: Sequence[Link], chain: str, sections: Sequence[Section]
    ) -> tuple[Manifest, bytes]:
        return seal(
            model_id=self.catalogue.model_id,
            base_version=None if base is None else base.version,
            base_chain=None if base is None else base.chain,
            links=links,
            chain=chain,
            sections=sections,
        )

    def _knows(self, have: Have) -> bool:
        anchor = Have(version=0, chain=self.catalogue.chain)
        return have == anchor or any(
            have in (step.base, step.have) for step in self._steps.values()
        )

    def _lead(self, have: Have, want: int) -> bytes:
        steps = self._steps_between(have, want)
        if len(steps) == 1:
            return steps[0].frame
        key = (have.version, want)
        if key not in self._made:
            if have.version == 0 and want == self._newest.version:
                self._keep(key, self._from_anchor(have))
            elif steps:
                self._keep(key, self._merged(steps))
            else:
                raise VersionUnknownError(
                    f"version {want} cannot be reached from {have.version} any more; the newest is "
                    f"{self._newest.version}"
                )
        return self._made[key]

    def _steps_between(self, have: Have, want: int) -> list[Step]:
        """The retained steps that lead from ``have`` to ``want``; empty when one is missing."""
        steps = [step for version, step in self._steps.items() if have.version < version <= want]
        complete = steps and steps[0].base == have and steps[-1].have.version == want
        return steps if complete else []

    def _merged(self, steps: Sequence[Step]) -> bytes:
        first, last = steps[0], steps[-1]
        sections = merge([unseal(step.frame) for step in steps], first.base_tensors, last.tensors)
        links = [step.link for step in steps]
        return self._seal(first.base, links, last.have.chain, sections)[1]

    def _from_anchor(self, anchor: Have) -> bytes:
        sections: list[Section] = []
        for name, result in sorted(self._tensors.items()):
            old, new = self._anchor_elements[name], self._newest_elements[name]
            index = changed_positions(old, new) if old is not new else None
            if index is None or not index.size:
                continue
            if index.size > DENSE_RATIO * old.size:
                sections.append(whole_section(result, new))
            else:
                sections.append(changed_section(result, index, old[index], new[index]))
        return self._seal(anchor, self._links[1:], self._newest.chain, sections)[1]

    def _full(self, want: int) -> bytes:
        if want != self._newest.version:
            raise VersionUnknownError(
                f"version {want} is no longer held as a whole; fetch version {self._newest.version}"
            )
        key = (None, want)
        if key not in self._made:
            sections = [
                whole_section(result, self._newest_elements[name])
                for name, result in sorted(self._tensors.items())
            ]
            chain = chain_hash(root_hash(self.catalogue.model_id), self._links)
            self._keep(key, self._seal(None, self._links, chain, sections)[1])
        return self._made[key]

    def _keep(self, key: tuple[int | None, int], frame: bytes) -> None:
        self._made[key] = frame
        while len(self._made) > MADE_FRAMES:
            self._made.popitem(last=False)
