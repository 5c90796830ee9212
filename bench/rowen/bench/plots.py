"""Draw the series of a run as SVG: a timeline of panels over the same seconds, and a distribution.

Drawn with matplotlib's object interface: no window system and no global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rowen.bench.records import ServingRecord
from rowen.bench.series import EnginePoint, Point, Series
from rowen.policies.reclaim import Rung

INK = "#1f2933"
FAINT = "#8895a3"
ALONE = "#9aa5b1"
HARVESTED = "#0b7285"
SLO = "#c92a2a"
OPEN = "#b2f2bb"
CLOSED = "#e9ecef"
ENGINES = ("#e8590c", "#1971c2", "#7048e8", "#2f9e44", "#c2255c", "#868e96")
"""Colours of rollout engines in the order of their names."""
RUNGS = tuple(rung.value for rung in Rung)
"""Rungs of the reclaim ladder, mildest first; unknown ones are drawn above."""

_STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eef1f4",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def timeline_svg(series: Series) -> str:
    """Draw the run over time; panels without data say so."""
    panels: list[tuple[float, str, Callable[[Axes, Series], bool]]] = [
        (0.7, "requests/s", _draw_arrivals),
        (2.0, "TTFT, ms", _draw_ttft),
        (1.7, "TPOT, ms", _draw_tpot),
        (1.7, "rollout tokens/s", _draw_rollout),
        (1.0, "gate and rung", _draw_gate),
        (1.1, "weight version", _draw_versions),
        (1.1, "reward", _draw_reward),
    ]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "timeline"}):
        figure = Figure(figsize=(11, 13.2), layout="constrained")
        axes = figure.subplots(
            len(panels), 1, sharex=True, height_ratios=[height for height, _, _ in panels]
        )
        end_s = _end_s(series)
        for panel, (_, title, draw) in zip(axes, panels, strict=True):
            panel.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=4)
            if not draw(panel, series):
                _say_empty(panel)
            for event in series.events:
                panel.axvline(event.at_s, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=4)
        axes[0].set_xlim(0, end_s)
        _number_events(axes[0], series)
        axes[-1].set_xlabel("seconds from the start of the replay")
        return _svg(figure)


def distribution_svg(series: Series) -> str:
    """Draw the share of requests at or below each latency, both arms, log scale."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "distribution"}):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        for panel, title, slo_ms, pick in (
            (left, "TTFT, ms", series.slo_ttft_ms, _ttft_ms),
            (right, "TPOT, ms", series.slo_tpot_ms, _tpot_ms),
        ):
            panel.set_title(f"share of requests at or below a {title}", loc="left", fontsize=10)
            arms = (("alone", series.alone, ALONE), ("harvested", series.harvested, HARVESTED))
            drawn = [
                _draw_share(panel, name, records, color, pick) for name, records, color in arms
            ]
            if not any(drawn):
                _say_empty(panel)
                panel.set_xticks([])
                continue
            panel.set_xscale("log")
            _log_axis(panel.xaxis)
            if slo_ms is not None:
                panel.axvline(slo_ms, color=SLO, linewidth=1, linestyle="--", label="SLO")
            panel.set_ylim(0, 1.02)
            panel.legend(loc="lower right")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _end_s(series: Series) -> float:
    """Return where the time axis ends: after everything that was recorded."""
    points: list[Point] = [*series.gate, *series.rollout, *series.versions]
    points += [*series.steps, *series.events]
    at_s = [point.at_s for point in points]
    at_s += [record.sent_s for record in (*series.alone, *series.harvested)]
    return max(1.0, series.duration_s, *at_s) * 1.02


def _say_empty(panel: Axes) -> None:
    panel.text(
        0.5, 0.5, "nothing recorded", transform=panel.transAxes, ha="center", va="center",
        color=FAINT,
    )  # fmt: skip
    panel.set_yticks([])
    panel.grid(False)


def _number_events(panel: Axes, series: Series) -> None:
    for number, event in enumerate(series.events, start=1):
        panel.annotate(
            str(number), (event.at_s, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 8), textcoords="offset points", ha="center", va="center", fontsize=8,
            color="white", bbox={"boxstyle": "circle,pad=0.25", "fc": INK, "ec": "none"},
            annotation_clip=False,
        )  # fmt: skip


def _ttft_ms(record: ServingRecord) -> float | None:
    return record.ttft_ms


def _tpot_ms(record: ServingRecord) -> float | None:
    return record.tpot_ms


def _draw_arrivals(panel: Axes, series: Series) -> bool:
    records = series.harvested or series.alone
    if not records:
        return False
    count_S = np.bincount([max(0, int(record.sent_s)) for record in records])
    panel.bar(np.arange(count_S.size) + 0.5, count_S, width=0.9, color=ALONE)
    panel.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return True


def _draw_ttft(panel: Axes, series: Series) -> bool:
    return _draw_latency(panel, series, series.slo_ttft_ms, _ttft_ms)


def _draw_tpot(panel: Axes, series: Series) -> bool:
    return _draw_latency(panel, series, series.slo_tpot_ms, _tpot_ms)


def _draw_latency(
    panel: Axes,
    series: Series,
    slo_ms: float | None,
    pick: Callable[[ServingRecord], float | None],
) -> bool:
    """Scatter one point per answered request of each arm, with the objective as a line."""
    is_drawn = False
    for name, records, color, size in (
        ("serving alone", series.alone, ALONE, 22),
        ("serving with harvest", series.harvested, HARVESTED, 13),
    ):
        points = [(r.sent_s, value) for r in records if (value := pick(r)) and r.status == "ok"]
        if points:
            at_s, value_ms = zip(*points, strict=True)
            panel.scatter(at_s, value_ms, s=size, color=color, linewidth=0, alpha=0.9, label=name)
            is_drawn = True
    failed_s = [r.sent_s for r in series.harvested if r.status == "error"]
    if is_drawn and failed_s:
        panel.plot(
            failed_s, [0.97] * len(failed_s), "x", color=SLO, label="failed",
            transform=panel.get_xaxis_transform(),
        )  # fmt: skip
    if is_drawn:
        panel.set_yscale("log")
        _log_axis(panel.yaxis)
        if slo_ms is not None:
            panel.axhline(
                slo_ms, color=SLO, linewidth=1, linestyle="--", label=f"SLO {slo_ms:g} ms"
            )
        panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderaxespad=0)
    return is_drawn


def _log_axis(axis: matplotlib.axis.Axis) -> None:
    """Label a log axis with plain numbers at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_rollout(panel: Axes, series: Series) -> bool:
    """Stack the engines' rates, each held over the interval that ends at its point."""
    engines = _engines(series, [point.engine for point in series.rollout])
    if not engines:
        return False
    grid_s = np.array(sorted({0.0, *(point.at_s for point in series.rollout)}))
    base_T = np.zeros(grid_s.size)
    for engine, color in engines:
        points = [point for point in series.rollout if point.engine == engine]
        at_P = np.array([point.at_s for point in points])
        rate_P = np.array([point.tokens_per_s for point in points] + [0.0])
        top_T = base_T + rate_P[np.searchsorted(at_P, grid_s)]
        panel.fill_between(
            grid_s, base_T, top_T, step="pre", color=color, alpha=0.75, linewidth=0, label=engine
        )
        base_T = top_T
    panel.set_ylim(bottom=0)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, borderaxespad=0)
    return True


def _draw_gate(panel: Axes, series: Series) -> bool:
    """Shade where the gate is open and draw the rung as steps."""
    if not series.gate:
        return False
    rungs = [*RUNGS, *sorted({point.rung for point in series.gate} - set(RUNGS))]
    used = rungs[: max(rungs.index(point.rung) for point in series.gate) + 1]
    end_s = _end_s(series)
    edges = [*(point.at_s for point in series.gate), end_s]
    labelled: set[bool] = set()
    for point, until_s in zip(series.gate, edges[1:], strict=True):
        label = "" if point.gate_open in labelled else ("open" if point.gate_open else "closed")
        labelled.add(point.gate_open)
        color = OPEN if point.gate_open else CLOSED
        panel.axvspan(point.at_s, until_s, color=color, linewidth=0, label=label or None, zorder=0)
    level = [used.index(point.rung) for point in series.gate]
    panel.step(edges, [*level, level[-1]], where="post", color=INK, linewidth=1.4)
    panel.set_yticks(range(len(used)), used)
    panel.set_ylim(-0.5, max(1.0, len(used) - 0.5))
    panel.grid(False)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)
    return True


def _draw_versions(panel: Axes, series: Series) -> bool:
    engines = _engines(series, [point.engine for point in series.versions])
    if not engines:
        return False
    end_s = _end_s(series)
    for place, (engine, color) in enumerate(engines):
        points = [point for point in series.versions if point.engine == engine]
        # Engines at the same version would hide each other, so each is drawn a little higher.
        shift = 0.12 * (place - (len(engines) - 1) / 2)
        version = [point.version + shift for point in points]
        at_s = [*(point.at_s for point in points), end_s]
        panel.step(
            at_s, [*version, version[-1]], where="post", color=color, linewidth=1.8, label=engine
        )
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, borderaxespad=0)
    return True


def _draw_reward(panel: Axes, series: Series) -> bool:
    if not series.steps:
        return False
    at_s = [point.at_s for point in series.steps]
    reward = [point.reward for point in series.steps]
    panel.plot(at_s, reward, "o-", color=HARVESTED, linewidth=1.6, markersize=4.5)
    for point in series.steps:
        panel.annotate(
            str(point.step), (point.at_s, point.reward), xytext=(0, 5), ha="center",
            textcoords="offset points", fontsize=8, color=FAINT,
        )  # fmt: skip
    panel.margins(y=0.3)
    panel.yaxis.set_major_locator(MaxNLocator(4))
    return True


def _engines(series: Series, present: Sequence[str]) -> list[tuple[str, str]]:
    """Return the engines present with their colours, which are the same in every panel."""
    points: list[EnginePoint] = [*series.rollout, *series.versions]
    names = sorted({point.engine for point in points})
    colors = {name: ENGINES[place % len(ENGINES)] for place, name in enumerate(names)}
    return [(name, colors[name]) for name in names if name in set(present)]


def _draw_share(
    panel: Axes,
    name: str,
    records: Sequence[ServingRecord],
    color: str,
    pick: Callable[[ServingRecord], float | None],
) -> bool:
    value_N = np.sort([value for r in records if r.status == "ok" and (value := pick(r))])
    if value_N.size:
        share_N = np.arange(1, value_N.size + 1) / value_N.size
        panel.step(value_N, share_N, where="post", color=color, linewidth=1.9, label=name)
    return bool(value_N.size)
