"""What a comparison found, in words and tables: means over seeds, and ``results.md``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stlora_peft.differences import difference_text, differences
from stlora_peft.files import atomic_write
from stlora_peft.provenance import environment

if TYPE_CHECKING:
    from stlora_peft.significance import Difference

Row = Mapping[str, Any]
KIB = 1024
COLUMNS = (
    "st-lora to it: its MAE relative to the row's, with a 95 % interval from a bootstrap over days and seeds; with "
    "fewer than five seeds the interval is too narrow. s to best: wall time of the search, with the first seed, to "
    "its best validation. peak MiB: what the training took at most beyond what was in use before."
)


@dataclass(frozen=True)
class Spread:
    """Mean of a number over seeds, and how far they spread.

    Args:
        mean: Mean, or None where a seed has no finite number.
        std: Sample standard deviation, or None for fewer than two seeds.
    """

    mean: float | None
    std: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Summarise numbers.

        Args:
            values: One for each seed; None is a number that was not finite.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, std=1.4142135623730951)
        """
        known = [value for value in values if value is not None]
        if len(known) < len(list(values)) or not known:
            return cls(None)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)

    def text(self, decimals: int = 3) -> str:
        """Write ``mean ± std``.

        Args:
            decimals: Digits after the point.

        Example:
            >>> Spread(2.0, 0.1).text(), Spread(2.0).text(1), Spread(None).text()
            ('2.000 ± 0.100', '2.0', '-')
        """
        if self.mean is None:
            return "-"
        spread = "" if self.std is None else f" ± {self.std:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


@dataclass(frozen=True)
class Summary:
    """One method with one number of days, over its seeds.

    Args:
        method: Name of the method.
        implementation: How it was realised.
        days: Days that were given, None for all before the test part.
        seeds: Its seeds.
        errors: Spread of ``"mae"``, ``"rmse"`` and ``"mape"``, by horizon (``"3"``, ..., ``"average"``).
        trainable_parameters: Parameters that were trained.
        total_parameters: Parameters of the whole model.
        adapter_bytes: What the city needs on disk beside the backbone.
        seconds: Training time of the run that counts.
        seconds_to_best: Wall time to the best validation, where something validated.
        peak_memory: Bytes that the training took at most, where the system says.
    """

    method: str
    implementation: str
    days: float | None
    seeds: tuple[int, ...]
    errors: Mapping[str, Mapping[str, Spread]]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    seconds: float
    seconds_to_best: float | None = None
    peak_memory: int | None = None

    @property
    def mae(self) -> Spread:
        """Mean absolute error over all horizons."""
        return self.errors["average"]["mae"]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Put the rows of all seeds of a method together.

    Methods that train nothing give the same numbers for every seed: they count once and have no spread.

    Args:
        rows: Rows of :func:`stlora_peft.comparison.compare`.

    Returns:
        One summary for each number of days and method, in the order in which they first appear.
    """
    groups: dict[tuple[float | None, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["days"], row["method"]), []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(rows: list[Row]) -> Summary:
    """Summarise the rows of one method."""
    first = rows[0]
    if first["trainable_parameters"] == 0:
        rows = rows[:1]
    errors = {
        horizon: {name: Spread.of([row["horizons"][horizon][name] for row in rows]) for name in known}
        for horizon, known in first["horizons"].items()
    }
    chosen = [f"seed {row['seed']} chose {row['choice']['chosen']}" for row in rows if row.get("choice")]
    known = ("method", "days", "trainable_parameters", "total_parameters", "adapter_bytes")
    return Summary(
        **{name: first[name] for name in known},
        implementation="; ".join([first["implementation"], *chosen]),
        seeds=tuple(row["seed"] for row in rows),
        errors=errors,
        seconds=statistics.fmean(row["seconds"] for row in rows),
        seconds_to_best=next((row["seconds_to_best"] for row in rows if row.get("seconds_to_best") is not None), None),
        peak_memory=max((row["peak_memory"] for row in rows if row.get("peak_memory") is not None), default=None),
    )


def in_order(rows: Iterable[Row], methods: Iterable[str]) -> list[Row]:
    """Order rows by their method, whatever was measured first.

    Args:
        rows: Rows of a comparison.
        methods: The order; rows of other methods come before them.

    Returns:
        The rows; those of one method stay as they are.

    Example:
        >>> [row["method"] for row in in_order([{"method": "full"}, {"method": "lora"}], ["lora", "full"])]
        ['lora', 'full']
    """
    places = {name: place for place, name in enumerate(methods)}
    return sorted(rows, key=lambda row: places.get(row["method"], -1))


def write_markdown(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    title: str,
    quantity: str,
    interval_minutes: int,
    settings: Mapping[str, object],
    figure: str | None = None,
) -> None:
    """Write a comparison as a page of Markdown.

    Args:
        path: The file.
        rows: Rows of :func:`stlora_peft.comparison.compare`.
        title: Heading of the page.
        quantity: What is measured, with its unit.
        interval_minutes: Minutes of a step.
        settings: What else the rows share, by name.
        figure: File name of the figure, where there is one.
    """
    summaries = summarise(rows)
    unit = quantity or "the readings' own units"
    lines = [f"# {title}", "", f"Errors on the test part, the last 20 % of the record; MAE and RMSE: {unit}."]
    lines += ["Mean ± sample standard deviation over seeds. The lowest MAE is bold.", COLUMNS, ""]
    for days in dict.fromkeys(summary.days for summary in summaries):
        chosen = [summary for summary in summaries if summary.days == days]
        heading = days_name(days)
        table = markdown_table(chosen, interval_minutes, differences(rows))
        lines += [f"## {heading[0].upper()}{heading[1:]}", "", *table, ""]
    if figure is not None:
        lines += [f"![MAE of the methods, and MAE against trained parameters]({figure})", ""]
    lines += ["## Methods", "", *(f"- `{name}`: {how}" for name, how in _implementations(summaries).items()), ""]
    lines += ["## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in {**settings, **environment(rows)}.items()]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown_table(
    summaries: Sequence[Summary],
    interval_minutes: int,
    ahead: Mapping[tuple[float | None, str], Difference] | None = None,
) -> list[str]:
    """Lines of a Markdown table with one row for each method.

    Args:
        summaries: The methods.
        interval_minutes: Minutes of a step.
        ahead: What :func:`stlora_peft.differences.differences` found.

    Returns:
        The lines.
    """
    ahead = ahead or {}
    steps = [horizon for horizon in summaries[0].errors if horizon != "average"]
    heads = ["method", "MAE", *(f"MAE {horizon_name(step, interval_minutes)}" for step in steps), "RMSE", "MAPE %"]
    heads += ["st-lora to it", "trained parameters", "file KiB", "s to best", "training s", "peak MiB", "seeds"]
    means = [summary.mae.mean for summary in summaries if summary.mae.mean is not None]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for summary in summaries:
        average = summary.errors["average"]
        bold = "**" if means and summary.mae.mean == min(means) else ""
        cells = [f"`{summary.method}`", f"{bold}{summary.mae.text()}{bold}"]
        cells += [summary.errors[step]["mae"].text() for step in steps]
        cells += [average["rmse"].text(), average["mape"].text(1)]
        cells += [difference_text(ahead.get((summary.days, summary.method))), f"{summary.trainable_parameters:,}"]
        cells += [f"{summary.adapter_bytes / KIB:.0f}", _rounded(summary.seconds_to_best), f"{summary.seconds:.0f}"]
        cells += [_rounded(summary.peak_memory, KIB * KIB), _seeds(summary)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rounded(value: float | None, unit: float = 1.0) -> str:
    """A number in whole units, or a dash."""
    return "-" if value is None else f"{value / unit:.0f}"


def _seeds(summary: Summary) -> str:
    """Seeds of a method; what trains nothing has none."""
    return ", ".join(map(str, summary.seeds)) if summary.trainable_parameters else "-"


def _implementations(summaries: Sequence[Summary]) -> dict[str, str]:
    """How each method was realised, by name."""
    return {summary.method: summary.implementation for summary in summaries}


def days_name(days: float | None) -> str:
    """Call a number of given days.

    Example:
        >>> days_name(3), days_name(1), days_name(None)
        ('3 days given', '1 day given', 'all days before the test part given')
    """
    if days is None:
        return "all days before the test part given"
    return f"{days:g} day{'s' * (days != 1)} given"


def horizon_name(horizon: str, interval_minutes: int) -> str:
    """Call a forecast step by its time.

    Example:
        >>> horizon_name("3", 5), horizon_name("average", 5)
        ('15 min', 'average')
    """
    return f"{int(horizon) * interval_minutes} min" if horizon.isdigit() else horizon
