"""Where the parts of a running stack listen: written by ``rowen up``, read by ``rowen status``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

FILE_NAME = "addresses.json"


class AddressesError(Exception):
    """No running stack can be found; nothing was changed."""


class Addresses(BaseModel):
    """Base URLs (no trailing slash) of one running stack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: Path
    serving: str
    scheduler: str
    daemon: str


def write_addresses(addresses: Addresses) -> None:
    path = addresses.run_dir / FILE_NAME
    scratch = path.with_suffix(".tmp")
    scratch.write_text(addresses.model_dump_json(indent=2), encoding="utf-8")
    scratch.replace(path)


def remove_addresses(run_dir: Path) -> None:
    (run_dir / FILE_NAME).unlink(missing_ok=True)


def read_addresses(run_dir: Path) -> Addresses:
    """Read the addresses of the stack that runs under ``run_dir``.

    Raises:
        AddressesError: nothing runs there, or the file is not ours.
    """
    path = run_dir / FILE_NAME
    try:
        return Addresses.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AddressesError(
            f"nothing runs under {run_dir} (no {FILE_NAME}); start `rowen up`, "
            "or name its run_dir with --run-dir"
        ) from None
    except (OSError, ValidationError) as error:
        raise AddressesError(f"{path} cannot be used ({error}); remove it and restart") from error
