"""Whether cities may share a forward: tried out, not guessed."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.serving.joined import Joined
from stlora_peft.serving.members import Member, take_apart

TOLERANCE = 1e-6


def joining_refusal(backbone: nn.Module, member: Member, model: PeftModel, window: int, channels: int) -> str:
    """Why a city cannot share a forward with others of its kind, or an empty text.

    The city's nodes, in a ring, are joined with themselves, other readings and heavier edges in the second copy, and
    compared in float64 with the city's own model: a backbone whose nodes hear more than their edges tell gives other
    numbers.

    Args:
        backbone: The frozen backbone.
        member: The city.
        model: The city's own forecaster.
        window: Input steps.
        channels: Input channels of the backbone.

    Raises:
        ValueError: If the city's own model does not run.
    """
    if member.parts.refusal:
        return member.parts.refusal
    device, size = member.place.edge_index.device, member.place.num_nodes
    generator, nodes = torch.Generator().manual_seed(0), torch.arange(size, device=device)
    x = torch.randn(2, window, size, channels, generator=generator, dtype=torch.float64).to(device)
    edges = torch.stack([nodes, nodes.roll(1)])[:, : size if size > 1 else 0]
    weight = 0.2 + torch.rand(edges.shape[1], generator=generator, dtype=torch.float64).to(device)
    alone = copy.deepcopy(model).double().eval()
    parts = take_apart(alone, alone.active_adapters[0], device)
    exact = replace(member, parts=parts, place=replace(member.place, edge_index=edges))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a backbone says of this ring does not concern the user
        try:
            apart = [alone(x[i : i + 1], edges, (1 + 2 * i) * weight) for i in range(2)]
        except Exception as error:  # whatever a backbone of the user's raises
            _check_runs(member, model, x[:1], edges, weight)
            return f"its backbone cannot be tried out in float64 ({_first_line(error)})"
        try:
            together = _twice(copy.deepcopy(backbone).double(), exact, x, torch.cat([weight, 3 * weight]))
        except Exception as error:  # whatever it raises on a larger graph
            return f"its backbone cannot run on two cities side by side ({_first_line(error)})"
    differs = any(
        not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()), equal_nan=True)
        for found, expected in zip(together, apart, strict=True)
    )
    return "in its backbone a node hears more than its edges tell" if differs else ""


def _check_runs(member: Member, model: PeftModel, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> None:
    """Raise if a city's own model does not run in its own precision either."""
    own = copy.deepcopy(model).eval()
    dtype = next((weight.dtype for weight in own.parameters() if weight.is_floating_point()), torch.float32)
    try:
        own(x.to(dtype), edge_index, edge_weight.float())
    except Exception as error:
        raise ValueError(
            message(
                f"city '{member.name}' is not added",
                expected=f"a model that forecasts windows of shape {tuple(x.shape)}",
                got=f"{type(error).__name__}: {_first_line(error)}",
                fix="try the city's adapter alone first, with load_adapter of stlora_peft.storage",
            )
        ) from error


def _twice(backbone: nn.Module, member: Member, x: Tensor, edge_weight: Tensor) -> list[Tensor]:
    """Forecasts of the two copies, ``[b t n c]`` each."""
    joined = Joined(backbone, [member, member])
    joined.edge_weight = edge_weight
    inputs = joined.tiles.join(list(x[:, None]), axis=2)
    return joined.tiles.split(joined(inputs), 2)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
