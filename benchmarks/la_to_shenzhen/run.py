"""Los Angeles to Shenzhen with three days of data: the README's table, by the README's commands.

    python benchmarks/la_to_shenzhen/run.py [--data ../shared/data]

Needs ``la-loop.npz`` and ``shenzhen-flow.npz``, which are not part of this repository; without them it says so and
ends. An interrupted run goes on where it stopped. Writes ``results.json``, ``results.md`` and ``results.png`` beside
this file, then the README (``benchmarks/write_readme.py``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
METHODS = "zero-shot,persistence,ha,var,svr,head,full,lora,st-lora"


def stlora(*arguments: str | Path) -> None:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "stlora_peft.cli", *map(str, arguments)]
    print("$ stlora " + " ".join(map(str, arguments)), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    """Pretrain where that has not been done, compare, and copy the results here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    source, target = options.data / "la-loop.npz", options.data / "shenzhen-flow.npz"
    for file in (source, target):
        if not file.exists():
            print(f"skipped: '{file}' is not there; pass the folder of the data with --data")
            return
    base, out = options.runs / "la", options.runs / "compare"
    if not (base / "backbone.json").exists():
        stlora("pretrain", source, "--backbone", "stgcn", "--out", base)
    stlora("compare", target, "--base", base, "--days", 3, "--methods", METHODS, "--seeds", "0,1,2", "--out", out)
    for name in ("results.json", "results.md", "results.png"):
        shutil.copyfile(out / name, FOLDER / name)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "write_readme.py"], check=True)


if __name__ == "__main__":
    main()
