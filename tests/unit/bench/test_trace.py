from __future__ import annotations

from pathlib import Path

import pytest

from rowen.bench.errors import TraceError
from rowen.bench.trace import TraceFormat, TraceRequest, load_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_azure_lines_become_requests_with_seconds_from_the_first(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"{HEADER}\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n",
    )
    first, second = load_trace(path, "azure")
    assert first == TraceRequest(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert (second.input_tokens, second.output_tokens) == (396, 109)


@pytest.mark.parametrize(
    "text",
    [
        f"\ufeff{HEADER}\n0,5,6\n2,7,8\n",
        f"{HEADER}\n\n2,7,8\n   \n0,5,6",
        "timestamp;generated_tokens;context_tokens\n0;6;5\n2;8;7\n",
        "Timestamp\tContext Tokens\tGenerated Tokens\tModel\n0\t5\t6\ta\n2\t7\t8\tb\n",
        '"TIMESTAMP","ContextTokens","GeneratedTokens"\n"0","5.0","6"\n"2","7","8"\n',
        "0,5,6\n2,7,8\n",
        f"{HEADER}\n2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10 01:00:02.009930+01:00,7,8\n",
        f"{HEADER}\n2024-02-28T23:59:59,5,6\n2024-02-29T00:00:01,7,8\n",
    ],
    ids=["bom", "blank-unsorted", "semicolons", "tabs", "quoted", "no-header", "zones", "midnight"],
)
def test_variants_of_an_azure_file_read_alike(tmp_path: Path, text: str) -> None:
    assert load_trace(written(tmp_path, text), "azure") == [
        TraceRequest(0.0, 5, 6),
        TraceRequest(2.0, 7, 8),
    ]


def test_mooncake_lines_become_requests_with_prefix_blocks(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"timestamp": 4500, "input_length": 0, "output_length": 0}\r\n\r\n'
        '{"timestamp": 1500, "input_length": 900, "output_length": 52, "hash_ids": [0, 7]}\r\n',
    )
    assert load_trace(path, "mooncake") == [
        TraceRequest(0.0, 900, 52, (0, 7)),
        TraceRequest(3.0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("format", "text", "parts"),
    [
        ("azure", f"{HEADER}\n0,5,6\n1,x,6\n", ["line 3", "ContextTokens", "'x'", "whole number"]),
        ("azure", f"{HEADER}\n0,5,-1\n", ["line 2", "GeneratedTokens", "'-1'", "0 or more"]),
        ("azure", f"{HEADER}\n0,5.5,1\n", ["line 2", "ContextTokens", "'5.5'"]),
        ("azure", f"{HEADER}\n0,nan,1\n", ["line 2", "ContextTokens", "'nan'"]),
        ("azure", f"{HEADER}\nnoon,5,1\n", ["line 2", "TIMESTAMP", "'noon'", "2023-11-16"]),
        ("azure", f"{HEADER}\n0,5\n", ["line 2", "2 fields", "3 are needed"]),
        ("azure", f"{HEADER}\n0,5,6\n2023-11-16 18:15:46,5,6\n", ["line 3", "one kind of time"]),
        ("azure", "a,b,c\n", ["line 1", "TIMESTAMP", "'a,b,c'"]),
        ("azure", "TIMESTAMP,ContextTokens\n", ["line 1", "GeneratedTokens"]),
        ("azure", '{"timestamp": 0}\n', ["line 1", "format mooncake"]),
        ("azure", f"{HEADER}\n\n", ["no requests"]),
        ("azure", b"\x1f\x8b\x08\x00", ["byte 1", "unpack"]),
        ("mooncake", "", ["no requests"]),
        ("mooncake", f"{HEADER}\n", ["line 1", "format azure"]),
        ("mooncake", '{"timestamp": 0, "input', ["line 1", "repair"]),
        ("mooncake", "[1]\n", ["line 1", "not a JSON object"]),
        ("mooncake", '{"timestamp": 0, "input_length": 4}\n', ["line 1", "output_length"]),
        (
            "mooncake",
            '{"timestamp": true, "input_length": 4, "output_length": 1}',
            ["timestamp", "True", "milliseconds"],
        ),
        (
            "mooncake",
            '{"timestamp": NaN, "input_length": 4, "output_length": 1}',
            ["timestamp", "nan"],
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 1e99, "output_length": 1}',
            ["input_length", "1e+99"],
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 4, "output_length": null}',
            ["output_length", "None"],
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": ["a"]}',
            ["hash_ids", "a", "whole numbers"],
        ),
    ],
)
def test_a_wrong_line_is_named_with_field_value_and_remedy(
    tmp_path: Path, format: TraceFormat, text: str | bytes, parts: list[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        load_trace(path, format)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        load_trace(tmp_path / "absent", "azure")
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(tmp_path, "azure")


def test_an_unknown_format_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="'sharegpt' is unknown; use azure or mooncake"):
        load_trace(tmp_path, "sharegpt")  # type: ignore[arg-type]  # the mistake under test
