from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rowen.bench.errors import RequestsError
from rowen.bench.latency import summarise
from rowen.bench.records import ServingRecord
from rowen.bench.report import main, render
from rowen.bench.series import (
    EventPoint,
    GatePoint,
    RatePoint,
    Series,
    StepPoint,
    VersionPoint,
    read_series,
)


@pytest.fixture(scope="module")
def html() -> str:
    """The report of a run in which everything was recorded (drawn once: a second of work)."""
    return render(RESULT, SERIES)


def records(factor: float) -> list[ServingRecord]:
    return [
        ServingRecord(
            n, 0, n, n, 500 + n, 0.1, 9, 4, 4, factor * (50 + n), factor * (150 + n), 40, "ok"
        )
        for n in range(30)
    ]


SERIES = Series(
    duration_s=30,
    slo_ttft_ms=400,
    slo_tpot_ms=60,
    alone=records(1.0),
    harvested=records(1.02),
    gate=[GatePoint(0, True, "run"), GatePoint(5, False, "gate"), GatePoint(9, False, "drain")],
    rollout=[RatePoint(1, "beside", 80.0), RatePoint(1, "own", 100.0), RatePoint(2, "own", 90.0)],
    versions=[VersionPoint(0, "own", 0), VersionPoint(6, "own", 1), VersionPoint(7, "beside", 1)],
    steps=[StepPoint(6, 1, 0.2), StepPoint(12, 2, 0.4)],
    events=[EventPoint(8.0, "beside <killed> & back")],
)
RESULT = {
    "serving_alone": summarise(SERIES.alone).as_dict(),
    "serving_harvested": summarise(SERIES.harvested).as_dict(),
    "rollout": {"tokens_per_s": 50.0, "tokens_per_s_alone": 100.0, "trajectories": 9, "lost": 0},
    "weights": {
        "versions": 2,
        "full_bytes": 270_000_000,
        "delta_bytes": 1_000_000,
        "sync_s_p50": 0.4,
    },
    "rl": {"steps": 2, "reward_first": 0.2, "reward_last": 0.4},
    "gate": {"closings": 7, "close_to_idle_ms_p99": 3.21},
    "scale": {"source": "a<b", "requests": 30, "notes": ["few requests (30)"]},
}


class Page(HTMLParser):
    """Collects what would be loaded from elsewhere, the text, and ids; checks the nesting."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "circle", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_report_is_one_file_with_all_panels_and_numbers(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert page.loads == []
    for text in (
        "TTFT, ms", "TPOT, ms", "rollout tokens/s", "gate and rung", "weight version", "reward",
        "SLO 400 ms", "drain", "beside", "own", "× 1.02", "50%", "lost of 9 trajectories",
        "1 / 270", "0.20 → 0.40", "270 MB", "3.21 ms", "0.4 s", "few requests (30)",
    ):  # fmt: skip
        assert text in page.text


def test_what_was_given_as_text_is_escaped(html: str) -> None:
    assert "beside &lt;killed&gt; &amp; back" in html
    assert "a&lt;b" in html
    assert "<killed>" not in html


def test_clip_paths_of_the_two_drawings_do_not_collide(html: str) -> None:
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert clips
    assert len(clips) == len(set(clips))


def test_a_run_without_any_record_is_still_a_report() -> None:
    page = Page(render({}, Series(duration_s=70)))
    assert page.open == []
    assert page.text.count("nothing recorded") == 9
    assert "–" in page.text


def test_single_points_and_unknown_rungs_are_drawn() -> None:
    series = Series(
        duration_s=5,
        harvested=records(1.0)[:1],
        gate=[GatePoint(1, False, "SLEEP")],
        rollout=[RatePoint(0.0, "own", 3.0)],
        versions=[VersionPoint(9, "own", 0)],
        steps=[StepPoint(2, 1, 0.0)],
    )
    assert "SLEEP" in Page(render({}, series)).text


def test_failed_requests_are_marked() -> None:
    failed = ServingRecord(0, 0, 1, 1, 2, 0, 9, 4, 0, None, None, None, "error", "boom")
    series = Series(duration_s=5, harvested=[*records(1.0), failed])
    assert "failed" in Page(render({}, series)).text


def test_series_survive_their_file_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "series.json"
    SERIES.write(path)
    assert read_series(path) == SERIES
    path.write_text('{"duration_s": 1, "weather": []}')
    with pytest.raises(RequestsError, match="unknown field weather"):
        read_series(path)


def test_the_command_writes_the_file_and_refuses_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, series, report = (tmp_path / name for name in ("r.json", "s.json", "report.html"))
    assert main([]) == 2
    assert main([str(result), str(series), str(report)]) == 2
    assert "is not a result" in capsys.readouterr().err
    result.write_text(json.dumps(RESULT))
    SERIES.write(series)
    assert main([str(result), str(series), str(report)]) == 0
    assert report.read_text().startswith("<!doctype html>")
