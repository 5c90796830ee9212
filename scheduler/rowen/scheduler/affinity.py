"""Remembers where a trajectory's last turn and the samples of a group ran.

The prefix cache of an engine does not outlive its process or its weights, so an entry counts only
for the same fencing epoch and weight version.
"""

from __future__ import annotations

from collections import OrderedDict

from rowen.scheduler.engine import Engine

KEPT = 8192
"""Entries per kind, the least recently used going first; about 2 MB."""

PLACES_PER_GROUP = 64
"""Engines per group, the longest unused going first; a group is rarely on more."""

Place = tuple[str, int, int]
"""Engine id, fencing epoch, weight version."""


class AffinityMemory:
    """Bounded; losing an entry costs a prefill, nothing else."""

    def __init__(self) -> None:
        self._by_trajectory: OrderedDict[str, Place] = OrderedDict()
        self._by_group: OrderedDict[str, dict[str, Place]] = OrderedDict()

    def note(self, engine: Engine, version: int, trajectory: str | None, group: str | None) -> None:
        """A request of this trajectory and group was sent to the engine."""
        place = (engine.engine_id, engine.epoch, version)
        if trajectory is not None:
            self._by_trajectory[trajectory] = place
            self._by_trajectory.move_to_end(trajectory)
            if len(self._by_trajectory) > KEPT:
                self._by_trajectory.popitem(last=False)
        if group is not None:
            places = self._by_group.setdefault(group, {})
            places.pop(engine.engine_id, None)
            places[engine.engine_id] = place
            if len(places) > PLACES_PER_GROUP:
                del places[next(iter(places))]
            self._by_group.move_to_end(group)
            if len(self._by_group) > KEPT:
                self._by_group.popitem(last=False)

    def of_trajectory(self, key: str | None, engines: dict[str, Engine]) -> str | None:
        place = self._by_trajectory.get(key) if key is not None else None
        return place[0] if place is not None and _is_current(place, engines) else None

    def of_group(self, key: str | None, engines: dict[str, Engine]) -> frozenset[str]:
        places = self._by_group.get(key, {}) if key is not None else {}
        return frozenset(place[0] for place in places.values() if _is_current(place, engines))


def _is_current(place: Place, engines: dict[str, Engine]) -> bool:
    engine = engines.get(place[0])
    return engine is not None and (engine.epoch, engine.version) == place[1:]
