"""Los Angeles to Shenzhen with three days of data: the README's table, by the README's commands.

    python benchmarks/la_to_shenzhen/run.py [--data ../shared/data]

Needs ``la-loop.npz`` and ``shenzhen-flow.npz``, which are not part of this repository; without them it says so and
ends. An interrupted run goes on where it stopped. Writes ``results.json``, ``results.md`` and ``results.png`` beside
this file, then the README (``benchmarks/write_readme.py``).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from on_cities import CITIES, ROOT, keep, read_options, stlora  # noqa: E402 - found by the line above

METHODS = (
    "zero-shot,zero-shot+,persistence,ha,var,svr,head,norm,ia3,node-embedding,node-prompt,lora,full,"
    "full+node-embedding,st-lora-frugal,st-lora"
)
SEARCH = ["--epochs", "20", "--patience", "5"]  # for each rate; the last training has 600 steps


def main() -> None:
    """Pretrain where that has not been done, compare, and copy the results here."""
    options = read_options(__doc__)
    source, target = (options.data / name for name in CITIES)
    base, out = options.runs / "la", options.runs / "compare"
    if not (base / "backbone.json").exists():
        stlora("pretrain", source, "--backbone", "stgcn", "--out", base)
    plan = ["--days", "3", "--methods", METHODS, "--seeds", "0,1,2", *SEARCH]
    stlora("compare", target, "--base", base, *plan, "--out", out)
    keep(out, FOLDER, ".json", ".md", ".png")
    subprocess.run([sys.executable, ROOT / "benchmarks" / "write_readme.py"], check=True)


if __name__ == "__main__":
    main()
