"""Tensors whose shape depends on the number of nodes: rebuild them for another city."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.errors import message
from stlora_peft.tuner.nodes import AdapterModule
from stlora_peft.tuner.spec import BackboneSpec


def spec_of(backbone: nn.Module) -> BackboneSpec | None:
    """What a known backbone says about itself, or None."""
    spec: BackboneSpec | None = getattr(type(backbone), "stlora_spec", None)
    return spec


def bound_size(module: nn.Module, name: str) -> int:
    """Number of nodes that a node-bound module was built for.

    Raises:
        ValueError: If this kind of module cannot be rebuilt.
    """
    if hasattr(module, "resized"):
        return int(cast(Any, module).num_nodes)
    if isinstance(module, _BatchNorm):
        return module.num_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    raise ValueError(
        message(
            f"node-bound module '{name}' cannot be rebuilt for another city",
            expected="nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding, or a module with num_nodes and "
            "resized(num_nodes)",
            got=type(module).__name__,
            fix="leave it out of node_bound, or train it whole with modules_to_save if the number of nodes stays",
        )
    )


def resize(module: nn.Module, num_nodes: int, name: str) -> nn.Module:
    r"""Copy a node-bound module for ``num_nodes`` nodes.

    With the number of nodes unchanged it is an exact copy. Otherwise every row is the mean over the old
    nodes; a running variance is that of the nodes' mixture, :math:`\overline{v} + \mathrm{var}(m)`. A module with
    an attribute ``num_nodes`` and a method ``resized(num_nodes)`` says itself what it becomes.

    Args:
        module: Module with one entry for each node.
        num_nodes: Number of nodes of the new city.
        name: Its name, for errors.

    Returns:
        A new module; the old one is not changed.
    """
    if hasattr(module, "resized"):
        return cast(nn.Module, cast(Any, module).resized(num_nodes))
    new = copy.deepcopy(module)
    if bound_size(module, name) == num_nodes:
        return new
    means = {key: _mean_row(value, num_nodes) for key, value in _node_tensors(module).items()}
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        means["running_var"] = means["running_var"] + module.running_mean.var(correction=0)
    for key, value in means.items():
        if key in new._buffers:
            new._buffers[key] = value
        else:
            new._parameters[key] = nn.Parameter(value)
    setattr(new, "num_features" if isinstance(module, _BatchNorm) else "num_embeddings", num_nodes)
    return new


def adapted_module(module: nn.Module, num_nodes: int, name: str, *, whole: bool) -> nn.Module:
    """Make what an adapter trains of a node-bound module: what its method ``adapted`` says, or else a whole copy.

    Args:
        module: The backbone's module, which is not changed.
        num_nodes: Number of nodes of the adapter's city.
        name: Its name, for errors.
        whole: Make a whole copy in any case, as where the backbone trains too.

    Returns:
        A new module.
    """
    if hasattr(module, "adapted") and not whole:
        return cast(nn.Module, cast(Any, module).adapted(num_nodes))
    return resize(module, num_nodes, name)


def _node_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {key: value.detach() for key, value in named if value.ndim > 0}


def _mean_row(value: Tensor, num_nodes: int) -> Tensor:
    return value.mean(dim=0, keepdim=True).expand(num_nodes, *value.shape[1:]).clone()


class NodeBoundLayer(AdapterModule):
    """A module with one entry for each node, with what :func:`adapted_module` makes of it for each adapter.

    Args:
        base_layer: The backbone's module, kept as it is.
        name: Its name in the backbone.
    """

    adapter_layer_names = ("nall_node_bound",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features = self.out_features = bound_size(base_layer, name)
        self.nall_node_bound = nn.ModuleDict()
        self.frozen: set[str] = set()

    def update_layer(self, adapter_name: str, num_nodes: int, *, whole: bool = False, frozen: bool = False) -> None:
        """Add an adapter's copy, to be trained unless it is frozen."""
        self.nall_node_bound[adapter_name] = adapted_module(self.base_layer, num_nodes, self.name, whole=whole)
        self.frozen -= {adapter_name}
        if frozen:
            self.frozen.add(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as PEFT's method of this name does; a frozen copy stays so."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the training of adapters, as PEFT's method of this name does; a frozen copy stays so."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.frozen & set(self.nall_node_bound):
            self.nall_node_bound[name].requires_grad_(False)

    def current(self) -> nn.Module:
        """The copy of the active adapter, or the backbone's module where no adapter is active.

        Raises:
            ValueError: If several active adapters have a copy.
        """
        return self.base_layer if self.disable_adapters else self.copy_of(self.active_adapters)

    def copy_of(self, adapter_names: list[str]) -> nn.Module:
        """Return the one copy that these adapters have, or the backbone's module.

        Raises:
            ValueError: If several of them have a copy.
        """
        names = [name for name in adapter_names if name in self.nall_node_bound]
        if len(names) > 1:
            raise ValueError(
                message(
                    f"node-bound module '{self.name}' belongs to one city",
                    expected="one active adapter",
                    got=f"the active adapters {names}",
                    fix=f"call set_adapter({names[0]!r})",
                )
            )
        return self.nall_node_bound[names[0]] if names else self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the copy that is active.

        Raises:
            ValueError: If the input has another number of nodes than the active copy.
        """
        module = self.current()
        if isinstance(module, _BatchNorm) and x.shape[1] != module.num_features:
            raise ValueError(
                message(
                    f"node-bound module '{self.name}': wrong number of nodes",
                    expected=f"N={module.num_features} on axis 1",
                    got=f"N={x.shape[1]} from an input of shape {tuple(x.shape)}",
                    fix="activate the adapter of this city; without one, rebuild(backbone, num_nodes) makes the "
                    "backbone fit it",
                )
            )
        out = module(x, *args, **kwargs)
        # The copy may be kept in float32 on a half-precision backbone.
        return out.to(x.dtype if x.is_floating_point() else cast(Tensor, self.base_layer.weight).dtype)

    def match_statistics(self, adapter_name: str) -> None:
        """Bring the running statistics of a copy into the dtype of its weights, as normalisation demands."""
        if adapter_name in self.nall_node_bound:
            copied = self.nall_node_bound[adapter_name]
            for parameter in list(copied.parameters())[:1]:
                copied.to(parameter.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark the adapter's copy as the one to keep."""
        names = [n for n in (adapter_names or self.active_adapters) if n in self.nall_node_bound]
        self.merged_adapters.extend(n for n in names if n not in self.merged_adapters)

    def unmerge(self) -> None:
        """Forget the mark."""
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module to put back: the adapter's copy after merging, else the backbone's."""
        if not merge:
            return self.base_layer
        chosen = self.copy_of(adapter_names or self.active_adapters)
        return cast(nn.Module, cast(Any, chosen).folded()) if hasattr(chosen, "folded") else chosen

    @property
    def weight(self) -> Tensor:
        """Weight of the copy that is active, for backbones that read a node table without calling it."""
        return cast(Tensor, self.current().weight)

    @property
    def bias(self) -> Tensor:
        """Bias of the copy that is active."""
        return cast(Tensor, self.current().bias)

    def __getattr__(self, name: str) -> Any:
        """Forward what the backbone asks of its module, e.g. ``num_features``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "nall_node_bound"):
                raise
            return getattr(self.current(), name)


def node_bound_modules(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Node-bound modules that are in use: those of the active adapter, or of a plain backbone.

    Args:
        model: Backbone or PEFT model.
        names: Names in a plain backbone; None takes the backbone's own list.

    Returns:
        Module name to module.

    Raises:
        ValueError: If a name is not in the backbone.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NodeBoundLayer)}
    if layers:  # the backbone's own module is another city's
        return {name: layer.current() for name, layer in layers.items() if layer.current() is not layer.base_layer}
    if names is None:
        spec = spec_of(model)
        names = spec.node_bound if spec else ()
    return {name: find_module(model, name) for name in names}


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name, or raise an error that says it is not there."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise ValueError(
            message(
                f"node-bound module '{name}' is not in the backbone",
                expected="the full name of a module",
                got=repr(name),
                fix="take the name from backbone.named_modules()",
            )
        )
    return modules[name]


def rebuild(backbone: nn.Module, num_nodes: int, node_bound: Iterable[str] | None = None) -> nn.Module:
    """Copy a backbone and make it fit another number of nodes.

    Args:
        backbone: Backbone without adapters; it is not changed.
        num_nodes: Number of nodes of the new city.
        node_bound: Names of the modules with one entry for each node; None takes the backbone's own list.

    Returns:
        The copy, its node-bound modules as :func:`resize` makes them.

    Raises:
        ValueError: If a name is not in the backbone or its module cannot be rebuilt.
    """
    new = copy.deepcopy(backbone)
    for name, module in node_bound_modules(new, node_bound).items():
        parent, _, child = name.rpartition(".")
        setattr(new.get_submodule(parent), child, resize(module, num_nodes, name))
    for module in new.modules():
        for cache in ("_cached_edge_index", "_cached_adj_t"):  # PyG's cached=True keeps the old graph
            if hasattr(module, cache):
                setattr(module, cache, None)
    hyperparameters = getattr(new, "hyperparameters", None)
    if isinstance(hyperparameters, dict) and "num_nodes" in hyperparameters:
        cast(Any, new).hyperparameters = {**hyperparameters, "num_nodes": num_nodes}
    return new
