"""Write one HTML file that shows a run: the numbers on top, then plots; it loads nothing.

python -m rowen.bench.report RESULT.json SERIES.json REPORT.html
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rowen.bench.errors import BenchError, RequestsError
from rowen.bench.latency import compare
from rowen.bench.plots import distribution_svg, timeline_svg
from rowen.bench.series import Series, read_series

_LATENCY_ROWS = (
    ("ttft_p50_ms", "TTFT P50", "ttft_p50"),
    ("ttft_p99_ms", "TTFT P99", "ttft_p99"),
    ("tpot_p50_ms", "TPOT P50", "tpot_p50"),
    ("tpot_p99_ms", "TPOT P99", "tpot_p99"),
)
_SECTIONS = (
    ("rollout", "Rollouts"),
    ("gate", "Gate"),
    ("weights", "Weights"),
    ("rl", "Training"),
)
_UNIT = re.compile(r"_(ms|us|s|bytes|tokens)(?=_|$)")
"""The unit inside a name, such as ``close_to_idle_ms_p99``."""

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f7f9; color: #1f2933;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 10px; }
p.lead { margin: 0 0 20px; color: #52606d; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, section { background: white; border: 1px solid #e4e7eb; border-radius: 8px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 21px; line-height: 1.3; white-space: nowrap; }
.tile span { color: #52606d; font-size: 13px; }
section { margin-top: 16px; padding: 16px 18px; overflow-x: auto; }
.columns { display: grid; gap: 0 28px;
  grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #eef1f4;
  font-weight: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
thead th { color: #52606d; font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif !important; }
ol, ul { margin: 8px 0 0; padding-left: 22px; } summary { cursor: pointer; color: #52606d; }
"""


def write_report(path: Path, result: Mapping[str, Any], series: Series) -> None:
    """Render and write the report; an existing file is replaced."""
    path.write_text(render(result, series), encoding="utf-8")


def render(result: Mapping[str, Any], series: Series) -> str:
    """Return the HTML of a run.

    ``result`` is the content of ``result.json``: sections ``serving_alone``, ``serving_harvested``,
    ``rollout``, ``weights``, ``rl``, ``gate``, ``scale``, each optional.  Ratios are taken from
    ``result["ratios"]`` (see ``latency.compare``) or computed from the records.
    """
    ratios = result.get("ratios") or compare(series.alone, series.harvested)
    parts = [
        "<h1>Rowen: what was harvested, and what serving felt</h1>",
        f'<p class="lead">{escape(_lead(result))}</p>',
        _tiles(result, ratios),
        _latency_table(result, ratios, series),
        _sections(result),
        f"<section><h2>Over time</h2>{timeline_svg(series)}{_events(series)}</section>",
        f"<section><h2>Distribution of serving latency</h2>{distribution_svg(series)}</section>",
        _scale(result.get("scale") or {}),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Rowen: report of a run</title><style>{_CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _lead(result: Mapping[str, Any]) -> str:
    scale = result.get("scale") or {}
    if not scale:
        return "Serving with harvest, compared with the same requests served alone."
    return (
        f"{scale.get('requests', 0)} requests from {scale.get('source', 'a trace')}, served alone "
        "and then again while rollouts took the idle compute beside them."
    )


def _tiles(result: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    tiles = [
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in _headline(result, ratios)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _headline(result: Mapping[str, Any], ratios: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the few numbers that say whether the run did its job; missing ones are left out."""
    for name, label in (("ttft_p99", "P99 TTFT over alone"), ("tpot_p99", "P99 TPOT over alone")):
        interval = ratios.get(name)
        if interval:
            yield f"× {interval['ratio']:.2f}", f"{label} ({_interval(interval)})"
    rollout = result.get("rollout") or {}
    if rollout.get("tokens_per_s") is not None and rollout.get("tokens_per_s_alone"):
        kept = rollout["tokens_per_s"] / rollout["tokens_per_s_alone"]
        yield f"{kept:.0%}", "of the rollout tokens/s that the engines make alone"
    if rollout.get("lost") is not None:
        yield f"{rollout['lost']}", f"lost of {rollout.get('trajectories', '?')} trajectories"
    weights = result.get("weights") or {}
    if weights.get("full_bytes") and weights.get("delta_bytes"):
        yield f"1 / {weights['full_bytes'] / weights['delta_bytes']:.0f}", "size of a weight delta"
    rl = result.get("rl") or {}
    if rl.get("reward_first") is not None and rl.get("reward_last") is not None:
        yield (
            f"{rl['reward_first']:.2f} → {rl['reward_last']:.2f}",
            f"reward over {rl.get('steps', '?')} steps",
        )


def _interval(interval: Mapping[str, Any]) -> str:
    return f"{interval['confidence_ratio']:.0%}: {interval['low']:.2f} to {interval['high']:.2f}"


def _latency_table(result: Mapping[str, Any], ratios: Mapping[str, Any], series: Series) -> str:
    alone = result.get("serving_alone") or {}
    harvested = result.get("serving_harvested") or {}
    slo = {"ttft_p99_ms": series.slo_ttft_ms, "tpot_p99_ms": series.slo_tpot_ms}
    rows = [
        (label, _number(alone.get(key)), _number(harvested.get(key)), "", "")
        for key, label in (
            ("requests", "requests answered"),
            ("failed", "requests failed"),
            ("unfinished", "requests unfinished"),
        )
    ]
    for key, label, ratio_name in _LATENCY_ROWS:
        interval = ratios.get(ratio_name)
        ratio = f"{interval['ratio']:.3f} ({_interval(interval)})" if interval else "–"
        objective = slo.get(key)
        rows.append(
            (
                f"{label}, ms",
                _number(alone.get(key)),
                _number(harvested.get(key)),
                ratio,
                f"{objective:g}" if objective is not None else "",
            )
        )
    head = ("", "alone", "with harvest", "ratio and its bootstrap interval", "objective")
    return f"<section><h2>Serving latency</h2>{_table(head, rows)}</section>"


def _sections(result: Mapping[str, Any]) -> str:
    blocks = []
    for key, title in _SECTIONS:
        values = result.get(key)
        if isinstance(values, Mapping) and values:
            blocks.append(f"<div><h2>{title}</h2>{_table((), _value_rows(values))}</div>")
    return f'<section><div class="columns">{"".join(blocks)}</div></section>' if blocks else ""


def _scale(scale: Mapping[str, Any]) -> str:
    if not scale:
        return ""
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in scale.get("notes") or ())
    table = _table((), _value_rows({key: scale[key] for key in scale if key != "notes"}))
    return (
        "<section><h2>How the traffic was scaled to this machine</h2>"
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<details><summary>all factors and counts</summary>{table}</details></section>"
    )


def _events(series: Series) -> str:
    items = "".join(
        f"<li>{event.at_s:.1f} s: {escape(event.label)}</li>" for event in series.events
    )
    return f"<ol>{items}</ol>" if items else ""


def _value_rows(values: Mapping[str, Any]) -> list[Sequence[str]]:
    """Return (words, number with unit) for each value; the unit is taken from its name."""
    rows: list[Sequence[str]] = []
    for key, value in values.items():
        words = key.replace("per_s", "per second")
        found = _UNIT.search(words)
        unit = found.group(1) if found else ""
        words = _UNIT.sub("", words, count=1).replace("_", " ")
        if unit == "bytes" and isinstance(value, int) and value >= 1_000_000:
            value, unit = value / 1e6, "MB"
        if value is None or isinstance(value, str):
            unit = ""
        rows.append((words, f"{_number(value)} {unit}".strip()))
    return rows


def _number(value: object) -> str:
    """Format a JSON value: integers with separators, other numbers with three digits that count."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return json.dumps(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f"<table>{top}<tbody>{body}</tbody></table>"


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        print(
            "usage: python -m rowen.bench.report RESULT.json SERIES.json REPORT.html",
            file=sys.stderr,
        )
        return 2
    result_path, series_path, report_path = map(Path, arguments)
    try:
        try:
            result = json.loads(result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestsError(f"{result_path} is not a result ({error}); run the demo") from None
        write_report(report_path, result, read_series(series_path))
    except (BenchError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
