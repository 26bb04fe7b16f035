"""What benchmarks on real cities have in common: where the files are, the command, and where results are kept."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CITIES = ("la-loop.npz", "shenzhen-flow.npz")


def read_options(description: str | None) -> argparse.Namespace:
    """Read ``--data`` and ``--runs``; without the cities say so and end."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    options.data, options.runs = options.data.resolve(), options.runs.resolve()  # the command runs elsewhere
    for name in CITIES:
        if not (options.data / name).exists():
            print(f"skipped: '{options.data / name}' is not there; pass the folder of the data with --data")
            sys.exit(0)
    return options


def stlora(*arguments: str | Path) -> None:
    """Run the command as a user would."""
    print("$ stlora " + " ".join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, "-m", "stlora_peft.cli", *map(str, arguments)], cwd=ROOT, check=True)


def keep(out: Path, folder: Path, *suffixes: str) -> None:
    """Copy the results of a run beside the benchmark."""
    for suffix in suffixes:
        shutil.copyfile(out / f"results{suffix}", folder / f"results{suffix}")
