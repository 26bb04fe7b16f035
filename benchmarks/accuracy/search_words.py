"""What was found in the search, in words around figures that come from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from search_arms import ARMS, BEFORE, CLOCK, HASHED, PRESENT
from search_rows import EAST, RATE, SHENZHEN, WEEKEND, Rows, arms_table, change, number, paragraph

UNLIKE3 = ("unlike", 3.0)


def words(rows: Rows) -> Iterator[str]:
    """What was found, in words; they were chosen when the rows of search.json were all there was."""
    yield "# What was tried"
    yield from _how(rows)
    yield "## What is the default now, and why"
    yield _list([*_kept(rows), *_clock(rows)])
    yield from _noise(rows)
    yield from _frugal(rows)
    yield "## What did not help"
    yield _list(_not_kept(rows))
    yield "## Where it loses"
    yield from _loses(rows)


def _how(rows: Rows) -> Iterator[str]:
    yield paragraph(
        "`python benchmarks/accuracy/search.py` measures what stands here and writes this page. All numbers come from "
        "[search.json](../benchmarks/accuracy/search.json); every setting of an arm is said in "
        "[search_arms.py](../benchmarks/accuracy/search_arms.py)."
    )
    yield paragraph(
        "A backbone (`stgcn` where nothing else is said) was pretrained on the source of a pair. Each arm was trained "
        "on the first days of the target and measured on its **development part**: the steps between the given days "
        "and the test part, about 300 windows spread over them. The test part was not looked at. All arms have one "
        "loop: masked MAE, AdamW at "
        f"a constant rate ({RATE:g} where nothing else is said), 32 windows in a batch, gradients cut at 5, a moving "
        "average with decay 0.98, all given windows. The defaults were chosen on these numbers, which flatters them "
        "here; [results](results.md) says how they do on test parts, and where."
    )
    yield paragraph(
        "`weekend` and `unlike` are the same two simulated cities. The record of the first has 14 days, and a weekend "
        "is most of its test part; that of the second 35, and its test part is a whole week. The defaults before the "
        "present one were chosen on the first. That they lose on weekends was seen on its test part; what to do about "
        "it was chosen on the development part of `unlike`."
    )
    yield paragraph(
        "**Most rows have one seed: differences under about 1 % mean nothing, and with one day of `weekend` larger "
        "ones do not either.** There, after 600 steps, seeds 0, 1 and so on gave "
        f"{rows.seeds(WEEKEND, 'full', 600)} with `full`, "
        f"{rows.seeds(WEEKEND, 'full+node-embedding', 600)} with `full+node-embedding`, "
        f"{rows.seeds(WEEKEND, 'gate-dropout0', 600)} with `gate-dropout0`, "
        f"{rows.seeds(WEEKEND, 'dropout0', 600)} with `dropout0` and "
        f"{rows.seeds(WEEKEND, BEFORE, 600)} with `{BEFORE}`. Percentages below are of seed 0 "
        "and compare errors after the largest number of steps that both arms have."
    )


def _kept(rows: Rows) -> Iterator[str]:
    full, gate = "full", "gate-dropout0"
    stopped, best = {"at": "best", "training": "last quarter"}, {"at": "best", "training": "development"}
    yield (
        "**All given days and a fixed number of steps, no early stopping.** With one day of `weekend`, early stopping "
        f"on the last quarter, which is the evening, gave {rows.mae(WEEKEND, full, **stopped)} (`full`) and "
        f"{rows.mae(WEEKEND, gate, **stopped)} (`{gate}`, st-lora as it was then). All given days and 600 steps gave "
        f"{rows.mae(WEEKEND, full, 600)} and {rows.mae(WEEKEND, gate, 600)}. It is the validation that was wrong: all "
        "given days, stopped by the development part itself, which nobody has, gave "
        f"{rows.mae(WEEKEND, full, **best)} and {rows.mae(WEEKEND, gate, **best)}."
    )
    yield (
        "**Node vectors (`embedding`) in place of gates.** Without dropout in both, they change the error by "
        f"{rows.each('dropout0', gate)}. With dropout in both, by {rows.each(BEFORE, 'gate')}. They also need fewer "
        "numbers, the more so the more nodes there are."
    )
    yield (
        f"**Dropout 0.1**, in the forms that have no node vectors, and in `{BEFORE}`. Against none: "
        f"{rows.each(BEFORE, 'dropout0')}. It holds back what one day teaches too "
        f"well: without it the error of `weekend` rises again between 300 and 600 steps. Against 0.1, 0.2 gives "
        f"{rows.each('dropout0.2', BEFORE)}, 0.3 gives {rows.each('dropout0.3', BEFORE)}, and 0.3 in the predictor "
        f"alone {rows.each('predictor-dropout0.3', BEFORE)}."
    )
    yield (
        f"**The predictor, of width 64.** Without it: {rows.each('nopredictor', BEFORE)}. Width 16: "
        f"{rows.each('width16', BEFORE)}; width 128: {rows.each('width128', BEFORE)}. With gates, width 16 against "
        f"64: {rows.each('gate-dropout0-width16', gate)}. The predictor alone, without the layers: "
        f"{rows.each('predictor', BEFORE)}."
    )
    yield (
        f"**Rank 8, and 2 on backbones of 250,000 parameters or more.** Rank 2 gives {rows.each('rank2', BEFORE)}; "
        f"rank 16 {rows.each('rank16', BEFORE)}. Rank 2 was not chosen for its error: on wide backbones rank 8 would "
        "need more than a tenth of their parameters. Ranks were not compared on such a backbone."
    )
    yield f"**Node vectors of width 16.** Width 8: {rows.each('vectors8', BEFORE)}."


def _not_kept(rows: Rows) -> Iterator[str]:
    yield (
        "**Node vectors from each node's history** (level, spread, percentiles, daily course, neighbours), to start "
        f"from: {rows.each('history-dropout0', 'dropout0')}, against random ones, no dropout in both."
    )
    yield (
        "**An adapter pretrained on the source with such vectors, then brought to the target**: a prototype that was "
        "not kept forecast no better than an untrained adapter before the first step, and worse after training."
    )
    yield (
        "**Calibration in closed form as a start.** It is a large step before the first one, on `weekend` with one "
        f"day from {rows.mae(WEEKEND, 'reestimated', 0)} to {rows.mae(WEEKEND, 'calibrated', 0)}, "
        f"and no help in the end: "
        f"{rows.each('calibrated', BEFORE)}."
    )
    yield (
        "**Closed form alone, without training** (`weekend`, 1 day): the backbone as it is "
        f"{rows.mae(WEEKEND, 'zero-shot', 0)}, normalised by the target {rows.mae(WEEKEND, 'reestimated', 0)}, its "
        f"forecast calibrated for the city {rows.mae(WEEKEND, 'calibration-city', 0)} or each node "
        f"{rows.mae(WEEKEND, 'calibration-node', 0)}, with the whole window {rows.mae(WEEKEND, 'window-city', 0)} or "
        f"{rows.mae(WEEKEND, 'window-node', 0)}, `zero-shot+` {rows.mae(WEEKEND, 'zero-shot+', 0)}. Training is far "
        f"ahead ({rows.mae(WEEKEND, BEFORE, 600)})."
    )
    yield (
        f"**Other rates for the node vectors**: three times {rows.each('node-rate3', BEFORE)}, 0.3 times "
        f"{rows.each('node-rate0.3', BEFORE)}. **Weight decay 0.1**: {rows.each('weight-decay0.1', BEFORE)}."
    )
    blocks = {"at": "best", "training": "blocks"}
    yield (
        "**Validation on interleaved blocks** of three hours, in place of the last quarter (`weekend`, 1 day): "
        f"{rows.mae(WEEKEND, 'full', **blocks)} (`full`), {rows.mae(WEEKEND, 'lora', **blocks)} (`lora`), "
        f"{rows.mae(WEEKEND, 'gate-dropout0', **blocks)} (`gate-dropout0`), all behind 600 steps on everything."
    )
    yield (
        f"**A larger alpha** (32 for 16, no dropout): {rows.each('alpha32-dropout0', 'dropout0')}. **A free bias of "
        f"each node** with the predictor: {rows.each('bias', 'dropout0')}. **The backbone trained too**: "
        f"{rows.each('full+embedding-dropout0', 'dropout0')}. All against `dropout0`."
    )


def _loses(rows: Rows) -> Iterator[str]:
    slow = {"at": 300, "rate": 0.001}
    yield paragraph(
        "On `west-east`, two halves of one city with 3 days given, the default before has "
        f"{rows.mae(EAST, BEFORE, 300)} after 300 steps, `full` {rows.mae(EAST, 'full', 300)}, `lora` "
        f"{rows.mae(EAST, 'lora', 300)} and the predictor alone {rows.mae(EAST, 'predictor', 300)}. It is best after "
        "150 steps and grows worse. With a rate of 0.001 default and `full` are level "
        f"({rows.mae(EAST, BEFORE, **slow)} and {rows.mae(EAST, 'full', **slow)})."
    )
    yield paragraph(
        "`full+node-embedding` is the strongest rival: on `weekend` with one day it is ahead of the default after 300 "
        f"steps with seed 0 ({rows.mae(WEEKEND, 'full+node-embedding', 300)} against "
        f"{rows.mae(WEEKEND, BEFORE, 300)}), and behind it after 600 and with the other seeds."
    )


def _clock(rows: Rows) -> Iterator[str]:
    """The clock, measured on records whose development part holds whole weeks."""
    parts = []
    for days, name in ((3.0, "3 days"), (1.0, "1 day")):
        for backbone in ("lstm", "stgcn"):
            place, of = ("unlike", days), {"backbone": backbone}
            kinds = [rows.kinds_of_days(place, arm, **of) for arm in ("full", BEFORE, CLOCK)]
            moved = change(rows.find(place, CLOCK, **of), rows.find(place, BEFORE, **of))
            parts.append(f"`{backbone}`, {name}: {kinds[0]}, {kinds[1]}, {kinds[2]} ({moved})")
    shenzhen = [
        f"{change(rows.find(SHENZHEN, CLOCK, backbone=name), rows.find(SHENZHEN, BEFORE, backbone=name))} (`{name}`)"
        for name in ("lstm", "stgcn")
    ]
    yield (
        "**The predictor reads the clock at the last step of the window**, not at every step. The given days of "
        "`unlike` are working days, and a predictor that sees the whole course of the clock learns their daily course "
        "by heart. On working days / weekends `full`, the clock at every step and at the last step gave: "
        f"{'; '.join(parts)}; in brackets, all days against every step. On `la-shenzhen`: {', '.join(shenzhen)}."
    )


def _noise(rows: Rows) -> Iterator[str]:
    """The noise on node vectors, as a table of errors after the last step that was measured."""
    yield "## Noise on the node vectors, in place of dropout"
    yield paragraph(
        "Training reads a node's vector with noise, drawn anew for every pass and the same in all layers. Of all that "
        f"was tried it helped most: `{PRESENT}` against `{CLOCK}`, the default before it, which has dropout 0.1 and "
        "no noise. Without either (`noise0`) a day is learned by heart. With one day more noise would be as good "
        "or better, with three as good or worse; one number was taken for all. On the working days and weekends of "
        f"`unlike`, `lstm`, 3 days, the default before had {rows.kinds_of_days(UNLIKE3, CLOCK, backbone='lstm')}, the "
        f"present one has {rows.kinds_of_days(UNLIKE3, PRESENT, backbone='lstm')}."
    )
    yield paragraph(
        "Scratch runs that were not kept, one seed: noise drawn for each layer anew was 1 % worse than the same in "
        "all layers; leaving nodes out at random (their vectors zero) 1 to 2 % worse; random shifts of the clock, or "
        "of window and truth together, helped without noise and not beside it; noise on the vectors of "
        "`full+node-embedding` changed its error by less than 1 %."
    )
    arms = ("full", "noise0", CLOCK, "noise-dropout0.1", "noise0.4", PRESENT, "noise1.2", "noise-predictor")
    yield arms_table(rows, arms, PRESENT, CLOCK)


def _frugal(rows: Rows) -> Iterator[str]:
    """Small adapters: what was tried, and how far it is from plain LoRA."""
    gwnet = {"backbone": "gwnet"}
    arms = ("lora", "frugal", "tiny", "tiny-alpha32-noise0.4", "tiny-hashed", "tiny-hashed-1375", "tiny-rank4")
    lora, every, tiny, present, hashed, fewer, rank4 = (rows.row(UNLIKE3, arm, **gwnet) for arm in arms)
    yield "## Small adapters"
    yield paragraph(
        "The frugal adapter before was a narrow predictor alone (`frugal-predictor`). Updates of rank 1 in all "
        "layers, at four times the scale of the default, do more for their numbers than anything else that was tried: "
        "`frugal`. Its vectors have 8 numbers for each node. With so few, noise of 0.4 would be a little better than "
        "the default's 0.8; one number was kept for all."
    )
    yield arms_table(
        rows,
        ("lora", "frugal-predictor", "frugal-nopredictor", "frugal-vectors4", "frugal-noise0.4", "frugal"),
        "frugal",
        "lora",
    )
    yield paragraph(
        "**A hundredth of a large backbone is not enough.** `gwnet` needs rank 1 in every "
        f"layer, {every.get('parameters', 0):,} numbers, to come close to `lora`, which trains "
        f"{lora.get('parameters', 0):,} ({rows.mae(UNLIKE3, 'lora', 600, **gwnet)}). With {tiny['parameters']:,}, the "
        f"skip layers alone (`tiny`) are {change(tiny['mae'], lora['mae'])} from it, with alpha 32 and half the noise "
        f"{change(present['mae'], lora['mae'])}; other layers are further. To keep all layers, each update was cut in "
        "two (`tiny-half`: the larger matrix is fixed at a singular vector of the weight) or shared by repeated "
        "layers (`tiny-tied`): for their numbers, neither does more than the skip layers. With every entry of rank 4 "
        f"in all layers moved by one of {HASHED:,} shared numbers, drawn by lot (`tiny-hashed`, after "
        "[Uni-LoRA](https://arxiv.org/abs/2506.00799)), it is "
        f"{change(hashed['mae'], lora['mae'])} with {hashed['parameters']:,}: nearer than the skip layers, and still "
        "behind `lora`, so it was not built in. Half as many shared numbers: "
        f"{change(fewer['mae'], lora['mae'])}; none shared: {change(rank4['mae'], lora['mae'])} with "
        f"{rank4['parameters']:,}. So `gwnet` has the frugal adapter of the others; few layers are left to backbones "
        "that name them: `d2stgnn` and `staeformer`, of 300,000 parameters and more."
    )
    names = [name for name in ARMS if name.startswith(("frugal", "tiny"))]
    lines = ["| arm on `gwnet`, `unlike`, 3 days | parameters | 150 | 300 | 600 | to `lora` |", "|---|" + "---:|" * 5]
    for name in ("lora", *names):
        row = rows.row(UNLIKE3, name, **gwnet)
        if row["mae"]:
            errors = [number(row["mae"].get(step)) for step in ("150", "300", "600")]
            cells = [f"`{name}`", f"{row['parameters']:,}", *errors, change(row["mae"], lora["mae"])]
            lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(paragraph(f"- {item}", "  ") for item in items)
