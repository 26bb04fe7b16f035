"""The page of what was tried: words, and a table for each pair and number of days."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from search_arms import ARMS, BEFORE
from search_rows import NONE, Row, Rows, change, number, paragraph
from search_words import words

from stlora_peft.files import atomic_write
from stlora_peft.reports import days_name

UNITS = {"la-shenzhen": "vehicles in 5 minutes", "west-east": "mph", "east-west": "mph"}
EARLIER = "895510c to 7ab7201"


def write_page(rows: Sequence[Row], page: Path, titles: Mapping[str, str]) -> None:
    """Write the page.

    Args:
        rows: All rows.
        page: Where to.
        titles: Words of each pair.
    """
    blocks = [*words(Rows(rows)), "## The arms", _arms(), *_tables(rows, titles), *_stopping(rows), *_again(rows)]
    with atomic_write(page) as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _arms() -> str:
    lines = ["What is not said is that of `embedding`.", "", "| arm | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {arm.words} |" for name, arm in ARMS.items())])


def _tables(rows: Sequence[Row], titles: Mapping[str, str]) -> Iterator[str]:
    """One table for each pair, backbone and number of days."""
    yield "## All rows"
    yield paragraph(
        "MAE on the development part after so many steps; 0 is before the first. The last two columns compare with "
        "`full` and with `embedding`, the default before, at the largest number of steps that both have, with the "
        "same seed and rate. Parameters are those that are trained."
    )
    chosen = [row for row in rows if row["training"] == "all"]
    for pair, backbone, base, days in dict.fromkeys(_part(row) for row in chosen):
        part = [row for row in chosen if _part(row) == (pair, backbone, base, days)]
        yield f"### {titles.get(pair, pair)}; {backbone}; {days_name(days)}"
        yield f"`{pair}`, MAE in {UNITS.get(pair, 'km/h')}. Weights of the backbone: `{base[:12]}`."
        yield _table(part)


def _part(row: Row) -> tuple[Any, ...]:
    return row["pair"], row["backbone"], row["base"], row["days"]


def _table(part: Sequence[Row]) -> str:
    steps = sorted({step for row in part for step in row["mae"]}, key=int)
    order = list(ARMS)
    lines = [f"| arm | rate | seed | parameters | {' | '.join(steps)} | to `full` | to `{BEFORE}` |"]
    lines.append("|---|" + "---:|" * (len(steps) + 5))
    for row in sorted(part, key=lambda row: (order.index(row["arm"]), -row["rate"], row["seed"])):
        like = [other for other in part if (other["rate"], other["seed"]) == (row["rate"], row["seed"])]
        errors = [number(row["mae"].get(step)) for step in steps]
        changes = [
            next((change(row["mae"], other["mae"]) for other in like if other["arm"] == name), NONE)
            for name in ("full", BEFORE)
        ]
        rate = f"{row['rate']:g}" if row["rate"] else NONE
        cells = [f"`{row['arm']}`", rate, str(row["seed"]), f"{row['parameters']:,}", *errors, *changes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stopping(rows: Sequence[Row]) -> Iterator[str]:
    """The table of early stopping."""
    chosen = [row for row in rows if row["training"] != "all"]
    if not chosen:
        return
    yield "## Early stopping"
    yield paragraph(
        "MAE on the same windows of the development part, of the state that validated best within 40 passes (patience "
        "8): on the last quarter of the given days, on every fourth block of three hours, or, training on all given "
        "windows, on the development part itself, which is an upper bound. The last column is 600 steps on all given "
        "windows."
    )
    lines = [
        "| pair | days | arm | last quarter | blocks | development part | 600 steps |",
        "|---|---|---|" + "---:|" * 4,
    ]
    known = Rows(rows)
    for pair, days, arm in dict.fromkeys((row["pair"], row["days"], row["arm"]) for row in chosen):
        ways = [("last quarter", "best"), ("blocks", "best"), ("development", "best"), ("all", 600)]
        found = (known.mae((pair, days), arm, at, training=training) for training, at in ways)
        lines.append(f"| {pair} | {days:g} | `{arm}` | {' | '.join(found)} |")
    yield "\n".join(lines)


def _again(rows: Sequence[Row]) -> Iterator[str]:
    """Which rows were measured twice."""
    yield "## Where the rows come from"
    yield paragraph(
        f"Rows whose `commit` is `{EARLIER}` were measured with loose scripts, before there was this command, on the "
        "package as it stood then. They were taken over after the command had given those below the same errors, to "
        "the four decimals that are kept. The rows of `la-shenzhen` stand on the backbone of "
        "`benchmarks/la_to_shenzhen` (`stlora pretrain`), the others on backbones of `benchmarks/accuracy/run.py`; "
        "`base` in search.json is the fingerprint of the weights, and rows on other weights are other rows. All were "
        "measured on one thread of a machine that did other work: their seconds are no measure of speed."
    )
    lines = ["| pair | days | arm | rate | seed | steps | measured | again |", "|---|---|---|" + "---:|" * 5]
    for row in (row for row in rows if "again" in row):
        for step in (step for step in row["again"] if step in row["mae"]):
            cells = [row["pair"], f"{row['days']:g}", f"`{row['arm']}`", f"{row['rate']:g}", str(row["seed"]), step]
            cells += [f"{mae[step]:.4f}" for mae in (row["mae"], row["again"])]
            lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
