"""Every kind of layer that can be adapted, in the layouts that it is met in, and what the formula gives for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from einops import rearrange
from reference import Temporal
from torch import Tensor, nn
from toys import factors_of, graph

from stlora_peft.backbones import tgt

gnn = pytest.importorskip("torch_geometric.nn")

B, T, N, C, D = 2, 6, 3, 4, 5
R, ALPHA = 2, 5
EDGES, WEIGHTS = graph(N)


@dataclass(frozen=True)
class Host:
    """One layer to adapt and how its input is laid out.

    ``pattern`` is einops' pattern of the input and ``layout`` ours where they differ; ``call`` runs the layer and
    gives the tensor that the update is added to; ``temporal`` says what a convolution along time is; ``root`` gives
    what the update reads of the input. ``inside`` computes the layer with an update that is not added to its output;
    ``part`` names the part of the layer that holds the adapters, where they do not wrap it.
    """

    name: str
    make: Callable[[], nn.Module]
    pattern: str = "b t n c"
    layout: str | None = None
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)
    temporal: Temporal | None = None
    on_output: bool = False
    root: Callable[[Tensor], Tensor] = lambda x: x
    inside: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    part: str = ""

    def __str__(self) -> str:
        return self.name

    def factors(self, model: nn.Module) -> dict[str, Tensor]:
        return factors_of(model, f"base_model.model.layer{self.part}")

    def fold(self, x: Tensor) -> Tensor:
        return rearrange(x, f"b t n c -> {self.pattern}")

    def unfold(self, x: Tensor) -> Tensor:
        return rearrange(x, f"{self.pattern} -> b t n c", n=N, **({"b": B} if "(b t" in self.pattern else {}))


def graph_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, EDGES, WEIGHTS)


def union_call(layer: nn.Module, x: Tensor) -> Tensor:
    copies = x.shape[-2] // N
    edges = torch.cat([EDGES + N * i for i in range(copies)], dim=1)
    return layer(x, edges, WEIGHTS.repeat(copies))


def union(x: Tensor) -> tuple[Tensor, Tensor]:
    """Edges and float32 weights (DConv makes ones of that type) of as many copies of the graph as ``x`` has."""
    copies = x.shape[-2] // N
    return torch.cat([EDGES + N * i for i in range(copies)], dim=1), WEIGHTS.float().repeat(copies)


def unweighted_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, EDGES)


def pair_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer((x.flip(-2), x), EDGES)


def relation_call(layer: nn.Module, x: Tensor) -> Tensor:
    edges, _ = union(x)
    return layer(x, edges, torch.arange(edges.shape[1]) % 2)


def gated_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, union(x)[0])


def diffusion_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, *union(x))


def attention_call(layer: nn.Module, x: Tensor) -> Tensor:
    attention = torch.linspace(0.5, 1.5, N * N, dtype=x.dtype).view(1, N, N).expand(x.shape[0], N, N)
    return layer(x, EDGES, attention, WEIGHTS)


def adaptive_call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.linspace(-1, 1, N * 2, dtype=x.dtype).view(N, 2))


SENSOR, ALONG, AGAINST = "sensor", ("sensor", "along", "sensor"), ("sensor", "against", "sensor")
ONE_WAY = torch.tensor([[0, 0, 1], [1, 2, 2]])
TYPES = {ALONG: ONE_WAY, AGAINST: ONE_WAY.flip(0)}


def states(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two states of a cell, different at every sample, step and node of ``x``."""
    h = torch.linspace(-1, 1, x[..., 0].numel() * D, dtype=x.dtype).view(*x.shape[:-1], D)
    return h, h.flip(-1) / 2


def cell_call(layer: nn.Module, x: Tensor) -> Tensor:
    """Both new states, side by side; the states before are those of the nodes in the layout ``b t n c``."""
    if x.ndim > 2:
        return torch.cat(layer(x, EDGES, WEIGHTS, *states(x)), dim=-1)
    edges, _ = union(x)
    weights = WEIGHTS.repeat(x.shape[-2] // N)
    return torch.cat(layer(x, edge_index=edges, edge_weight=weights, H=states(x)[0], C=states(x)[1]), dim=-1)


def cell_loop(base: nn.Module, x: Tensor, update: Tensor) -> Tensor:
    h, c = states(x)
    adjacency = reference.dense_graph(EDGES, WEIGHTS, N)
    gates = reference.gate_products(x, [getattr(base, f"W_{gate}") for gate in "ifco"], update)
    for g, gate in enumerate("ifco"):
        conv = getattr(base, f"conv_{gate}")
        heard = reference.cheb_base(h, [lin.weight for lin in conv.lins], conv.bias, adjacency)
        gates[g] = gates[g] + heard + getattr(base, f"b_{gate}")
    return torch.cat(reference.lstm_gates(gates, c), dim=-1)


def hetero_cell() -> nn.Module:
    """A cell for one type of node, joined by two types of edges, with its sizes known."""
    cell = tgt_layer("hetero.heterogclstm.HeteroGCLSTM")({SENSOR: C}, D, ([SENSOR], [ALONG, AGAINST]))
    cell({SENSOR: torch.zeros(N, C)}, TYPES)
    return cell


def hetero_call(layer: nn.Module, x: Tensor) -> Tensor:
    h, c = states(x)
    after = layer({SENSOR: x}, TYPES, h_dict={SENSOR: h}, c_dict={SENSOR: c})
    return torch.cat([state[SENSOR] for state in after], dim=-1)


def hetero_loop(base: nn.Module, x: Tensor, update: Tensor) -> Tensor:
    h, c = states(x)
    gates = reference.gate_products(x, [getattr(base, f"W_{gate}")[SENSOR] for gate in "ifco"], update)
    for g, gate in enumerate("ifco"):
        for kind, edges in TYPES.items():
            conv = getattr(base, f"conv_{gate}").convs[kind]
            heard = reference.mean_of_neighbours(h, edges) @ conv.lin_l.weight.T + conv.lin_l.bias
            gates[g] = gates[g] + heard + h @ conv.lin_r.weight.T
        gates[g] = gates[g] + getattr(base, f"b_{gate}")[SENSOR]
    return torch.cat(reference.lstm_gates(gates, c), dim=-1)


def widened(x: Tensor) -> Tensor:
    """What GatedGraphConv makes of a narrower input."""
    return F.pad(x, (0, D - C))


def tgt_layer(name: str) -> Callable[..., nn.Module]:
    """Look up a layer of torch-geometric-temporal by the end of its name."""
    module, _, attribute = f"{tgt.load().__name__}.nn.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def self_attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def conv1d(temporal: Temporal, padding: Any = 0, pattern: str = "(b n) c t") -> Host:
    def make() -> nn.Module:
        return nn.Conv1d(
            C, D, temporal.kernel, temporal.stride, padding, temporal.dilation, padding_mode=temporal.mode
        )

    return Host(f"conv1d[{pattern}]{_tag(temporal)}", make, pattern, temporal=temporal)


def conv2d(temporal: Temporal, padding: Any = 0, pattern: str = "b c n t") -> Host:
    def pair(value: int, other: int = 1) -> tuple[int, int]:
        return (value, other) if pattern.endswith("t n") else (other, value)

    def make() -> nn.Module:
        pads = pair(padding, 0) if isinstance(padding, int) else padding
        return nn.Conv2d(
            C,
            D,
            pair(temporal.kernel),
            pair(temporal.stride),
            pads,
            pair(temporal.dilation),
            padding_mode=temporal.mode,
        )

    return Host(f"conv2d[{pattern}]{_tag(temporal)}", make, pattern, temporal=temporal)


def _tag(temporal: Temporal) -> str:
    pads = f"p{temporal.before}{temporal.after}{temporal.mode}" if temporal.before or temporal.after else ""
    return f"k{temporal.kernel}s{temporal.stride}d{temporal.dilation}{pads}"


PLAIN, WIDE = Temporal(3), Temporal(3, stride=2, dilation=2, before=3, after=3)
SAME = Temporal(4, before=1, after=2)
CIRCULAR, REFLECT = Temporal(3, before=2, after=2, mode="circular"), Temporal(3, before=1, after=1, mode="reflect")

LINEAR = [
    Host("linear", lambda: nn.Linear(C, D)),
    Host("linear[b n t c]", lambda: nn.Linear(C, D), "b n t c"),
    Host("linear[(b n) t c]", lambda: nn.Linear(C, D), "(b n) t c"),
    Host("linear[(n b) t c]", lambda: nn.Linear(C, D), "(n b) t c"),
    Host("linear[t (b n) c]", lambda: nn.Linear(C, D), "t (b n) c"),
    Host("linear[(b t n) c]", lambda: nn.Linear(C, D, bias=False), "(b t n) c"),
    Host("linear[... n c]", lambda: nn.Linear(C, D), layout="... n c"),
    Host("pyg linear", lambda: gnn.Linear(C, D)),
    Host("pyg linear[(b t n) c]", lambda: gnn.Linear(C, D), "(b t n) c"),
]
CONV = [
    conv1d(Temporal()),
    conv1d(PLAIN),
    conv1d(PLAIN, pattern="(n b) c t"),
    conv1d(Temporal(1, stride=2)),
    conv1d(WIDE, padding=3),
    conv1d(SAME, padding="same"),
    conv1d(CIRCULAR, padding=2),
    conv2d(Temporal()),
    conv2d(Temporal(), pattern="b c t n"),
    conv2d(PLAIN),
    conv2d(PLAIN, pattern="b c t n"),
    conv2d(Temporal(1, stride=2)),
    conv2d(WIDE, padding=3),
    conv2d(WIDE, padding=3, pattern="b c t n"),
    conv2d(SAME, padding="same"),
    conv2d(SAME, padding="same", pattern="b c t n"),
    conv2d(CIRCULAR, padding=2),
    conv2d(CIRCULAR, padding=2, pattern="b c t n"),
    conv2d(REFLECT, padding=1),
    conv2d(REFLECT, padding=1, pattern="b c t n"),
    conv2d(WIDE, padding=3, pattern="(b n) c 1 t"),
    conv2d(CIRCULAR, padding=2, pattern="(b n) c 1 t"),
    conv2d(PLAIN, pattern="(n b) c 1 t"),
]
GRAPH = [
    Host("gcn[b t n c]", lambda: gnn.GCNConv(C, D), layout="... n c", call=graph_call),
    Host("gcn[b t n c] by default", lambda: gnn.GCNConv(C, D), layout="", call=graph_call),
    Host("gcn[(b t n) c]", lambda: gnn.GCNConv(C, D), "(b t n) c", layout="", call=union_call),
    Host("gcn[t (b n) c]", lambda: gnn.GCNConv(C, D), "t (b n) c", layout="", call=union_call),
    Host("cheb[b t n c]", lambda: gnn.ChebConv(C, D, K=3), layout="", call=graph_call),
    Host("cheb[(b t n) c]", lambda: gnn.ChebConv(C, D, K=3), "(b t n) c", layout="", call=union_call),
]
GRAPH += [
    Host("sage[b t n c]", lambda: gnn.SAGEConv(C, D), layout="", call=unweighted_call),
    Host("sage[(b t n) c]", lambda: gnn.SAGEConv(C, D), "(b t n) c", layout="", call=gated_call),
    Host("sage of a pair", lambda: gnn.SAGEConv((C, C), D), layout="", call=pair_call),
    Host("sage without root", lambda: gnn.SAGEConv(C, D, root_weight=False), layout="", call=unweighted_call),
    Host("rgcn", lambda: gnn.RGCNConv(C, D, 2), "(b t n) c", layout="", call=relation_call),
    Host("gated", lambda: gnn.GatedGraphConv(D, 2), "(b t n) c", layout="", call=gated_call, root=widened),
    Host("dconv", lambda: tgt_layer("recurrent.dcrnn.DConv")(C, D, 3), "(b t n) c", layout="", call=diffusion_call),
    Host(
        "batched dconv",
        lambda: tgt_layer("recurrent.dcrnn.BatchedDConv")(C, D, 2),
        "(b t n) c",
        layout="",
        call=diffusion_call,
    ),
    Host(
        "cheb with attention",
        lambda: tgt_layer("attention.astgcn.ChebConvAttention")(C, D, 2, normalization="sym"),
        "(b t) n c",
        layout="",
        call=attention_call,
    ),
    Host(
        "node-adaptive conv",
        lambda: tgt_layer("recurrent.agcrn.AVWGCN")(C, D, 2, 2),
        "(b t) n c",
        layout="",
        call=adaptive_call,
    ),
]
ATTENTION = [
    Host("attention", lambda: nn.MultiheadAttention(C, 2, batch_first=True), "(b n) t c", call=self_attention),
    Host("attention over nodes", lambda: nn.MultiheadAttention(C, 2), "n (b t) c", call=self_attention),
    Host(
        "encoder layer",
        lambda: nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True),
        "(b n) t c",
        call=lambda layer, x: layer(x),
    ),
]
RECURRENT = [
    Host("lstm[(b n) t c]", lambda: nn.LSTM(C, D, batch_first=True), "(b n) t c", call=first, on_output=True),
    Host("lstm[t (b n) c]", lambda: nn.LSTM(C, D), "t (b n) c", call=first, on_output=True),
    Host("lstm[t (n b) c]", lambda: nn.LSTM(C, D), "t (n b) c", call=first, on_output=True),
    Host(
        "lstm deep, both ways, projected",
        lambda: nn.LSTM(C, D, 2, batch_first=True, bidirectional=True, proj_size=3),
        "(b n) t c",
        call=first,
        on_output=True,
    ),
    Host("gru[(b n) t c]", lambda: nn.GRU(C, D, batch_first=True), "(b n) t c", call=first, on_output=True),
    Host("gru deep, both ways", lambda: nn.GRU(C, D, 2, bidirectional=True), "t (b n) c", call=first, on_output=True),
]
CELLS = [
    Host("gru cell", lambda: nn.GRUCell(C, D), "(b t n) c", on_output=True),
    Host("rnn cell", lambda: nn.RNNCell(C, D), "(b t n) c", on_output=True),
    Host("lstm cell", lambda: nn.LSTMCell(C, D), "(b t n) c", call=first, on_output=True),
]
GATES = ".stlora_gates"
BARE = [
    Host(
        "gclstm[b t n c]",
        lambda: tgt_layer("recurrent.gc_lstm.GCLSTM")(C, D, 3),
        layout="",
        call=cell_call,
        inside=cell_loop,
        part=GATES,
    ),
    Host(
        "gclstm[(b t n) c]",
        lambda: tgt_layer("recurrent.gc_lstm.GCLSTM")(C, D, 3),
        "(b t n) c",
        layout="",
        call=cell_call,
        inside=cell_loop,
        part=GATES,
    ),
    Host("hetero gclstm", hetero_cell, layout="", call=hetero_call, inside=hetero_loop, part=GATES),
]
HOSTS = LINEAR + CONV + GRAPH + ATTENTION + RECURRENT + CELLS + BARE


def options_of(host: Host, conditioning: str, **options: Any) -> dict[str, Any]:
    layout = host.pattern.replace("1", "w") if host.layout is None else host.layout
    return {"conditioning": conditioning, "node_layout": {"layer": layout} if layout else {}} | options


def canonical(seed: int = 3) -> Tensor:
    """An input ``b t n c`` that collects gradients."""
    x = torch.randn(B, T, N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def expected_output(host: Host, base: nn.Module, x: Tensor, conditioning: str, factors: Any, scale: float) -> Tensor:
    """What the formula gives, in the layout ``b t n c``."""
    if host.inside is not None:
        return host.inside(base, x, reference.pointwise_update(x, conditioning, factors, scale))
    out = host.unfold(host.call(base, host.fold(x)))
    z = out if host.on_output else host.root(x)
    if host.temporal is None:
        return out + reference.pointwise_update(z, conditioning, factors, scale)
    if "A" in factors:
        factors = factors | {"A": factors["A"].flatten(3 if conditioning == "full" else 2)}
    return out + reference.conv_update(z, conditioning, factors, scale, host.temporal)
