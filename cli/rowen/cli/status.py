"""``rowen status``: one look at a running stack, through the pages of daemon and scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rowen.cli.addresses import Addresses, AddressesError, read_addresses
from rowen.cli.pages import PageError, read_page


def run_status(run_dir: Path, *, as_json: bool) -> int:
    """Print what runs; 1 when a part does not answer, 2 when nothing runs under ``run_dir``."""
    try:
        addresses = read_addresses(run_dir)
    except AddressesError as error:
        Console(stderr=True).print(f"rowen status: {escape(str(error))}")
        return 2
    report = gather(addresses)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if any("error" in part for part in report.values() if isinstance(part, dict)) else 0


def gather(addresses: Addresses) -> dict[str, Any]:
    """Ask every part; one that does not answer is reported as ``{"error": …}`` in its place."""
    return {
        "run_dir": str(addresses.run_dir),
        "serving": {"url": addresses.serving, **_ask(f"{addresses.serving}/health")},
        "endpoint": {"url": addresses.scheduler, **_ask(f"{addresses.scheduler}/rowen/v1/engines")},
        "versions": _ask(f"{addresses.scheduler}/rowen/v1/versions"),
        "trajectories": _ask(f"{addresses.scheduler}/rowen/v1/trajectories"),
        "daemon": {"url": addresses.daemon, **_ask(f"{addresses.daemon}/status")},
    }


def _ask(url: str) -> dict[str, Any]:
    try:
        return read_page(url)
    except PageError as error:
        return {"error": str(error)}


def show(report: dict[str, Any]) -> None:
    """Print the report as tables for people."""
    console = Console()
    for part, document in report.items():
        if isinstance(document, dict) and "error" in document:
            console.print(f"[red]{part}[/]: {escape(document['error'])}")
    console.print(f"endpoint [bold]{report['endpoint'].get('url')}[/]")
    console.print(_harvest_table(report["daemon"]))
    console.print(_engine_table(report["endpoint"]))
    console.print(_pairs_table("trajectories", report["trajectories"]))


def _harvest_table(daemon: dict[str, Any]) -> Table:
    fields = ("mode", "gate", "reason", "detail", "sequence_cap", "fast_path", "rung", "cause")
    shown = {field: daemon.get(field) for field in fields}
    engine = daemon.get("engine") or {}
    shown["rollout engine"] = engine.get("phase")
    if engine.get("problem"):
        shown["its problem"] = engine["problem"]
    return _pairs_table("harvest", shown)


def _engine_table(endpoint: dict[str, Any]) -> Table:
    table = Table(title="engines", title_justify="left")
    columns = ("engine_id", "kind", "state", "version", "running", "tokens_total", "reason")
    for column in columns:
        table.add_column(column)
    for engine in endpoint.get("engines", []):
        table.add_row(*(escape(str(engine.get(column, ""))) for column in columns))
    return table


def _pairs_table(title: str, document: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in document.items():
        if not isinstance(value, list | dict):
            table.add_row(key, escape(str(value)))
        elif isinstance(value, dict) and title == "harvest":
            table.add_row(key, ", ".join(f"{name} {word}" for name, word in value.items()))
    return table
