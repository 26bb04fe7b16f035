"""What PEFT would pass over without a word, or stumble on after the training: refused before it begins."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from stlora_peft.errors import message
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.registration import PREFIX


def check_names(
    config: STLoraConfig, adapter_name: str, other_adapters: Collection[str], modules: Collection[str]
) -> None:
    """Raise if the adapter's name, or a module named in its configuration, would be lost silently.

    Args:
        config: The adapter's configuration.
        adapter_name: Its name.
        other_adapters: Names of the adapters that the backbone has already.
        modules: Full names of the backbone's modules, without those of adapters.

    Raises:
        ValueError: If the adapter's name has a dot, or one of several adapters is named like a module; if
            ``modules_to_save`` or ``node_layout`` names nothing, or if a module's name contains the prefix of
            adapter parameters.
    """
    _check_adapter_names(adapter_name, other_adapters, modules)
    for option, names in (("modules_to_save", config.modules_to_save or []), ("node_layout", config.node_layout)):
        for name in names:
            ending = name if option == "modules_to_save" else f".{name}"  # as PEFT and as layouts are looked up
            if not any(module == name or module.endswith(ending) for module in modules):
                raise ValueError(
                    message(
                        f"STLoraConfig.{option}: no module is called '{name}'",
                        expected="the last part of a module's name",
                        got=f"'{name}'",
                        fix="take it from backbone.named_modules()",
                    )
                )
    for module in modules:
        if PREFIX in module:
            raise ValueError(
                message(
                    f"module '{module}' of the backbone has the name of an adapter's tensor",
                    expected=f"no '{PREFIX}' in the names of modules",
                    got=f"'{module}'",
                    fix="rename it: PEFT would take it for part of the adapter",
                )
            )


def _check_adapter_names(adapter_name: str, others: Collection[str], modules: Collection[str]) -> None:
    """PEFT leaves out of a saved adapter what lies under a module named like another adapter."""
    if "." in adapter_name:
        _refuse_name(f"'{adapter_name}' cannot have this name", "a name without dots", f"'{adapter_name}'")
    for name in (adapter_name, *others) if others else ():
        clash = next((module for module in modules if name in module.split(".")), None)
        if clash is not None:
            where = f"'{name}' cannot have this name beside other adapters"
            _refuse_name(where, "a name that no part of the backbone has", f"the name of module '{clash}'")


def _refuse_name(where: str, expected: str, got: str) -> None:
    raise ValueError(
        message(
            f"stlora adapter {where}",
            expected=expected,
            got=got,
            fix="name the adapter after its city, e.g. 'shenzhen'",
        )
    )


def check_backbone_config(backbone: nn.Module) -> None:
    """Raise if PEFT could not save an adapter because of the attribute ``config`` that the backbone has.

    Raises:
        ValueError: If it is an object that PEFT cannot search for a name.
    """
    config = BaseTuner.get_model_config(backbone)
    if config is not None and not hasattr(config, "__contains__"):
        raise ValueError(
            message(
                "the attribute 'config' of the backbone cannot be read by PEFT, which does so when it saves",
                expected="a dict, a dataclass, an argparse.Namespace or an object with to_dict()",
                got=f"a {type(config).__name__}",
                fix="backbone.config = vars(backbone.config), or give the attribute another name",
            )
        )


def check_cached_graphs(backbone: nn.Module) -> None:
    """Raise if a graph convolution still holds the graph of the city that it was last run in.

    Raises:
        ValueError: If a convolution made with ``cached=True`` has been run: it would ignore the new city's edges.
    """
    for name, module in backbone.named_modules():
        if getattr(module, "_cached_edge_index", None) is not None:
            raise ValueError(
                message(
                    f"layer '{name}' keeps the graph of the city that it was last run in",
                    expected="a graph convolution with cached=False, or one that has not been run",
                    got=f"{type(module).__name__}(cached=True) with a cached graph",
                    fix="set cached=False on it and _cached_edge_index=None: with several cities a cache is stale",
                )
            )
