"""Whom an adapter belongs to: the backbone's weights and the city's nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stlora_peft.errors import message


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the backbone, themselves, under their names before any adapter was added."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    wrappers = {
        name: "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else "base_layer"
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for key, value in model.state_dict(keep_vars=True).items():
        name = _base_name(key, wrappers)
        if name is not None:
            yield name, value


def num_base_parameters(model: nn.Module) -> int:
    """Count the backbone's parameters without any adapter's; one that has several names counts once.

    Args:
        model: Backbone with or without adapters. What has no size yet counts as nothing.
    """
    tensors = {id(value): value for _, value in base_tensors(model) if isinstance(value, nn.Parameter)}
    return sum(value.numel() for value in tensors.values() if not is_lazy(value))


def _base_name(key: str, wrappers: dict[str, str]) -> str | None:
    """Drop the wrappers' inner names from a key; None where the key belongs to an adapter."""
    parts, kept, path = key.split("."), [], ""
    skip = False
    for part in parts:
        if skip:
            if part != wrappers[path]:
                return None
            skip = False
        else:
            kept.append(part)
        path = f"{path}.{part}" if path else part
        skip = path in wrappers
    return ".".join(kept)


def fingerprint(model: nn.Module) -> str | None:
    """Hash the backbone's weights: names, shapes, dtypes and values.

    Args:
        model: Backbone with or without adapters (not merged).

    Returns:
        SHA-256 as hexadecimal text, the same before and after adapters are added; None on the meta device.

    Raises:
        ValueError: If a lazy layer has no weights yet.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> fingerprint(layer) == fingerprint(nn.Linear(2, 2))
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(base_tensors(model), key=lambda item: item[0]):
        if is_lazy(value):
            raise ValueError(
                message(
                    f"the backbone's tensor '{name}' has no values yet",
                    expected="a backbone whose weights are there",
                    got="a lazy layer, which gets its size from its first input",
                    fix="run the backbone once, or load its weights, before adapting it",
                )
            )
        if value.device.type == "meta":
            return None
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(expected: str, found: str | None, adapter_name: str) -> None:
    """Raise if an adapter was made for another backbone.

    Raises:
        ValueError: With both fingerprints.
    """
    if found is not None and expected != found:
        raise ValueError(
            message(
                f"stlora adapter '{adapter_name}' belongs to another backbone",
                expected=f"backbone weights with fingerprint {expected[:16]}...",
                got=f"backbone weights with fingerprint {found[:16]}...",
                fix="load the adapter into the backbone that it was trained on, in the same dtype; to use it on this "
                "one all the same, load its config, set base_fingerprint=None and pass config=",
            )
        )


def check_nodes(model: nn.Module, node_ids: Sequence[str]) -> None:
    """Raise unless the active adapter was made for exactly these nodes, in this order; a shared one fits every city.

    Args:
        model: PEFT model.
        node_ids: Names of the city's nodes in the order of its readings.

    Raises:
        ValueError: If the number, the names or the order differ.
    """
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    for name in active:
        if not _knows_nodes(configs.get(name)):
            continue
        known, num_nodes = (getattr(configs.get(name), field, None) for field in ("node_ids", "num_nodes"))
        difference = _difference(known, num_nodes, list(node_ids))
        if difference is None:
            continue
        raise ValueError(
            message(
                f"stlora adapter '{name}' belongs to other nodes",
                expected=difference[0],
                got=difference[1],
                fix="use the adapter of this city, or bring the readings into the adapter's node order",
            )
        )


def _knows_nodes(config: Any) -> bool:
    """Whether an adapter holds anything of single nodes; one of PEFT's own counts by what it says of itself."""
    return getattr(config, "conditioning", None) != "shared" or bool(config.node_bound)


def _difference(known: list[str] | None, num_nodes: int | None, given: list[str]) -> tuple[str, str] | None:
    """What was expected and what came, or None where nothing differs that is known."""
    count = num_nodes if known is None else len(known)
    if count is not None and count != len(given):
        return f"{count} nodes", f"{len(given)} nodes"
    if known is None or known == given:
        return None
    position = next(i for i, (a, b) in enumerate(zip(known, given, strict=True)) if a != b)
    same = " (the same nodes in another order)" if sorted(known) == sorted(given) else ""
    return f"node '{known[position]}' at position {position}", f"node '{given[position]}'{same}"
