"""Which commands run in several processes."""

from __future__ import annotations

import os

from stlora_peft.cli.screen import Screen
from stlora_peft.errors import message
from stlora_peft.launch import process_count

SHARED = ("pretrain", "adapt")
_HOW = "accelerate launch --multi_gpu --num_processes 2 --module stlora_peft.cli"


def check_launch(command: str) -> None:
    """Refuse several processes where a command does not share its work out, and say where only one was started.

    Args:
        command: Name of the command.

    Raises:
        ValueError: If the command would do the same, and write the same files, in each of several processes.
    """
    if process_count() > 1 and command not in SHARED:
        raise ValueError(
            message(
                f"command '{command}' runs in one process",
                expected=f"one process, or one of the commands that share their work out: {', '.join(SHARED)}",
                got=f"{process_count()} processes",
                fix=f"run 'stlora {command}' by itself",
            )
        )
    if command in SHARED and process_count() == 1 and _started_alone():
        Screen(as_json=False).note(
            "One process was started: 'accelerate launch --cpu' leaves more to mpirun (--mpirun_hostfile). "
            f"Without it, also on a CPU: {_HOW} {command} ..."
        )


def _started_alone() -> bool:
    """Whether accelerate was asked for several processes on CPUs, for which it only says where they should meet."""
    return os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
