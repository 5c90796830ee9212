from __future__ import annotations

from pathlib import Path

import pytest

from rowen.bench.errors import RequestsError
from rowen.bench.records import ServingRecord, read_records
from rowen.bench.requests_file import read_requests, write_requests
from rowen.bench.window import ReplayRequest

REQUESTS = [
    ReplayRequest(0.5, 30, 4, (7, 8), 10.0),
    ReplayRequest(1.5, 25, 5, (7, 9), 10.0),
    ReplayRequest(1.25, 8, 6),
]


def written(path: Path, seed: int = 1) -> Path:
    write_requests(path, REQUESTS, period_s=10, vocabulary=(100, 200), seed=seed)
    return path


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = read_requests(written(tmp_path / "r"))
    assert file.period_s == 10
    assert [(r.index, r.at_s, r.output_tokens) for r in file.requests] == [
        (0, 0.5, 4),
        (2, 1.25, 6),
        (1, 1.5, 5),
    ]
    assert [len(r.prompt_token_ids) for r in file.requests] == [30, 8, 25]
    assert all(100 <= token < 200 for r in file.requests for token in r.prompt_token_ids)


def test_equal_hashes_give_equal_blocks_and_other_prompts_differ(tmp_path: Path) -> None:
    first, alone, second = (
        r.prompt_token_ids for r in read_requests(written(tmp_path / "r")).requests
    )
    assert first[:10] == second[:10]
    assert first[10:20] != second[10:20]
    assert first[20:25] != second[20:25]
    assert alone != first[:8]


def test_a_seed_repeats_the_file_and_another_changes_it(tmp_path: Path) -> None:
    first = written(tmp_path / "a").read_bytes()
    assert written(tmp_path / "b").read_bytes() == first
    assert written(tmp_path / "c", seed=2).read_bytes() != first


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "line 1"),
        ('{"kind": "other"}\n', "not the header"),
        ('{"kind": "rowen.bench.requests/1", "period_s": 0}\n', "not the header"),
        ('{"kind": "rowen.bench.requests/1", "period_s": 5}\n', "no requests"),
        ('{"kind": "rowen.bench.requests/1", "period_s": 5}\n{"index": 0}\n', "line 2: at_s"),
        (
            '{"kind": "rowen.bench.requests/1", "period_s": 5}\n'
            '{"index": 0, "at_s": 1, "output_tokens": 0, "prompt_token_ids": [1]}\n',
            "line 2: output_tokens is 0",
        ),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "r"
    path.write_text(text)
    with pytest.raises(RequestsError, match=part):
        read_requests(path)


def test_an_empty_vocabulary_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RequestsError, match="vocabulary is 5 to 5"):
        write_requests(tmp_path / "r", REQUESTS, period_s=1, vocabulary=(5, 5), seed=1)
    assert not (tmp_path / "r").exists()


RECORD = ServingRecord(3, 1, 2.0, 2.001, 90.5, 1.0, 10, 4, 4, 80.0, 170.0, 31.0, "ok")


def test_records_survive_the_file_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text(RECORD.as_line() + RECORD.as_line()[:40])
    assert read_records(path) == [RECORD]


def test_a_wrong_record_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text('{"index": 1}\n' + RECORD.as_line())
    with pytest.raises(RequestsError, match="line 1: not a serving record"):
        read_records(path)
    with pytest.raises(RequestsError, match="cannot be read"):
        read_records(tmp_path / "absent")
