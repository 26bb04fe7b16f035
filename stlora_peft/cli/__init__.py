"""The ``stlora`` command.

Every command imports what is slow to import in its own body, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from stlora_peft.cli import adapt, compare, convert, demo, evaluate, extend, forecast, pretrain, simulate, table
from stlora_peft.cli.groups import expand
from stlora_peft.cli.launch import check_launch
from stlora_peft.cli.screen import Commands

app = typer.Typer(
    cls=Commands,
    name="stlora",
    help="Adapt a trained spatio-temporal graph network to a new city with a small adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _module, _command in (
    (demo, demo.demo),
    (simulate, simulate.simulate),
    (convert, convert.convert),
    (pretrain, pretrain.pretrain),
    (adapt, adapt.adapt),
    (extend, extend.extend),
    (evaluate, evaluate.evaluate),
    (compare, compare.compare),
    (table, table.table),
    (forecast, forecast.forecast),
):
    app.command(epilog=_module.EXAMPLE)(expand(_command))


def _show_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        from stlora_peft import __version__

        typer.echo(f"stlora-peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt a trained spatio-temporal graph network to a new city with a small adapter."""
    check_launch(str(context.invoked_subcommand))


def main() -> None:
    """Run the ``stlora`` command."""
    app(prog_name="stlora")
