"""Every bench, one after the other, and one table of what they found: ``python benches/all.py [--quick] [NAME ...]``.

Each bench is a process of its own, which runs the tests of what it measures first and adds its rows to
benches/results. ``--quick`` leaves out those that take more than 10 minutes; names run these benches only. Fails where
a bench did: a bound was broken, or its tests are red.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import RESULTS

Row = Mapping[str, str]
QUICK_MINUTES = 10


@dataclass(frozen=True)
class Line:
    """One line of the table: what was measured, the value, its interval, and the limit of what could be reached."""

    what: str
    value: str
    interval: str = ""
    limit: str = ""


@dataclass(frozen=True)
class Bench:
    """A script of this folder: about how many minutes it takes on 2 idle cores, and what a row of it says."""

    name: str
    minutes: int
    read: Callable[[Row], Line]
    needs_gpu: bool = False


def ratio(
    what: Callable[[Row], str], value: str, low: str, high: str, limit: Callable[[Row], str]
) -> Callable[[Row], Line]:
    """Reads rows that hold a ratio ours / theirs and its interval; one that ran once has no interval."""

    def read(row: Row) -> Line:
        interval = "once" if row[low] == "nan" else f"{float(row[low]):.3f} to {float(row[high]):.3f}"
        return Line(what(row), f"{float(row[value]):.3f}", interval, limit(row))

    return read


def share(one: float, other: float) -> str:
    return f"{one / other:.3f}"


BENCHES = (
    Bench(
        "fc1_response",
        3,
        ratio(lambda r: f"{r['layer']} / {r['peer']}", "median", "low", "high", lambda r: ""),
    ),
    Bench(
        "scoring_cost",
        5,
        ratio(lambda r: f"{r['pass']} / without statistics, {r['peer']}", "median", "low", "high", lambda r: ""),
    ),
    Bench(
        "rar_forward",
        9,
        ratio(
            lambda r: f"{r['blocks']} blocks / plain pass",
            "ours_by_plain",
            "low",
            "high",
            lambda r: share(float(r["products"]), float(r["plain"])),
        ),
    ),
    Bench(
        "var_forward",
        4,
        ratio(
            lambda r: "4 blocks / plain pass",
            "ours_by_plain",
            "plain_low",
            "plain_high",
            lambda r: f"{float(r['counted_limit']):.3f}",
        ),
    ),
    Bench(
        "generation",
        12,
        ratio(
            lambda r: f"{r['blocks']} blocks / plain loop",
            "median",
            "low",
            "high",
            lambda r: share(float(r["plain_tokens_per_s"]), float(r["products_tokens_per_s"])),
        ),
    ),
    Bench(
        "hooks",
        2,
        lambda r: Line(f"{r['views']} views, peak / hooks", share(float(r["ours_mib"]), float(r["hooks_mib"]))),
    ),
    Bench(
        "memory",
        8,
        lambda r: Line("peak of 3,200 images / 200", share(float(r["mib_3200"]), float(r["mib_200"])), "", "1.000"),
    ),
    Bench(
        "pipeline",
        8,
        lambda r: Line(
            f"{r['pass']}: tokenizer {float(r['tokenizer']):.0%}, transformer {float(r['transformer']):.0%}",
            f"{float(r['images_per_s']):.4f} images/s",
        ),
    ),
    Bench(
        "listing",
        8,
        lambda r: Line(f"{r['kind']}, {int(r['images']):,} images, {r['mib']} MiB", f"{r['seconds']} s", "", "60 s"),
    ),
    Bench(
        "index_search",
        25,
        lambda r: Line(
            f"{r['what']}, {int(r['vectors']):,} vectors" + (f", effort {r['effort']}" if r["effort"] else ""),
            f"{r['seconds']} s",
            f"recall {r['recall']}" if r["recall"] else "",
        ),
    ),
    Bench(
        "gpu_kernels",
        5,
        lambda r: Line(
            f"{r['kernel']}, {r['shape']}, {r['variant']}", f"{r['ms']} ms", f"{r['ms_least']} to {r['ms_most']}"
        ),
        needs_gpu=True,
    ),
)


def rows_of(bench: Bench) -> list[Row]:
    """What stands in the bench's table so far."""
    path = RESULTS / f"{bench.name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def reason_to_skip(bench: Bench, quick: bool) -> str:
    """Why a bench is left out; empty where it runs."""
    if bench.needs_gpu and not torch.cuda.is_available():
        return "no CUDA GPU"
    if quick and bench.minutes > QUICK_MINUTES:
        return f"about {bench.minutes} minutes"
    return ""


def print_table(found: Sequence[tuple[Bench, Row]]) -> None:
    """One line of every row."""
    header = ("bench", "what", "value", "interval", "limit", "hardware", "commit")
    table = [header]
    for bench, row in found:
        line = bench.read(row)
        hardware = row.get("gpu") or f"{row['processor']} x{row['cores']}"
        table.append((bench.name, line.what, line.value, line.interval, line.limit, hardware, row["commit"]))
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: Sequence[str]) -> int:
    """Run the benches; returns 1 where one failed."""
    quick, names = "--quick" in arguments, [a for a in arguments if a != "--quick"]
    unknown = set(names) - {bench.name for bench in BENCHES}
    if unknown:
        raise SystemExit(f"expected benches out of {', '.join(b.name for b in BENCHES)}, got {', '.join(unknown)}")
    found, failed = [], []
    for bench in BENCHES:
        if names and bench.name not in names:
            continue
        reason = reason_to_skip(bench, quick)
        if reason:
            print(f"{bench.name}: left out, {reason}", flush=True)
            continue
        print(f"{bench.name}: about {bench.minutes} minutes on 2 idle cores", flush=True)
        before = len(rows_of(bench))
        if subprocess.run([sys.executable, Path(__file__).with_name(f"{bench.name}.py")]).returncode:
            failed.append(bench.name)
        found += [(bench, row) for row in rows_of(bench)[before:]]
    print()
    print_table(found)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
