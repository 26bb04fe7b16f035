"""Folders that hold a trained backbone or a city's adapter: safetensors and JSON, never pickle."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn

from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.data import City, Scaler
from stlora_peft.data.windows import TimeFeatures
from stlora_peft.errors import message
from stlora_peft.files import read_json, write_json
from stlora_peft.tensorfiles import load_tensors, save_tensors
from stlora_peft.tuner.identity import check_nodes, fingerprint

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class SourceCity:
    """One of several cities that a backbone was trained on.

    Args:
        city: Its name.
        quantity: What was measured there.
        num_nodes: Number of its nodes.
        scaler: Its statistics.
    """

    city: str
    quantity: str
    num_nodes: int
    scaler: Scaler


@dataclass(frozen=True)
class SavedBackbone:
    """A trained backbone with what was known about the city that it was trained on.

    Args:
        backbone: The forecaster, in evaluation mode.
        scaler: Statistics of that city; of several, those of the first.
        city: Name of that city; of several, all names with ``" + "`` between them.
        quantity: What was measured there, e.g. ``"speed"``.
        time_features: Time encodings that the backbone reads: ``"none"``, ``"day"`` or ``"week"``.
        fingerprint: Hash of the weights.
        versions: Packages that wrote the folder.
        sources: Each of several cities, in the order of their nodes in the backbone; empty where there was one.
    """

    backbone: Forecaster
    scaler: Scaler
    city: str
    quantity: str
    time_features: TimeFeatures
    fingerprint: str
    versions: Mapping[str, str]
    sources: tuple[SourceCity, ...] = ()


def save_backbone(
    directory: str | os.PathLike[str],
    backbone: Forecaster,
    *,
    scaler: Scaler,
    city: str,
    quantity: str = "",
    time_features: TimeFeatures = "day",
    sources: Sequence[SourceCity] = (),
) -> None:
    """Write a trained backbone to a folder: ``backbone.safetensors`` and ``backbone.json``.

    Args:
        directory: The folder; made where it is missing. A backbone that lies there is replaced.
        backbone: The forecaster.
        scaler: Statistics of the city that it was trained on.
        city: Name of that city.
        quantity: What was measured there.
        time_features: Time encodings that the backbone reads.
        sources: The cities, where it was trained on several; :func:`stlora_peft.sources.described` makes all of this.

    Example:
        >>> import tempfile
        >>> from stlora_peft.backbones import build_backbone
        >>> folder = tempfile.mkdtemp()
        >>> model = build_backbone("lstm", in_channels=3, hidden_size=4)
        >>> save_backbone(folder, model, scaler=Scaler(mean=(50.0,), std=(10.0,)), city="simulated")
        >>> load_backbone(folder).city
        'simulated'
    """
    folder = Path(directory)
    save_tensors(folder / WEIGHTS, backbone.state_dict())
    write_json(
        folder / DESCRIPTION,
        {
            "format": FORMAT,
            "name": backbone.name,
            "hyperparameters": backbone.hyperparameters,
            "window": backbone.window,
            "horizon": backbone.horizon,
            "time_features": time_features,
            "city": city,
            "quantity": quantity,
            "scaler": scaler.to_dict(),
            "fingerprint": fingerprint(backbone),
            "versions": _versions(),
            **({"sources": [{**vars(one), "scaler": one.scaler.to_dict()} for one in sources]} if sources else {}),
        },
    )


def load_backbone(directory: str | os.PathLike[str]) -> SavedBackbone:
    """Read a backbone that :func:`save_backbone` wrote.

    Args:
        directory: The folder.

    Returns:
        The backbone, on the CPU and in evaluation mode, and what is known about it.

    Raises:
        FileNotFoundError: If one of the two files is absent.
        ValueError: If a file is damaged, holds values that are not finite, or does not fit the other.
        ImportError: If the backbone needs a package that is not installed.
    """
    folder = Path(directory)
    known = _description(folder / DESCRIPTION)
    try:
        backbone = build_backbone(known["name"], **known["hyperparameters"])
        scaler = Scaler.from_dict(known["scaler"])
        found_sources = [{**one, "scaler": Scaler.from_dict(one["scaler"])} for one in known.get("sources", ())]
        sources = tuple(SourceCity(**one) for one in found_sources)
    except (TypeError, ValueError, KeyError) as error:
        _refuse(folder / DESCRIPTION, "the description of a backbone of this version", str(error))
    _load_state(backbone, load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    found = fingerprint(backbone)
    if found != known["fingerprint"]:
        _refuse(folder / WEIGHTS, f"weights with the fingerprint {known['fingerprint']}", f"weights with {found}")
    return SavedBackbone(
        backbone=backbone.eval(),
        scaler=scaler,
        sources=sources,
        **{key: known[key] for key in ("city", "quantity", "time_features", "fingerprint", "versions")},
    )


def save_adapter(directory: str | os.PathLike[str], model: PeftModel) -> None:
    """Write the active adapter of a model to a folder, as PEFT's ``save_pretrained`` does, or not at all.

    The files are written beside the folder first and then put in place by renaming. An adapter that lies there is
    replaced; other files of the folder stay.

    Args:
        directory: The folder.
        model: Model with one active adapter.

    Raises:
        ValueError: If the folder holds something else than an adapter.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / ADAPTER_CONFIG).exists())):
        raise ValueError(
            message(
                f"folder '{target}' is not an adapter and is not overwritten",
                expected=f"a new or empty folder, or one with '{ADAPTER_CONFIG}' in it",
                got="a folder with other files" if target.is_dir() else "a file",
                fix="give another folder",
            )
        )
    name = model.active_adapters[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        written, before = Path(temporary, "new"), Path(temporary, "before")
        model.save_pretrained(str(written), selected_adapters=[name])
        _replace_folder(written if name == "default" else written / name, target, before)


def load_adapter(backbone: nn.Module, directory: str | os.PathLike[str], city: City | None = None) -> PeftModel:
    """Put a saved adapter on a copy of its backbone.

    Args:
        backbone: The backbone as it was pretrained, for the city that it was pretrained on. It is not changed.
        directory: Folder of the adapter.
        city: The city that is to be forecast. Its nodes are compared with those of the adapter.

    Returns:
        The forecaster of the adapter's city, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no adapter in the folder.
        ValueError: If the adapter is damaged, or belongs to another backbone or to other nodes.
    """
    folder = Path(directory)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            message(
                f"there is no adapter in folder '{folder}'",
                expected=f"the files '{ADAPTER_CONFIG}' and '{ADAPTER_WEIGHTS}'",
                got=f"no file '{ADAPTER_CONFIG}'",
                fix="check the path, or make an adapter with 'stlora adapt'",
            )
        )
    read_json(folder / ADAPTER_CONFIG)
    load_tensors(folder / ADAPTER_WEIGHTS)
    model = PeftModel.from_pretrained(copy.deepcopy(backbone), str(folder))
    if city is not None:
        check_nodes(model, city.node_ids)
    return model.eval()


def _description(path: Path) -> dict[str, Any]:
    """Read ``backbone.json`` and check that it has every key."""
    known: dict[str, Any] = read_json(path)
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        got = f"format {known.get('format')!r}" if isinstance(known, dict) else f"a {type(known).__name__}"
        _refuse(path, f"a description of format {FORMAT}", got)
    keys = ("name", "hyperparameters", "scaler", "fingerprint", "city", "quantity", "time_features", "versions")
    missing = [key for key in keys if key not in known]
    if missing:
        _refuse(path, f"the keys {', '.join(keys)}", f"no key {', '.join(missing)}")
    return known


def _load_state(backbone: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy the tensors into the backbone, all or none."""
    wanted = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            _refuse(
                path,
                f"tensor '{name}' of shape {wanted[name]}" if name in wanted else f"no tensor '{name}'",
                f"shape {found[name]}" if name in found else "no such tensor",
            )
    backbone.load_state_dict(tensors)


def _replace_folder(source: Path, target: Path, before: Path) -> None:
    """Rename ``source`` to ``target``; what else lay there stays, and a failure puts it back."""
    if not target.exists():
        os.rename(source, target)
        return
    os.rename(target, before)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(before, target)
        raise
    for entry in before.iterdir():
        if not (target / entry.name).exists():
            shutil.move(entry, target / entry.name)


def _versions() -> dict[str, str]:
    """Return the versions of the packages that a saved backbone depends on."""
    found = {}
    for package in ("stlora-peft", "torch", "torch-geometric", "torch-geometric-temporal"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _refuse(path: Path, expected: str, got: str) -> NoReturn:
    """Raise the error of a file that cannot be used."""
    raise ValueError(
        message(
            f"file '{path}' cannot be used",
            expected=expected,
            got=got,
            fix="copy the whole folder again, or train the backbone again with 'stlora pretrain'",
        )
    )
