"""A model as that of some of its nodes, for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.errors import message
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.node_bound import NodeBoundLayer, node_bound_modules
from stlora_peft.tuner.nodes import NodeTable
from stlora_peft.tuner.predictor import NodePredictor, PredictorLayer

_ROW_FACTORS = ("core", "gate", "node_bias", "node_vector")
_SIZES = ("num_features", "num_embeddings", "num_nodes")


@dataclass(frozen=True)
class NodeTensor:
    """A tensor with an entry for each node.

    Args:
        owner: The module that holds it.
        name: Its name there.
        axis: Its node axis.
        what: Its name in messages.
    """

    owner: nn.Module
    name: str
    axis: int
    what: str

    @property
    def store(self) -> dict[str, Tensor | None]:
        """Where the module keeps it."""
        parameters: Any = self.owner._parameters
        return parameters if self.name in parameters else self.owner._buffers

    @property
    def value(self) -> Tensor:
        """The tensor as it stands."""
        return cast(Tensor, self.store[self.name])

    @property
    def is_buffer(self) -> bool:
        """Whether a forward pass in training mode may change it."""
        return self.name in self.owner._buffers


@contextmanager
def node_subset(
    model: nn.Module, node_ids: Tensor, *, num_core: int | None = None, sparse: bool = False
) -> Iterator[nn.Module]:
    r"""Make a model that of some of its nodes: inside, it forecasts their windows over the edges between them.

    Every tensor with a node axis is read by ``node_ids``: the factors of the active adapters, their node vectors and
    predictors, and the modules that are bound to the nodes (normalisations, tables). Gradients reach these rows of the
    whole tensors, also when ``backward`` is called after the block. Running statistics that change inside are written
    back. Adapters that all nodes share have nothing to cut. Everything is put back at the end, after an error too; a
    block within a block counts the nodes of the outer one.

    The rows are read on entry: an optimiser's step inside does not show before the next block. Inside,
    ``model.parameters()`` and ``state_dict()`` give the rows: make an optimiser, save and load outside.

    Args:
        model: A :class:`peft.PeftModel` with an adapter of this package, or a plain backbone.
        node_ids: Numbers of the nodes, in the order of the node axis of the input. For PyG's ``NeighborLoader`` it is
            the batch's ``n_id``.
        num_core: The first so many nodes have all the neighbours that they need; only theirs are the running
            statistics that are written back. None for all of them; for a ``NeighborLoader`` the batch's
            ``batch_size``.
        sparse: Give sparse gradients to tensors whose first axis is the nodes, so that neither they nor an optimiser
            such as :class:`stlora_peft.sampling.RowAdamW` take time for the other nodes: of the first ``num_core``
            nodes, and of the others that have a gradient other than zero.

    Yields:
        The model.

    Raises:
        ValueError: If a node is not there or named twice, the active adapters differ in their nodes, or a module
            mixes all pairs of nodes and cannot be cut.

    Example:
        >>> from peft import get_peft_model
        >>> from stlora_peft import STLoraConfig
        >>> from stlora_peft.backbones import build_backbone
        >>> backbone = build_backbone("lstm", in_channels=1, hidden_size=4)
        >>> model = get_peft_model(backbone, STLoraConfig(num_nodes=100))
        >>> edges = torch.tensor([[0, 1], [1, 2]])  # between the three nodes, numbered by their place
        >>> with node_subset(model, torch.tensor([70, 3, 42])):
        ...     model(torch.zeros(2, 12, 3, 1), edges).shape  # [b t n c]
        torch.Size([2, 12, 3, 1])
    """
    tensors = list(node_tensors(model))
    sizes = {tensor.value.shape[tensor.axis] for tensor in tensors}
    _check_one_size(tensors, sizes)
    _check_ids(node_ids, next(iter(sizes), None), num_core)
    core = len(node_ids) if num_core is None else num_core
    with ExitStack() as stack:
        written = [_swap(stack, tensor, node_ids, core, sparse) for tensor in tensors]
        for owner, name, value in _other_sizes(model, len(node_ids)):
            _set(stack, owner, name, value)
        yield model
        for whole, rows, axis in filter(None, written):
            ids = node_ids[:core].to(whole.device)
            with torch.no_grad():
                whole.index_copy_(axis, ids, rows.narrow(axis, 0, core))


def node_tensors(model: nn.Module) -> Iterator[NodeTensor]:
    """Find every tensor of a model that has a node axis: those of the active adapters and of node-bound modules.

    Args:
        model: A PEFT model or a plain backbone.

    Yields:
        The tensors.

    Raises:
        ValueError: If a node-bound module cannot be cut.
    """
    for module in model.modules():
        if isinstance(module, STLoraLayer):
            for adapter in _active(module, module.conditioning):
                own = ("A",) if module.conditioning[adapter] == "full" else ()
                for factor in (*own, *_ROW_FACTORS):
                    held = getattr(module, f"nall_{factor}")
                    if adapter in held:
                        yield NodeTensor(held, adapter, 0, f"{factor} of '{module.name}'")
        elif isinstance(module, NodeTable):
            for adapter in _active(module, module.nall_emb):
                yield NodeTensor(module.nall_emb, adapter, 0, "node vectors")
        elif isinstance(module, PredictorLayer):
            for adapter in _active(module, module.nall_predictor):
                yield from _predictor_tensors(cast(NodePredictor, module.nall_predictor[adapter]))
    for name, bound in _bound(model).items():
        axes = _node_axes(bound, name)
        yield from (NodeTensor(bound, tensor, axis, f"{tensor} of '{name}'") for tensor, axis in axes.items())


def _active(module: Any, known: Iterable[str]) -> list[str]:
    """Adapters that a module runs with."""
    return [] if module.disable_adapters else [name for name in module.active_adapters if name in known]


def _bound(model: nn.Module) -> dict[str, nn.Module]:
    """Node-bound modules in use, also inside a PEFT model that is not of this package."""
    base = cast(nn.Module, cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, NodeBoundLayer)}
    if layers:
        return {name: layer.current() for name, layer in layers.items()}
    return {name: _in_use(module) for name, module in node_bound_modules(base).items()}


def _in_use(module: nn.Module) -> nn.Module:
    """The copy that PEFT's ``modules_to_save`` trains, where there is one."""
    copies, active = getattr(module, "modules_to_save", None), getattr(module, "active_adapters", [])
    return next((copies[name] for name in active if name in copies), module) if copies is not None else module


def _predictor_tensors(predictor: NodePredictor) -> Iterator[NodeTensor]:
    own = ("A",) if predictor.config.conditioning == "full" else ()
    for factor in (*own, *_ROW_FACTORS):
        for name in predictor._parameters:
            if name.rpartition("_")[0] == factor:
                yield NodeTensor(predictor, name, 0, f"{name} of the predictor")


def _node_axes(module: nn.Module, name: str) -> dict[str, int]:
    """Tensors of a node-bound module by name, with their node axes."""
    declared = getattr(module, "node_axes", None)
    if declared is not None:
        return dict(declared)
    if isinstance(module, _BatchNorm):
        held = {**module._parameters, **module._buffers}
        return {key: 0 for key, value in held.items() if value is not None and value.ndim == 1}
    if isinstance(module, nn.Embedding):
        return {"weight": 0}
    raise ValueError(
        message(
            f"node-bound module '{name}' cannot be cut to some of the nodes",
            expected="nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding, or a module whose node_axes name "
            "its tensors and their node axes",
            got=f"{type(module).__name__}, whose numbers belong to pairs of nodes or to all nodes together",
            fix="train on the whole graph of one city, or take a backbone whose nodes only meet along edges",
        )
    )


def _swap(
    stack: ExitStack, tensor: NodeTensor, node_ids: Tensor, core: int, sparse: bool
) -> tuple[Tensor, Tensor, int] | None:
    """Put the rows in the place of the whole tensor; of a buffer return both, to be written back."""
    store, name, whole = tensor.store, tensor.name, tensor.value
    ids = node_ids.to(whole.device)
    with torch.enable_grad():
        rows = _Rows.apply(whole, ids, tensor.axis, core, sparse and tensor.axis == 0)  # type: ignore[no-untyped-call]
    store[name] = rows
    stack.callback(store.__setitem__, name, whole)
    return (whole, rows, tensor.axis) if tensor.is_buffer else None


class _Rows(torch.autograd.Function):
    """Entries of a node axis; unlike those of ``index_select`` its gradients can be sparse, and taken twice."""

    @staticmethod
    def forward(whole: Tensor, ids: Tensor, axis: int, core: int, sparse: bool) -> Tensor:
        """Read the rows."""
        return whole.index_select(axis, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the ids outside of what a backward pass frees."""
        whole, ctx.ids, ctx.axis, ctx.core, ctx.sparse = inputs
        ctx.shape = whole.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Put the gradient of each row in its place."""
        if ctx.sparse:
            kept = grad.reshape(len(grad), -1).any(1)
            kept[: ctx.core] = True
            # The sum of what one tensor got from several blocks is left to whoever coalesces it.
            found = torch.sparse_coo_tensor(ctx.ids[kept][None], grad[kept], ctx.shape, check_invariants=False)
        else:
            found = grad.new_zeros(ctx.shape).index_copy(ctx.axis, ctx.ids, grad)
        return found, None, None, None, None


def _other_sizes(model: nn.Module, count: int) -> Iterator[tuple[Any, str, Any]]:
    """Everything else that says how many nodes there are: where it stands, and what it is to be."""
    for module in model.modules():
        if isinstance(module, STLoraLayer):
            known = dict(module.num_nodes) | dict.fromkeys(_active(module, module.num_nodes), count)
            yield module, "num_nodes", known
        elif isinstance(module, PredictorLayer):
            for adapter in _active(module, module.nall_predictor):
                predictor = cast(NodePredictor, module.nall_predictor[adapter])
                config = copy.copy(predictor.config)  # the adapter's own is what a file would say
                config.num_nodes = count
                yield predictor, "config", config
    for bound in _bound(model).values():
        yield from ((bound, name, count) for name in _SIZES if getattr(bound, name, 0))


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Give an attribute another value until the stack is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _check_one_size(tensors: list[NodeTensor], sizes: set[int]) -> None:
    """Raise where the tensors belong to different numbers of nodes."""
    if len(sizes) > 1:
        found = {tensor.value.shape[tensor.axis]: tensor.what for tensor in tensors}
        raise ValueError(
            message(
                "the nodes of the model cannot be told",
                expected="one number of nodes in everything that is active",
                got=", ".join(f"N={size} in {what}" for size, what in sorted(found.items())),
                fix="activate the adapter of one city with set_adapter(<name>)",
            )
        )


def _check_ids(node_ids: Any, num_nodes: int | None, num_core: int | None) -> None:
    """Raise where the ids are no numbers of nodes, each once."""
    if not isinstance(node_ids, Tensor) or node_ids.ndim != 1 or node_ids.dtype != torch.long or not len(node_ids):
        shaped = isinstance(node_ids, Tensor)
        got = f"shape {tuple(node_ids.shape)}, {node_ids.dtype}" if shaped else type(node_ids).__name__
        _refuse("a tensor of node numbers, shape (n,), int64, at least one", got)
    if bool((node_ids < 0).any()) or (num_nodes is not None and bool((node_ids >= num_nodes).any())):
        known = "0 or larger" if num_nodes is None else f"from 0 to {num_nodes - 1}, for N={num_nodes} nodes"
        _refuse(f"numbers {known}", f"numbers from {int(node_ids.min())} to {int(node_ids.max())}")
    values, counts = node_ids.unique(return_counts=True)
    if len(values) != len(node_ids):
        _refuse("every node once", f"node {int(values[counts.argmax()])} {int(counts.max())} times")
    if num_core is not None and not 0 < num_core <= len(node_ids):
        _refuse(f"num_core from 1 to {len(node_ids)}, the number of node_ids", f"num_core={num_core}")


def _refuse(expected: str, got: str) -> None:
    raise ValueError(
        message(
            "these nodes cannot be taken from the model",
            expected=expected,
            got=got,
            fix="give places in the order of the city's nodes, as the adapter was built; a subset of a subset counts "
            "the nodes of the outer one",
        )
    )
