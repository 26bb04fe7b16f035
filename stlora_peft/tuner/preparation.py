"""What happens to an adapter's configuration before the backbone is touched: defaults filled in, mistakes found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from stlora_peft.errors import message
from stlora_peft.tuner.bare_layers import STLoraGates, STLoraGCLSTM
from stlora_peft.tuner.config import PredictorConfig, STLoraConfig
from stlora_peft.tuner.host_layers import STLoraLinear
from stlora_peft.tuner.hosts import HostLayer, host_class, host_names, inner_targets, registered_hosts, remember
from stlora_peft.tuner.identity import check_fingerprint, fingerprint, num_base_parameters
from stlora_peft.tuner.manifest import check_tensors, expected_tensors
from stlora_peft.tuner.node_bound import NodeBoundLayer, bound_size, find_module, spec_of
from stlora_peft.tuner.nodes import NodeTable
from stlora_peft.tuner.predictor import PredictorLayer, required_size
from stlora_peft.tuner.probe import stop_watching, watch_targets

logger = logging.getLogger("stlora_peft")


class PreparingTuner(BaseTuner):
    """A tuner that resolves and checks an :class:`STLoraConfig` against its backbone."""

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Read the backbone's configuration; what is no dictionary counts as none."""
        config = BaseTuner.get_model_config(model)
        return config if isinstance(config, dict) else {"model_type": "custom"}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the backbone, and have the targets that are never called reported."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        watch_targets(model, adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        stop_watching(self.model)
        return cast(Any, super())._unload_and_optionally_merge(*args, **kwargs)  # annotated to return nothing

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        config = cast(STLoraConfig, peft_config)
        name = next(key for key, value in self.peft_config.items() if value is config)
        if config.num_nodes is None and (config.conditioning != "shared" or config.node_bound):
            raise ValueError(
                message(
                    f"stlora adapter '{name}': the number of nodes is not known",
                    expected="STLoraConfig(num_nodes=<N>)",
                    got="num_nodes=None",
                    fix="pass the number of nodes (sensors) of the city",
                )
            )
        for layer, described in config.host_layers.items():
            remember(layer, HostLayer(**described))
        self._resolve_targets(config)
        self._resolve_predictor(config)
        config.resolve(num_base_parameters(self.model))
        self._resolve_node_bound(config)
        self._check_targets(config)
        self._resolve_fingerprint(config, name)
        self._check_saved_tensors(config, name)
        return config

    def _resolve_targets(self, config: STLoraConfig) -> None:
        spec = spec_of(self.model)
        if config.target_modules is None:
            if spec is None:
                raise ValueError(
                    message(
                        "Please specify `target_modules` in STLoraConfig",
                        expected="names of layers, or a backbone with defaults of its own",
                        got=f"target_modules=None on a {type(self.model).__name__}",
                        fix="pass target_modules=[<names from backbone.named_modules()>] or 'all-linear'",
                    )
                )
            config.target_modules = set(spec.target_modules)
        elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = set(self._all_linear())
        elif not config.target_modules and config.predictor is not None:
            config.target_modules = DUMMY_TARGET_MODULES  # PEFT's name for an adapter without layers

    def _all_linear(self) -> Iterator[str]:
        for key, module in self._candidates():
            base = module.base_layer if isinstance(module, STLoraLinear) else module
            if isinstance(base, nn.Module) and host_class(base) is STLoraLinear and STLoraLinear.refusal(base) is None:
                yield key

    def _candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """Named modules of the backbone that are not inside an adapter or a copy of PEFT's."""
        inner: list[str] = []
        for key, module in self.model.named_modules():
            if not key or any(key.startswith(prefix) for prefix in inner):
                continue
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                inner.append(f"{key}.")
            if not isinstance(module, (NodeBoundLayer, NodeTable, PredictorLayer, STLoraGates)):
                yield key, module

    def _module_names(self) -> Iterator[str]:
        """Names that the backbone's modules have, wrapped or not."""
        yield from (key for key, _ in self._candidates())
        wrappers = (AuxiliaryTrainingWrapper, NodeBoundLayer)
        yield from (key for key, module in self.model.named_modules() if isinstance(module, wrappers))

    def _resolve_predictor(self, config: STLoraConfig) -> None:
        spec = spec_of(self.model)
        if config.predictor == "auto":
            config.predictor = None
            if config.conditioning != "shared" and spec is not None:
                config.predictor = PredictorConfig(input_layout=spec.input_layout, output_layout=spec.output_layout)
            elif config.conditioning != "shared":
                logger.warning(
                    "The node-specific predictor is off: the output layout of %s is not known. Switch it on with "
                    "STLoraConfig(predictor=PredictorConfig(window=..., horizon=..., in_channels=..., "
                    "out_channels=...)).",
                    type(self.model).__name__,
                )
        if isinstance(config.predictor, PredictorConfig):
            for name in ("window", "horizon", "in_channels", "out_channels"):
                if getattr(config.predictor, name) is None:
                    setattr(config.predictor, name, getattr(self.model, name, None))
                required_size(config.predictor, name)
            for name in ("window", "horizon"):
                if getattr(config, name) is None:
                    setattr(config, name, getattr(config.predictor, name))

    def _resolve_node_bound(self, config: STLoraConfig) -> None:
        if config.node_bound is None:
            spec = spec_of(self.model)
            config.node_bound = list(spec.node_bound) if spec and config.num_nodes is not None else []
        for name in config.node_bound:
            bound_size(self._node_bound(name), name)

    def _node_bound(self, name: str) -> nn.Module:
        """The backbone's own node-bound module, also where adapters have copies of it."""
        module = find_module(self.model, name)
        return module.base_layer if isinstance(module, NodeBoundLayer) else module

    def _targets(self, config: STLoraConfig) -> dict[str, nn.Module]:
        """Layers to adapt by name, without the adapters that they may have."""
        return {
            key: _without_adapters(module)
            for key, module in self._candidates()
            if check_target_module_exists(config, key)
        }

    def _check_targets(self, config: STLoraConfig) -> None:
        targets = self._targets(config)
        config.host_layers = registered_hosts(list(targets.values()))
        wrapped = [key for key, base in targets.items() if getattr(host_class(base), "inner", None) is None]
        for key, base in targets.items():
            check_supported(base, key, self.model.get_submodule(key.rpartition(".")[0]))
            outer = next((other for other in wrapped if key.startswith(f"{other}.")), None)
            if outer is not None:
                raise ValueError(
                    message(
                        f"layer '{key}' is a part of layer '{outer}'",
                        expected="layers that are not inside each other",
                        got="both in target_modules",
                        fix="leave one of them out, or name it in exclude_modules",
                    )
                )
        needs_root = config.conditioning == "embedding" or config.predictor is not None
        if needs_root and isinstance(self.model, (nn.Sequential, nn.ModuleList)):
            raise ValueError(
                message(
                    f"a {type(self.model).__name__} cannot hold node vectors or a predictor",
                    expected="a backbone with a forward of its own",
                    got=f"a bare {type(self.model).__name__}, which would call them as layers",
                    fix="wrap it in an nn.Module, or use conditioning='gate' and predictor=None",
                )
            )

    def _check_saved_tensors(self, config: STLoraConfig, name: str) -> None:
        if config.tensors is not None:
            targets = self._targets(config).items()
            layers = {_adapter_path(key, base): (base, layer_rank(config, key)) for key, base in targets}
            bound = {key: self._node_bound(key) for key in config.node_bound or []}
            check_tensors(self.model, config.tensors, expected_tensors(config, layers, bound), name)
            config.tensors = None

    def _resolve_fingerprint(self, config: STLoraConfig, name: str) -> None:
        found = fingerprint(self.model)
        if config.base_fingerprint is not None:
            check_fingerprint(config.base_fingerprint, found, name)
        elif config.freeze_backbone:
            config.base_fingerprint = found


def _without_adapters(module: nn.Module) -> nn.Module:
    """The backbone's own layer."""
    if isinstance(module, STLoraGCLSTM):
        return module.cell
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _adapter_path(key: str, base: nn.Module) -> str:
    """Name of the module that holds the adapters of layer ``key``."""
    inner = getattr(host_class(base), "inner", None)
    return f"{key}.{inner}" if inner else key


def layer_rank(config: STLoraConfig, key: str) -> int:
    """Rank of the layer ``key``."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.rank)


def check_supported(layer: nn.Module, key: str, parent: nn.Module) -> None:
    """Raise unless ``layer`` can be adapted."""
    host = host_class(layer)
    reason = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if host is not None:
        refusal = host.refusal(layer)
        if isinstance(parent, nn.TransformerEncoderLayer):
            refusal = "nn.TransformerEncoderLayer reads its weights without calling it when it does not train"
        if refusal is None:
            return
        reason = f"{reason}; {refusal}"
    elif inner_targets(layer):
        reason = f"{reason}; its convolutions can be targets instead: {', '.join(inner_targets(layer))}"
    raise ValueError(
        message(
            f"layer '{key}' cannot be adapted",
            expected=f"one of {', '.join(host_names())}, or a class of your own",
            got=reason,
            fix="leave it out of target_modules (or name it in exclude_modules), train it with modules_to_save, or "
            "register its class with register_host_layer",
        )
    )
