"""The page of what was tried: words around figures that come from the rows, and a table for each pair and days."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_arms import ARMS, PRESENT

from stlora_peft.files import atomic_write
from stlora_peft.reports import days_name

Row = dict[str, Any]
Errors = dict[str, float]
Place = tuple[str, float]
UNLIKE, UNLIKE3, SHENZHEN, EAST = ("unlike", 1.0), ("unlike", 3.0), ("la-shenzhen", 3.0), ("west-east", 3.0)
PLACES = {UNLIKE: "`unlike`, 1 day", UNLIKE3: "`unlike`, 3 days", SHENZHEN: "`la-shenzhen`", EAST: "`west-east`"}
UNITS = {"la-shenzhen": "vehicles in 5 minutes", "west-east": "mph", "east-west": "mph"}
RATE = 0.003
NONE = "-"
EARLIER = "895510c to 7ab7201"


@dataclass(frozen=True)
class Rows:
    """Rows with the look-ups that the words need; what is missing reads as a dash.

    Args:
        rows: All rows.
    """

    rows: Sequence[Row]

    def find(self, place: Place, arm: str, *, seed: int = 0, rate: float = RATE, training: str = "all") -> Errors:
        """Errors of an arm by number of steps, on the first backbone where there are several."""
        rate, seed = (rate, seed) if ARMS[arm].trained else (0.0, 0)
        names, wanted = ("pair", "days", "arm", "seed", "rate", "training"), (*place, arm, seed, rate, training)
        return next((row["mae"] for row in self.rows if tuple(row[name] for name in names) == wanted), {})

    def mae(self, place: Place, arm: str, at: str | int, **which: Any) -> str:
        """An error."""
        return number(self.find(place, arm, **which).get(str(at)))

    def each(self, arm: str, other: str, places: Iterable[Place] = tuple(PLACES)) -> str:
        """How far an arm is from another wherever both were measured."""
        found = {name: change(self.find(place, arm), self.find(place, other)) for place, name in PLACES.items()}
        known = [
            f"{found[name]} ({name})" for place, name in PLACES.items() if place in places and found[name] != NONE
        ]
        return ", ".join(known) or "not measured"

    def seeds(self, place: Place, arm: str, at: int) -> str:
        """Errors of all seeds, in their order."""
        found = [self.find(place, arm, seed=seed).get(str(at)) for seed in range(10)]
        return " / ".join(number(mae) for mae in found if mae is not None) or NONE


def number(mae: float | None) -> str:
    """Write an error."""
    return NONE if mae is None else f"{mae:.3f}"


def change(ours: Errors, theirs: Errors) -> str:
    """Write how far errors are from others, after the largest number of steps that both have.

    Example:
        >>> change({"150": 2.0, "300": 1.9}, {"150": 1.0, "300": 2.0, "600": 1.0})
        '-5.0 %'
    """
    steps = [step for step in ours.keys() & theirs.keys() if step not in ("0", "best")]
    last = max(steps, key=int, default="0")
    return f"{100 * (ours[last] / theirs[last] - 1):+.1f} %" if last in ours and last in theirs else NONE


def write_page(rows: Sequence[Row], page: Path, titles: Mapping[str, str]) -> None:
    """Write the page.

    Args:
        rows: All rows.
        page: Where to.
        titles: Words of each pair.
    """
    blocks = [*_words(Rows(rows)), "## The arms", _arms(), *_tables(rows, titles), *_stopping(rows), *_again(rows)]
    with atomic_write(page) as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _words(rows: Rows) -> Iterator[str]:
    """What was found, in words; they were chosen when the rows of search.json were all there was."""
    yield "# What was tried"
    yield from _how(rows)
    yield "## What is the default now, and why"
    yield _list(_kept(rows))
    yield "## What did not help"
    yield _list(_not_kept(rows))
    yield "## Where it loses"
    yield from _loses(rows)


def _how(rows: Rows) -> Iterator[str]:
    yield _paragraph(
        "`python benchmarks/accuracy/search.py` measures what stands here and writes this page. All numbers come from "
        "[search.json](../benchmarks/accuracy/search.json); every setting of an arm is said in "
        "[search_arms.py](../benchmarks/accuracy/search_arms.py)."
    )
    yield _paragraph(
        "One backbone (`stgcn`) was pretrained on the source of a pair. Each arm was trained on the first days of the "
        "target and measured on its **development part**: the steps between the given days and the test part, about "
        "300 windows spread over them. The test part was not looked at. All arms have one loop: masked MAE, AdamW at "
        f"a constant rate ({RATE:g} where nothing else is said), 32 windows in a batch, gradients cut at 5, a moving "
        "average with decay 0.98, all given windows. The defaults were chosen on these numbers, which flatters them "
        "here; [results](results.md) says how they do on test parts, and where."
    )
    yield _paragraph(
        "**Most rows have one seed: differences under about 1 % mean nothing, and with one day of `unlike` larger "
        "ones do not either.** There, after 600 steps, seeds 0, 1 and so on gave "
        f"{rows.seeds(UNLIKE, 'full', 600)} with `full`, "
        f"{rows.seeds(UNLIKE, 'full+node-embedding', 600)} with `full+node-embedding`, "
        f"{rows.seeds(UNLIKE, 'gate-dropout0', 600)} with `gate-dropout0`, {rows.seeds(UNLIKE, 'dropout0', 600)} with "
        f"`dropout0` and {rows.seeds(UNLIKE, PRESENT, 600)} with the present default. Percentages below are of seed 0 "
        "and compare errors after the largest number of steps that both arms have."
    )


def _kept(rows: Rows) -> Iterator[str]:
    full, gate = "full", "gate-dropout0"
    stopped, best = {"at": "best", "training": "last quarter"}, {"at": "best", "training": "development"}
    yield (
        "**All given days and a fixed number of steps, no early stopping.** With one day of `unlike`, early stopping "
        f"on the last quarter, which is the evening, gave {rows.mae(UNLIKE, full, **stopped)} (`full`) and "
        f"{rows.mae(UNLIKE, gate, **stopped)} (`{gate}`, st-lora as it was then). All given days and 600 steps gave "
        f"{rows.mae(UNLIKE, full, 600)} and {rows.mae(UNLIKE, gate, 600)}. It is the validation that was wrong: all "
        "given days, stopped by the development part itself, which nobody has, gave "
        f"{rows.mae(UNLIKE, full, **best)} and {rows.mae(UNLIKE, gate, **best)}."
    )
    yield (
        "**Node vectors (`embedding`) in place of gates.** Without dropout in both, they change the error by "
        f"{rows.each('dropout0', gate)}. With dropout in both, by {rows.each(PRESENT, 'gate')}. They also need fewer "
        "numbers, the more so the more nodes there are."
    )
    yield (
        f"**Dropout 0.1.** Against none: {rows.each(PRESENT, 'dropout0')}. It holds back what one day teaches too "
        f"well: without it the error of `unlike` rises again between 300 and 600 steps. Against 0.1, 0.2 gives "
        f"{rows.each('dropout0.2', PRESENT)}, 0.3 gives {rows.each('dropout0.3', PRESENT)}, and 0.3 in the predictor "
        f"alone {rows.each('predictor-dropout0.3', PRESENT)}."
    )
    yield (
        f"**The predictor, of width 64.** Without it: {rows.each('nopredictor', PRESENT)}. Width 16: "
        f"{rows.each('width16', PRESENT)}; width 128: {rows.each('width128', PRESENT)}. With gates, width 16 against "
        f"64: {rows.each('gate-dropout0-width16', gate)}. The predictor alone, without the layers: "
        f"{rows.each('predictor', PRESENT)}."
    )
    yield (
        f"**Rank 8, and 2 on backbones of 250,000 parameters or more.** Rank 2 gives {rows.each('rank2', PRESENT)}; "
        f"rank 16 {rows.each('rank16', PRESENT)}. Rank 2 was not chosen for its error: on wide backbones rank 8 would "
        "need more than a tenth of their parameters. No such backbone was in the search."
    )
    yield f"**Node vectors of width 16.** Width 8: {rows.each('vectors8', PRESENT)}."


def _not_kept(rows: Rows) -> Iterator[str]:
    yield (
        "**Node vectors from each node's history** (level, spread, percentiles, daily course, neighbours), to start "
        f"from: {rows.each('history-dropout0', 'dropout0')}, against random ones, no dropout in both."
    )
    yield (
        "**An adapter pretrained on the source with such vectors, then brought to the target**: "
        f"{rows.each('source-dropout0', 'dropout0')}. Before the first step it forecasts `unlike` with "
        f"{rows.mae(UNLIKE, 'source-dropout0', 0)} where an untrained adapter has {rows.mae(UNLIKE, 'dropout0', 0)}."
    )
    yield (
        "**Calibration in closed form as a start.** It is a large step before the first one, on `unlike` with one day "
        f"from {rows.mae(UNLIKE, 'reestimated', 0)} to {rows.mae(UNLIKE, 'calibrated', 0)}, and no help in the end: "
        f"{rows.each('calibrated', PRESENT)}."
    )
    yield (
        "**Closed form alone, without training** (`unlike`, 1 day): the backbone as it is "
        f"{rows.mae(UNLIKE, 'zero-shot', 0)}, normalised by the target {rows.mae(UNLIKE, 'reestimated', 0)}, its "
        f"forecast calibrated for the city {rows.mae(UNLIKE, 'calibration-city', 0)} or each node "
        f"{rows.mae(UNLIKE, 'calibration-node', 0)}, with the whole window {rows.mae(UNLIKE, 'window-city', 0)} or "
        f"{rows.mae(UNLIKE, 'window-node', 0)}, `zero-shot+` {rows.mae(UNLIKE, 'zero-shot+', 0)}. Training is far "
        f"ahead ({rows.mae(UNLIKE, PRESENT, 600)})."
    )
    yield (
        f"**Other rates for the node vectors**: three times {rows.each('node-rate3', PRESENT)}, 0.3 times "
        f"{rows.each('node-rate0.3', PRESENT)}. **Weight decay 0.1**: {rows.each('weight-decay0.1', PRESENT)}."
    )
    blocks = {"at": "best", "training": "blocks"}
    yield (
        "**Validation on interleaved blocks** of three hours, in place of the last quarter (`unlike`, 1 day): "
        f"{rows.mae(UNLIKE, 'full', **blocks)} (`full`), {rows.mae(UNLIKE, 'lora', **blocks)} (`lora`), "
        f"{rows.mae(UNLIKE, 'gate-dropout0', **blocks)} (`gate-dropout0`), all behind 600 steps on everything."
    )
    yield (
        f"**A larger alpha** (32 for 16, no dropout): {rows.each('alpha32-dropout0', 'dropout0')}. **A free bias of "
        f"each node** with the predictor: {rows.each('bias', 'dropout0')}. **The backbone trained too**: "
        f"{rows.each('full+embedding-dropout0', 'dropout0')}. All against `dropout0`."
    )


def _loses(rows: Rows) -> Iterator[str]:
    slow = {"at": 300, "rate": 0.001}
    yield _paragraph(
        "On `west-east`, two halves of one city with 3 days given, the present default has "
        f"{rows.mae(EAST, PRESENT, 300)} after 300 steps, `full` {rows.mae(EAST, 'full', 300)}, `lora` "
        f"{rows.mae(EAST, 'lora', 300)} and the predictor alone {rows.mae(EAST, 'predictor', 300)}. It is best after "
        "150 steps and grows worse. With a rate of 0.001 default and `full` are level "
        f"({rows.mae(EAST, PRESENT, **slow)} and {rows.mae(EAST, 'full', **slow)})."
    )
    yield _paragraph(
        "`full+node-embedding` is the strongest rival: on `unlike` with one day it is ahead of the default after 300 "
        f"steps with seed 0 ({rows.mae(UNLIKE, 'full+node-embedding', 300)} against "
        f"{rows.mae(UNLIKE, PRESENT, 300)}), and behind it after 600 and with the other seeds."
    )


def _list(items: Iterable[str]) -> str:
    return "\n".join(_paragraph(f"- {item}", "  ") for item in items)


def _paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _arms() -> str:
    lines = ["What is not said is that of `embedding`.", "", "| arm | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {arm.words} |" for name, arm in ARMS.items())])


def _tables(rows: Sequence[Row], titles: Mapping[str, str]) -> Iterator[str]:
    """One table for each pair, backbone and number of days."""
    yield "## All rows"
    yield _paragraph(
        "MAE on the development part after so many steps; 0 is before the first. The last two columns compare with "
        "`full` and with the present default, at the largest number of steps that both have, with the same seed and "
        "rate. Parameters are those that are trained."
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
    lines = [f"| arm | rate | seed | parameters | {' | '.join(steps)} | to `full` | to `{PRESENT}` |"]
    lines.append("|---|" + "---:|" * (len(steps) + 5))
    for row in sorted(part, key=lambda row: (order.index(row["arm"]), -row["rate"], row["seed"])):
        like = [other for other in part if (other["rate"], other["seed"]) == (row["rate"], row["seed"])]
        errors = [number(row["mae"].get(step)) for step in steps]
        changes = [
            next((change(row["mae"], other["mae"]) for other in like if other["arm"] == name), NONE)
            for name in ("full", PRESENT)
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
    yield _paragraph(
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
    yield _paragraph(
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
