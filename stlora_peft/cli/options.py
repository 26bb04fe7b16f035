"""Options that several commands share, each with its unit in the help."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stlora_peft.cli.files import read_list
from stlora_peft.cli.screen import DEBUG, Screen

if TYPE_CHECKING:
    from torch import nn

    from stlora_peft.data import City, CityData
    from stlora_peft.metrics import Metrics
    from stlora_peft.sampling import SubGraph
    from stlora_peft.training import TrainingOptions

_READING, _TRAINING, _OUTPUT = "Reading the city", "Training", "Output"


def _remember_debug(context: typer.Context, value: bool) -> bool:
    """Keep the flag where the group of commands finds it."""
    context.meta[DEBUG] = value
    return value


Base = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the pretrained backbone.", show_default=False)]


@dataclass(frozen=True)
class Reading:
    """Where a city is read from, and what its file does not say."""

    city_file: Annotated[
        Path,
        typer.Argument(
            metavar="CITY",
            help="Readings and graph: .npz of 'stlora simulate' or City.save; PeMS .npz and METR-LA .h5 with --graph.",
            show_default=False,
        ),
    ]
    graph: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Graph where the city's file has none: distances (.csv) or adjacency matrix (.npy, .csv).",
            rich_help_panel=_READING,
            show_default=False,
        ),
    ] = None
    ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of the sensors, one in each line, where the graph uses names: PEMS03.",
            rich_help_panel=_READING,
            show_default=False,
        ),
    ] = None
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Channels to keep, counted from 0; 0 is the flow of PeMS.",
            rich_help_panel=_READING,
            show_default="all",
        ),
    ] = None
    start: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Local time of the record's first step, ISO: 2012-03-01T00:00.",
            rich_help_panel=_READING,
            show_default="what the file says",
        ),
    ] = None
    quantity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What is measured, with its unit, for tables and figures: 'speed (mph)'.",
            rich_help_panel=_READING,
            show_default="what the file says",
        ),
    ] = None
    zeros_missing: Annotated[
        bool, typer.Option("--zeros-missing", help="Readings of exactly 0 are missing.", rich_help_panel=_READING)
    ] = False
    dead_sensors: Annotated[
        Literal["error", "keep", "drop"],
        typer.Option(help="What to do with a sensor that has no reading at all.", rich_help_panel=_READING),
    ] = "error"

    def city(self) -> City:
        """Read the city.

        Raises:
            FileNotFoundError: If a file is absent.
            ValueError: If a file or an option cannot be used.
        """
        from stlora_peft.data import load_city

        city = load_city(
            self.city_file,
            graph=self.graph,
            ids=self.ids,
            channels=None if self.channels is None else read_list("--channels", self.channels, int),
            zeros_are_missing=self.zeros_missing,
            dead_sensors=self.dead_sensors,
            start=self.start,
        )
        return city if self.quantity is None else named(city, quantity=self.quantity)

    def words(self) -> list[str]:
        """Options to repeat in the next command, so that it reads the same city."""
        given: list[str] = []
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                option = "--" + field.name.replace("_", "-")
                given += [option] if value is True else [option, str(value)]
        return given


def named(city: City, **names: str) -> City:
    """Call a city, or what is measured there, otherwise."""
    from stlora_peft.data import City

    known = {field.name: getattr(city, field.name) for field in fields(city)}
    return City(**{**known, **names}, dead_sensors="keep")


@dataclass(frozen=True)
class Training:
    """How long and in what steps a model is trained."""

    epochs: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Passes over the training windows, at most.", rich_help_panel=_TRAINING),
    ] = 50
    patience: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Epochs without a better validation before stopping.", rich_help_panel=_TRAINING
        ),
    ] = 10
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows in one step.", rich_help_panel=_TRAINING)
    ] = 32

    def options(self, *, learning_rate: float = 1e-3, seed: int = 0) -> TrainingOptions:
        """Put them together for the training."""
        from stlora_peft.training import TrainingOptions

        return TrainingOptions(
            learning_rate=learning_rate,
            max_epochs=self.epochs,
            patience=self.patience,
            batch_size=self.batch_size,
            seed=seed,
        )


@dataclass(frozen=True)
class Parts:
    """Whether a city is taken part by part."""

    nodes_per_step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Take the graph in parts of at most N nodes, for cities too large for the memory.",
            rich_help_panel=_TRAINING,
            show_default="the whole graph",
        ),
    ] = None
    hops: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --nodes-per-step: edges around a part within which the other nodes are computed too.",
            rich_help_panel=_TRAINING,
        ),
    ] = 2

    def apply(self, options: TrainingOptions) -> TrainingOptions:
        """Train on the parts, where there are any."""
        return replace(options, nodes_per_step=self.nodes_per_step, hops=self.hops)

    def of(self, data: CityData) -> list[SubGraph] | None:
        """Parts of a city's graph, or None."""
        from stlora_peft.sampling import city_parts

        return None if self.nodes_per_step is None else city_parts(data, self.nodes_per_step, self.hops)

    def errors(self, model: nn.Module, data: CityData) -> Metrics:
        """Errors of a model in the test part of a city."""
        from stlora_peft.evaluation import evaluate
        from stlora_peft.sampling import evaluate_parts

        parts = self.of(data)
        if parts is None:
            return evaluate(model, data.test, data)
        return evaluate_parts(model, data.test, data.scaler, parts)

    def persistence(self, data: CityData) -> Metrics:
        """Errors of persistence there."""
        from stlora_peft.evaluation import evaluate_persistence

        return evaluate_persistence(data.test, data, batch_size=64 if self.nodes_per_step is None else 1)


LearningRate = Annotated[float, typer.Option(metavar="X", help="Step size of AdamW.", rich_help_panel=_TRAINING)]
Seed = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Same seed on the same machine: same numbers.", rich_help_panel=_TRAINING),
]


@dataclass(frozen=True)
class Output:
    """How the command answers."""

    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output, nothing else.", rich_help_panel=_OUTPUT),
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error.",
            callback=_remember_debug,
            is_eager=True,
            rich_help_panel=_OUTPUT,
        ),
    ] = False

    def screen(self) -> Screen:
        """Where the command writes."""
        return Screen(self.as_json)


Force = Annotated[bool, typer.Option("--force", help="Overwrite a result that lies there.", rich_help_panel=_OUTPUT)]
