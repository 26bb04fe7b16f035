"""The paper's table on two excerpts at reduced size, by one command.

    python benchmarks/table/run.py [--data ../shared/data]

Needs ``la-loop.npz`` and ``shenzhen-flow.npz``, which are not part of this repository; without them it says so and
ends. Takes some hours on one core; an interrupted run goes on where it stopped. Writes ``results.json``,
``results.md``, ``results.tex`` and ``results.png`` beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from on_cities import CITIES, keep, read_options, stlora  # noqa: E402 - found by the line above

BUDGET = "--quick --batch-size 16 --learning-rate 0.003 --time-features day --seeds 3".split()


def main() -> None:
    """Fill the table and copy it here."""
    options = read_options(__doc__)
    out = options.runs / "table"
    stlora("table", "--cities", ",".join(str(options.data / name) for name in CITIES), *BUDGET, "--out", out)
    keep(out, FOLDER, ".json", ".md", ".tex", ".png")


if __name__ == "__main__":
    main()
