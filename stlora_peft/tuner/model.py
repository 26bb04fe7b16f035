"""The tuner: finds the layers to adapt, puts adapters on them and takes them off again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stlora_peft.errors import message
from stlora_peft.tuner.bare_layers import ATTRIBUTE as GATES
from stlora_peft.tuner.bare_layers import STLoraGCLSTM
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.guards import check_backbone_config, check_cached_graphs, check_names
from stlora_peft.tuner.hosts import host_class
from stlora_peft.tuner.known_layers import layer_layout
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.merging import check_mergeable
from stlora_peft.tuner.node_bound import NodeBoundLayer, find_module, spec_of
from stlora_peft.tuner.nodes import TABLE_ATTRIBUTE, NodeTable, attach_table, begin_pass, detach
from stlora_peft.tuner.predictor import (
    ATTRIBUTE,
    PredictorLayer,
    attach_predictor,
    correct_forecast,
)
from stlora_peft.tuner.preparation import PreparingTuner, check_supported, layer_rank
from stlora_peft.tuner.registration import PREFIX


class STLoraModel(PreparingTuner):
    """PEFT's tuner class for ST-LoRA; made by ``get_peft_model(backbone, STLoraConfig(...))``.

    Besides the adapted layers it owns what a city needs once: the node table of
    ``conditioning="embedding"`` and the node-specific predictor (children of the backbone named
    ``stlora_nodes`` and ``stlora_predictor``), and copies of the backbone's node-bound modules.
    """

    prefix: str = PREFIX
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's class attribute

    # -- injection --------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter on the backbone, as PEFT's method of this name does.

        Args:
            model: The backbone.
            adapter_name: Name of the adapter.
            autocast_adapter_dtype: Keep adapter weights in float32 on a half-precision backbone.
            low_cpu_mem_usage: Make the adapter's weights on the meta device, to be loaded afterwards.
            state_dict: Take the layers to adapt from the keys of an adapter's state dict.
        """
        config = cast(STLoraConfig, self.peft_config[adapter_name])
        if not config.inference_mode:  # PEFT promises that a loaded adapter keeps the config object that was passed
            # What is filled in here belongs to this backbone, and the caller may use the config for another.
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        others = [name for name in self.peft_config if name != adapter_name]
        check_names(config, adapter_name, others, list(self._module_names()))
        check_backbone_config(model)
        check_cached_graphs(model)
        if state_dict is not None:  # of its keys, PEFT takes the names of layers
            state_dict = {key.replace(f".{GATES}.", "."): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            self._add_city_modules(model, adapter_name, config)
        for module in model.modules():
            if isinstance(module, (NodeBoundLayer, NodeTable, PredictorLayer)):
                module.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            if isinstance(module, BaseTunerLayer) and not model.training:
                module.eval()  # new modules begin in training mode, with dropout, whatever the backbone's mode is
        self._train_backbone(model)
        self._keep_frozen_statistics()

    def _add_city_modules(self, model: nn.Module, adapter_name: str, config: STLoraConfig) -> None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        table = None
        if config.conditioning == "embedding":
            table = attach_table(model)
            sizes = (config.num_nodes or 0, config.emb_size)
            table.update_layer(adapter_name, *sizes, like, emb_noise=config.emb_noise)
            for layer in self._layers():
                if adapter_name in layer.nall_B:
                    layer.node_table[adapter_name] = table
        if config.predictor is not None:
            attach_predictor(model).update_layer(adapter_name, config, like, table)
        for name in config.node_bound or []:
            module = find_module(model, name)
            if not isinstance(module, NodeBoundLayer):
                parent, _, child = name.rpartition(".")
                wrapper = NodeBoundLayer(module, name)
                self._replace_module(model.get_submodule(parent), child, wrapper, module)
                module = wrapper
            whole, frozen = not config.freeze_backbone, config.freeze_node_bound
            module.update_layer(adapter_name, config.num_nodes or 0, whole=whole, frozen=frozen)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(STLoraConfig, peft_config)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_supported(base, current_key, parent)
        alpha_key = get_pattern_key(list(config.alpha_pattern), current_key)
        adapted = isinstance(target, STLoraLayer | STLoraGCLSTM)
        layer = cast(Any, target if adapted else cast(Any, host_class(target))(target, current_key))
        layer.update_layer(
            adapter_name,
            config,
            r=layer_rank(config, current_key),
            lora_alpha=config.alpha_pattern.get(alpha_key, config.lora_alpha or 0.0),
            layout=layer_layout(self.model, config.node_layout, current_key) or layer.default_layout,
        )
        if layer is not target:
            spec = spec_of(self.model)
            layer.final_state = spec is not None and current_key in spec.final_state
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module under every parent that holds it."""
        setattr(parent, child_name, new_module)
        for module in self.model.modules():
            if module is new_module:
                continue
            for name, held in list(module._modules.items()):
                if held is child:
                    setattr(module, name, new_module)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if any(part in key.split(".") for part in ("original_module", "modules_to_save")):
            return False
        return check_target_module_exists(peft_config, key)

    # -- training mode ----------------------------------------------------------------------------------

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._train_backbone(model)

    def _train_backbone(self, model: nn.Module) -> None:
        """Let the backbone train, or not, as the active adapters say; without a joint adapter it is left as it is."""
        configs = cast(dict[str, STLoraConfig], self.peft_config)
        if all(config.freeze_backbone for config in configs.values()):
            return
        own = {id(p) for m in model.modules() for p in _adapter_parameters(m)}
        replaced = {id(p) for m in model.modules() if isinstance(m, NodeBoundLayer) for p in m.base_layer.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in own and parameter.is_floating_point():
                parameter.requires_grad = not self._frozen() and id(parameter) not in replaced

    def _frozen(self) -> bool:
        configs = [cast(STLoraConfig, self.peft_config[n]) for n in self.active_adapters if n in self.peft_config]
        return all(config.freeze_backbone or config.inference_mode for config in configs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones.

        Args:
            adapter_name: Name or names.
            inference_mode: Do not train them.
        """
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_backbone(self.model)
        self._keep_frozen_statistics()

    def train(self, mode: bool = True) -> STLoraModel:
        """Set training mode; running statistics of a frozen backbone stay as they are."""
        super().train(mode)
        self._keep_frozen_statistics()
        return self

    def _keep_frozen_statistics(self) -> None:
        if self._frozen():
            for module in _frozen_norms(self.model):
                module.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone as a module: PEFT calls its forward, which passes the predictor's hook by."""
        return self.model(*args, **kwargs)

    # -- merging, unloading, batches of several cities ----------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, NodeBoundLayer):
                module.match_statistics(adapter_name)

    def _layers(self) -> Iterator[STLoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, STLoraLayer))

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise, before any layer is touched, if one of them would."""
        names = adapter_names or self.active_adapters
        for layer in self._layers():
            own = [name for name in names if name in layer.nall_B]
            for name in own:
                check_mergeable(layer.merge_refusal(name), name, layer.name)
            if safe_merge and own:
                layer.merged_weight([name for name in own if name not in layer.merged_adapters], safe_merge)
        for module in self.model.modules():
            if isinstance(module, NodeBoundLayer):
                module.copy_of(names)
        predictor = getattr(self.model, ATTRIBUTE, None)
        for name in names:
            if predictor is not None and name in predictor.nall_predictor:
                check_mergeable("the node-specific predictor is a network of its own", name, "the backbone")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold shared adapters into the backbone's weights.

        Args:
            adapter_names: Adapters to fold; the active ones by default.
            safe_merge: Refuse a result that is not finite.

        Raises:
            ValueError: If an adapter depends on the node, or the result is not finite. Nothing is changed then.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        detach(self.model, ATTRIBUTE, correct_forecast)
        detach(self.model, TABLE_ATTRIBUTE, begin_pass)
        unload = cast(Any, super())._unload_and_optionally_merge  # annotated to return nothing
        model = unload(merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        if hasattr(model, "peft_config"):  # PEFT 0.18 leaves it there
            del model.peft_config
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                message(
                    "adapters cannot be mixed in one batch",
                    expected="one active adapter for the whole batch",
                    got=f"adapter_names={kwargs['adapter_names']}",
                    fix="call set_adapter(<city>) and pass that city's rows; cities differ in their nodes",
                )
            )
        yield


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters whose training PEFT switches: those of adapters and of modules_to_save."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from module.parameters()
    elif isinstance(module, BaseTunerLayer):
        for name in module.adapter_layer_names:
            yield from cast(nn.Module, getattr(module, name)).parameters()


def _frozen_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Normalisation layers with running statistics that are neither node-bound copies nor trained copies."""
    pattern = re.compile(r"(^|\.)(nall_node_bound|modules_to_save)\.")
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and not pattern.search(name):
            yield module
