"""How small and how fast weight deltas are, side by side with what others send.

``python -m rowen.bench.delta --model FOLDER`` makes a chain of bf16 versions from a real
checkpoint by AdamW steps on float32 master weights, encodes each step with `rowen.weightsync` and
with three formats in use elsewhere, and prints a table (``--json FILE`` writes it).  Without
``--model`` it makes random weights of the same spread, which is quicker and close.

The deltas are like those of a real GRPO run on SmolLM2-135M (learning rate 1e-6, AdamW 0.9/0.999),
which changed 0.65 % of the values in its first step, 0.46 % from step 1 to 2 and 0.24 % from 11 to
12: small weights change far more often than large ones, because a step is about the learning rate
and a bf16 value moves only in steps of 1/256 of itself.  Gradients are random here, so the density
falls off more slowly; ``--learning-rate`` sets where it starts.

Predicted before this bench first ran, from the entropy of the real deltas (1.36 bytes per changed
element at 0.456 %, positions taken as independent) and a first trial of plane layouts on such a
chain: 1.35 to 1.50 bytes per changed element at 0.3 to 0.7 % density, encoding above 1 GB/s and
decoding above 10 GB/s of base weights on one core; COO 6.00, gap16+zstd 3.1, XOR+zstd 3.2.
Measured then on a busy machine: 1.37 to 1.48, encoding 1.8 to 2.5 GB/s, decoding 7 to 9.5 GB/s
(less than predicted: the cumulative sum and the gather from the base, not zstd), COO 6.00,
gap16+zstd 3.1 to 3.3, XOR+zstd 2.9 to 3.2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from rowen.weightsync.codec import absolute_values, decode_gaps, encode_gaps
from rowen.weightsync.elements import changed_positions, elements_of
from rowen.weightsync.publisher import Publisher

Words = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Row:
    """One format on one step of the chain."""

    step: int
    format: str
    changed_ratio: float
    bytes_per_changed: float
    encode_gb_per_s: float
    """Of base weights, one core, comparison included."""
    decode_gb_per_s: float | None
    """Of base weights, one core, absolute values included; None where only size is compared."""


@dataclass(frozen=True)
class Tensors:
    """Two versions of a model, tensor by tensor."""

    old: list[Words]
    new: list[Words]

    @property
    def base_bytes(self) -> int:
        """Bytes of one version."""
        return sum(tensor.nbytes for tensor in self.old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; exit code 0, or 2 for a folder without weights."""
    parser = argparse.ArgumentParser(prog="python -m rowen.bench.delta", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder with *.safetensors in bf16")
    parser.add_argument("--steps", type=int, default=3, help="versions after the first")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    try:
        weights = _random_weights() if options.model is None else _load(options.model)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows: list[Row] = []
    published: list[dict[str, float]] = []
    trainer = Trainer(weights, options.learning_rate)
    with Publisher("bench", trainer.rounded()) as publisher:
        before = trainer.elements()
        for step in range(1, options.steps + 1):
            trainer.step()
            after = trainer.elements()
            rows += measure(step, Tensors(before, after))
            result = publisher.publish(trainer.rounded(), step)
            published.append(
                {
                    "step": step,
                    "delta_bytes": result.delta_bytes,
                    "full_bytes": result.full_bytes,
                    "full_per_delta": result.full_bytes / result.delta_bytes,
                    "bytes_per_changed": result.delta_bytes / max(1, result.changed),
                    "publish_s": result.encode_s,
                }
            )
            before = after
    _print(rows, published)
    if options.json is not None:
        document = {"rows": [asdict(row) for row in rows], "published": published}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


class Trainer:
    """AdamW with random gradients on float32 master weights."""

    def __init__(self, weights: dict[str, torch.Tensor], learning_rate: float) -> None:
        random = torch.Generator().manual_seed(1)
        self._random = random
        self._learning_rate = learning_rate
        self._steps = 0
        self._master = {name: _dithered(each, random) for name, each in weights.items()}
        self._first = {name: torch.zeros_like(each) for name, each in self._master.items()}
        self._second = {name: torch.zeros_like(each) for name, each in self._master.items()}

    def step(self) -> None:
        """One optimiser step: decay 0.9 and 0.999, no weight decay."""
        self._steps += 1
        for name, master in self._master.items():
            gradient = torch.randn(master.shape, generator=self._random)
            first = self._first[name].lerp_(gradient, 0.1)
            second = self._second[name].lerp_(gradient.square_(), 0.001)
            scale = (second / (1 - 0.999**self._steps)).sqrt_().add_(1e-8)
            master -= self._learning_rate * (first / (1 - 0.9**self._steps)) / scale

    def rounded(self) -> dict[str, torch.Tensor]:
        """What is served: the master weights in bf16."""
        return {name: master.to(torch.bfloat16) for name, master in self._master.items()}

    def elements(self) -> list[Words]:
        """The same as flat 16-bit words."""
        return [elements_of(name, tensor) for name, tensor in self.rounded().items()]


def _dithered(weights: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """float32 weights that round to about these bf16 ones, spread over each rounding interval."""
    master = weights.float()
    _, exponent = torch.frexp(master)
    return master + torch.ldexp(torch.rand(master.shape, generator=random) - 0.5, exponent - 8)


def _random_weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(1536, 576), (576, 1536), (576, 576), (576,)] * 8
    return {
        f"tensor.{number}": (torch.randn(shape, generator=random) * 0.18).to(torch.bfloat16)
        for number, shape in enumerate(shapes)
    }


def _load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"--model {folder} holds no *.safetensors; give a model folder")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def measure(step: int, tensors: Tensors) -> list[Row]:
    """Encode one step in every format; the rowen row is decoded and checked as well."""
    formats: dict[str, Callable[[Words, Words], int]] = {
        "COO int32 + bf16": _coo,
        "gap16 + bf16, zstd-1": _gap16,
        "XOR, zstd-1": _xor,
    }
    changed = sum(
        int(np.count_nonzero(a != b)) for a, b in zip(tensors.old, tensors.new, strict=True)
    )
    elements = sum(tensor.size for tensor in tensors.old)
    rows = [_rowen(step, tensors, changed, elements)]
    for name, encode in formats.items():
        started = time.process_time()
        size = sum(encode(old, new) for old, new in zip(tensors.old, tensors.new, strict=True))
        spent_s = time.process_time() - started
        rows.append(
            Row(
                step=step,
                format=name,
                changed_ratio=changed / elements,
                bytes_per_changed=size / max(1, changed),
                encode_gb_per_s=tensors.base_bytes / spent_s / 1e9,
                decode_gb_per_s=None,
            )
        )
    return rows


def _rowen(step: int, tensors: Tensors, changed: int, elements: int) -> Row:
    started = time.process_time()
    sections = []
    for old, new in zip(tensors.old, tensors.new, strict=True):
        index = changed_positions(old, new)
        sections.append((encode_gaps(index, old[index], new[index]), int(index.size)))
    encoded = time.process_time()
    decoded = []
    for (section, count), old in zip(sections, tensors.old, strict=True):
        change = decode_gaps(
            memoryview(section), changed=count, elements=old.size, item_bytes=old.itemsize
        )
        values = absolute_values(old[change.index_N], change.difference_N)
        decoded.append((change.index_N, values))
    ended = time.process_time()
    for (index, values), old, new in zip(decoded, tensors.old, tensors.new, strict=True):
        result = old.copy()
        result[index] = values
        if not np.array_equal(result, new):
            raise AssertionError("a decoded tensor differs from what was encoded")
    return Row(
        step=step,
        format="rowen gaps",
        changed_ratio=changed / elements,
        bytes_per_changed=sum(len(section) for section, _ in sections) / max(1, changed),
        encode_gb_per_s=tensors.base_bytes / (encoded - started) / 1e9,
        decode_gb_per_s=tensors.base_bytes / (ended - encoded) / 1e9,
    )


def _coo(old: Words, new: Words) -> int:
    index = np.flatnonzero(old != new)
    return index.astype(np.int32).nbytes + new[index].nbytes


def _gap16(old: Words, new: Words) -> int:
    index = np.flatnonzero(old != new)
    gaps = np.diff(index, prepend=-1) - 1
    # A gap that does not fit is bridged by elements sent although they did not change.
    bridges = int(np.sum(gaps >> 16))
    packed = (gaps & 0xFFFF).astype(np.uint16).tobytes() + new[index].tobytes()
    return len(zstandard.ZstdCompressor(level=1).compress(packed)) + 4 * bridges


def _xor(old: Words, new: Words) -> int:
    return len(zstandard.ZstdCompressor(level=1).compress((old ^ new).tobytes()))


def _print(rows: Sequence[Row], published: Sequence[dict[str, float]]) -> None:
    table = Table("step", "format", "changed", "B/changed", "encode GB/s", "decode GB/s")
    for row in rows:
        decode = "" if row.decode_gb_per_s is None else f"{row.decode_gb_per_s:.1f}"
        table.add_row(
            str(row.step),
            row.format,
            f"{row.changed_ratio:.3%}",
            f"{row.bytes_per_changed:.2f}",
            f"{row.encode_gb_per_s:.2f}",
            decode,
        )
    console = Console()
    console.print(table)
    for step in published:
        console.print(
            f"published step {step['step']}: {step['delta_bytes']:,} bytes with manifest, "
            f"{step['bytes_per_changed']:.2f} per changed element, full / delta "
            f"{step['full_per_delta']:.0f} x, publish {step['publish_s']:.2f} s"
        )


if __name__ == "__main__":
    raise SystemExit(main())
