"""What the daemon sees: kill switch, lane, metrics, and what it makes of their absence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rowen.daemon.histogram import MetricsError
from rowen.daemon.link import LaneLink
from rowen.daemon.observe import Observer, stricter
from rowen.daemon.scrape import TPOT_METRIC, TTFT_METRIC, Scraper
from rowen.executor.lane import Lane, LaneError, ProbeReading
from rowen.policies.guard import ObjectiveReading
from rowen.policies.load import library_policy, load_policy
from rowen.policies.schema import Mode

SECOND_NS = 1_000_000_000


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LaneLink]:
    link = LaneLink(tmp_path / "lane")
    yield link
    link.close()


@pytest.fixture
def scraper() -> Scraper:
    objectives = load_policy(library_policy("demo")).spec.objectives
    return Scraper("http://127.0.0.1:1/metrics", objectives)


def metrics_page(fast: int, slow: int) -> str:
    lines = []
    for name in (TTFT_METRIC, TPOT_METRIC):
        for edge, count in (("0.1", fast), ("2.0", fast + slow), ("+Inf", fast + slow)):
            lines.append(f'{name}_bucket{{engine="0",le="{edge}"}} {count}')
    return "\n".join(lines)


def test_on_a_fresh_node_everything_is_unknown_but_memory_and_switch(
    link: LaneLink, scraper: Scraper, tmp_path: Path
) -> None:
    seen = Observer(link, scraper, tmp_path / "kill").look()
    assert seen.kill_switch is False
    assert seen.available_memory_bytes is not None
    guard_seen = seen.for_guard(100.0, Mode.ENFORCE)
    assert guard_seen.probe_age_ms is None
    assert guard_seen.metrics_age_ms is None
    assert guard_seen.ttft is None


def test_the_kill_switch_is_any_entry_of_that_name(
    link: LaneLink, scraper: Scraper, tmp_path: Path
) -> None:
    observer = Observer(link, scraper, tmp_path / "kill")
    (tmp_path / "kill").symlink_to(tmp_path / "nowhere")
    assert observer.look().kill_switch is True
    (tmp_path / "kill").unlink()
    assert observer.look().kill_switch is False
    (tmp_path / "kill").mkdir()
    assert observer.look().kill_switch is True


def test_a_kill_switch_whose_folder_is_gone_is_unknown(
    link: LaneLink, scraper: Scraper, tmp_path: Path
) -> None:
    seen = Observer(link, scraper, tmp_path / "gone" / "kill").look()
    assert seen.kill_switch is None
    assert "is gone" in seen.problems["kill_switch"]


def test_ages_come_from_the_heartbeats(link: LaneLink, scraper: Scraper, tmp_path: Path) -> None:
    now_ns = time.monotonic_ns()
    probe = Lane.open(tmp_path / "lane", role="probe")
    probe.write_probe(ProbeReading(now_ns - SECOND_NS, 1, 2, 0.0, 0, 0.5, 0, 0.0, 9, 9))
    observer = Observer(link, scraper, tmp_path / "kill", clock=lambda: now_ns)
    seen = observer.look()
    probe.close()
    assert seen.probe_age_ms == 1000
    assert seen.probe is not None
    assert seen.probe.is_busy


@pytest.mark.parametrize("damage", [b"", b"RO", b"\0" * 840, b"x" * 4096])
def test_a_damaged_lane_is_no_reading_and_the_next_write_replaces_it(
    link: LaneLink, scraper: Scraper, tmp_path: Path, damage: bytes
) -> None:
    observer = Observer(link, scraper, tmp_path / "kill")
    (tmp_path / "lane").write_bytes(damage)
    seen = observer.look()
    assert seen.probe is None
    assert "probe" in seen.problems
    link.write(is_open=False, sequence_cap=0, epoch=1)
    reader = Lane.open(tmp_path / "lane", role="reader")
    assert reader.read_daemon().heartbeat_ns > 0
    reader.close()
    assert link.problem is None


def test_a_foreign_file_in_its_place_is_left_alone_and_the_daemon_stays_silent(
    link: LaneLink, tmp_path: Path
) -> None:
    (tmp_path / "lane").unlink()
    (tmp_path / "lane").write_text("somebody's notes", encoding="utf-8")
    link.write(is_open=True, sequence_cap=3, epoch=1)
    assert (tmp_path / "lane").read_text(encoding="utf-8") == "somebody's notes"
    assert link.problem is not None


def test_a_deleted_lane_is_made_again_by_the_next_write(link: LaneLink, tmp_path: Path) -> None:
    (tmp_path / "lane").unlink()
    link.write(is_open=True, sequence_cap=3, epoch=1)
    reader = Lane.open(tmp_path / "lane", role="reader")
    assert reader.read_daemon().sequence_cap == 3
    reader.close()


def test_a_second_daemon_on_one_lane_is_refused(link: LaneLink, tmp_path: Path) -> None:
    with pytest.raises(LaneError, match="already has a living daemon"):
        LaneLink(tmp_path / "lane")


def test_metrics_become_percentiles_over_the_window(scraper: Scraper) -> None:
    scraper.take(metrics_page(0, 0), 1 * SECOND_NS)
    scraper.take(metrics_page(98, 2), 2 * SECOND_NS)
    assert scraper.reading is not None
    assert scraper.reading.read_at_ns == 2 * SECOND_NS
    assert scraper.reading.ttft == ObjectiveReading(pytest.approx(1050), 100)


def test_a_lying_page_changes_nothing_in_the_windows(scraper: Scraper) -> None:
    scraper.take(metrics_page(0, 0), 1 * SECOND_NS)
    with pytest.raises(MetricsError):
        scraper.take(metrics_page(5, -9), 2 * SECOND_NS)
    scraper.take(metrics_page(1, 0), 3 * SECOND_NS)
    assert scraper.reading is not None
    assert scraper.reading.tpot == ObjectiveReading(pytest.approx(99), 1)


def test_the_stricter_mode_holds() -> None:
    assert stricter(Mode.ENFORCE, Mode.OFF) is Mode.OFF
    assert stricter(Mode.PREVIEW, Mode.ENFORCE) is Mode.PREVIEW


def test_the_clock_is_read_after_the_lane(link: LaneLink, scraper: Scraper, tmp_path: Path) -> None:
    """Else a heartbeat that comes in between has a negative age, which closes the gate."""
    probe = Lane.open(tmp_path / "lane", role="probe")
    beats = 0

    def clock() -> int:
        nonlocal beats
        beats += 1
        now_ns = time.monotonic_ns()
        probe.write_probe(ProbeReading(now_ns, 0, 0, 0.0, 0, 0.0, 0, 0.0, beats, 1))
        return now_ns

    observer = Observer(link, scraper, tmp_path / "kill", clock=clock)
    observer.look()
    for _ in range(5):
        before = beats
        seen = observer.look()
        assert seen.probe is not None
        assert seen.probe.steps_total == before  # what the clock wrote had not been read
        assert seen.probe_age_ms is not None
        assert seen.probe_age_ms >= 0
    probe.close()
