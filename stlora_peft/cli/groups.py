"""Groups of options that several commands share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of the dataclasses among its parameters.

    typer reads the options off a function's signature. A parameter whose type is a dataclass stands for the
    dataclass's fields there, and the command receives the filled dataclass.

    Args:
        command: Function of which some parameters are annotated with dataclasses.

    Returns:
        The function that typer is to read and call.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Sizes:
        ...     width: int = 2
        ...     height: int = 3
        >>> def area(sizes: Sizes, scale: int = 1) -> None:
        ...     print(sizes.width * sizes.height * scale)
        >>> inspect.signature(expand(area))
        <Signature (*, width: int = 2, height: int = 3, scale: int = 1) -> None>
        >>> expand(area)(width=5, height=3, scale=1)
        15
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _fields_as_parameters(groups[name])
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fields_as_parameters(group: type[Any]) -> list[inspect.Parameter]:
    """One parameter for each field of a dataclass."""
    known = typing.get_type_hints(group, include_extras=True)
    return [_parameter(field.name, known[field.name], _default(field)) for field in fields(group)]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Make a parameter that needs no place among the others."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: Field[Any]) -> Any:
    """Default of a field, as a signature says it."""
    return inspect.Parameter.empty if field.default is MISSING else field.default
