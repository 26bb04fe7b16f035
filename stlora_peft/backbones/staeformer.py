"""STAEformer: plain transformer layers along time and over nodes, and an embedding of each step at each node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.backbones.adaptive_embedding import AdaptiveEmbedding
from stlora_peft.backbones.clock import time_rows, value_channels
from stlora_peft.backbones.nodes import NodeBoundForecaster
from stlora_peft.tuner.spec import BackboneSpec

Along = Literal["steps", "nodes"]

_TABLES = {"none": (), "day": ("time_of_day",), "week": ("day_of_week", "time_of_day")}
_DAYS = 7
_LAYERS = ("attention.query", "attention.value", "feed_forward.0", "feed_forward.2")


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, along: Along) -> Tensor:
    r"""Multi-head attention between the steps of a node, or between the nodes of a step.

    Each head, :math:`d` wide, computes :math:`\mathrm{softmax}(Q K^\top / \sqrt{d}) \, V`.

    Args:
        query: What each entry asks for.
        key: What it is asked by.
        value: What it answers.
        heads: Number of heads, pieces of the channels.
        along: Which entries attend to each other.

    Shapes:
        - **query**, **key**, **value**, **output:** ``[b t n c]``
    """
    axis = {"steps": 1, "nodes": 2}[along]
    apart = query.shape[0], query.shape[3 - axis]  # fused kernels take one axis before the heads
    query, key, value = (
        part.unflatten(3, (heads, -1)).movedim(axis, 3).flatten(0, 1) for part in (query, key, value)
    )  # [(b t) h n c]
    heard: Tensor = F.scaled_dot_product_attention(query, key, value).unflatten(0, apart)  # [b t h n c]
    return heard.movedim(3, axis).flatten(3)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a linear map for each of query, key, value and output.

    Args:
        width: Channels of input and output.
        heads: Number of heads.
        along: Which entries attend to each other.

    Shapes:
        - **x**, **output:** ``[b t n c]``
    """

    def __init__(self, width: int, heads: int, along: Along) -> None:
        super().__init__()
        self.heads = heads
        self.along = along
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend along one axis."""
        heard: Tensor = self.output(attend(self.query(x), self.key(x), self.value(x), self.heads, self.along))
        return heard


class SelfAttentionLayer(nn.Module):
    r"""A transformer layer that normalises after each sum.

    .. math::
        h \leftarrow \mathrm{LN}(h + \mathrm{att}(h)), \qquad
        h \leftarrow \mathrm{LN}(h + W_2\, \mathrm{relu}(W_1 h + b_1) + b_2)

    Args:
        width: Channels of input and output.
        heads: Number of heads.
        feed_forward_channels: Channels between :math:`W_1` and :math:`W_2`.
        dropout: Share of each summand that training leaves out.
        along: Which entries attend to each other.

    Shapes:
        - **x**, **output:** ``[b t n c]``
    """

    def __init__(self, width: int, heads: int, feed_forward_channels: int, dropout: float, along: Along) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, along)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward_channels), nn.ReLU(), nn.Linear(feed_forward_channels, width)
        )
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then map each entry by itself."""
        x = self.norm_1(x + self.dropout(self.attention(x)))
        out: Tensor = self.norm_2(x + self.dropout(self.feed_forward(x)))
        return out


class STAEformer(NodeBoundForecaster):
    r"""Transformer layers along the steps of each node, then over the nodes of each step.

    Every step :math:`t` at every node :math:`n` has a linear map of all input channels, an embedding of its day of the
    week :math:`w_t` and of its slot of the day :math:`d_t`, and an adaptive embedding, learned and its own:

    .. math::
        h_{t,n} = \big[\, W x_{t,n} + b, \; P_{w_t}, \; Q_{d_t}, \; E_{t,n} \,\big], \qquad
        h \leftarrow \mathrm{layer}^{steps}_{L} \circ \dots \circ \mathrm{layer}^{steps}_{1} (h), \qquad
        h \leftarrow \mathrm{layer}^{nodes}_{L} \circ \dots \circ \mathrm{layer}^{nodes}_{1} (h),

    each layer a :class:`SelfAttentionLayer`, and a linear map of all steps of a node is its forecast. Nodes only meet
    in the attention over all of them: the edges are checked and not used. The table :math:`E` is bound to the nodes;
    all else fits any number of them.

    The times are read off the last channels of the input, the encodings of :func:`stlora_peft.data.windows
    .time_encoding`; their mean over the nodes counts. A day of the week that is not known has the embedding zero.
    Without encodings (``time_features="none"``) there are no such embeddings, and with ``"day"`` none of the week.

    Adapters go to queries and values, as in the LoRA paper, to the feed-forward layers, which hold almost half of a
    layer's weights, and to the head. A bias of a node on its keys would cancel in the attention along steps.

    Args:
        num_nodes: Number of nodes :math:`N` of the adaptive embedding.
        in_channels: Channels of the input: values first, time encodings last.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the map of the input, and of either embedding of the time.
        emb_size: Width of the adaptive embedding.
        num_layers: Number of layers :math:`L` along steps, and of layers over nodes.
        heads: Number of heads of each attention; it divides the sum of all widths.
        feed_forward_channels: Channels inside each feed-forward part.
        dropout: Share of values that training leaves out.
        time_features: Encodings that the input ends with: ``"none"``, ``"day"`` (2 channels) or ``"week"`` (4).
        steps_per_day: Slots that a day is divided into.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index**, **edge_weight:** checked, not used
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if ``heads`` does not divide the width, if ``dropout`` is no share, if
            ``time_features`` is none of the three or leaves no channel for the values, or if ``residual`` is asked
            for with fewer values than output channels.

    Example:
        >>> model = STAEformer(num_nodes=5, in_channels=3)
        >>> model(torch.zeros(8, 12, 5, 3), torch.zeros(2, 0, dtype=torch.long)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Liu et al. (STAEformer), CIKM 2023, arXiv:2308.10425. With ``time_features="week"`` and the other defaults it
        has the published 1,354,980 parameters on PEMS04, and 48 more for time encodings of four channels instead of
        two. Where adapters go: Hu et al. (LoRA), ICLR 2022, arXiv:2106.09685, Sec. 7.1. Differs: sines and cosines of
        the times; one clock for all nodes; the residual.
    """

    name = "staeformer"
    stlora_spec = BackboneSpec(
        target_modules=(*_LAYERS, "head"),
        node_layout={**dict.fromkeys(_LAYERS, "b t n c"), "head": "b n c"},
        node_bound=("adaptive_embedding",),
        frugal=("attention.query", "attention.value"),
        head=("head",),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 24,
        emb_size: int = 80,
        num_layers: int = 3,
        heads: int = 4,
        feed_forward_channels: int = 256,
        dropout: float = 0.1,
        time_features: str = "day",
        steps_per_day: int = 288,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "hidden_channels": hidden_channels,
            "emb_size": emb_size,
            "num_layers": num_layers,
            "heads": heads,
            "feed_forward_channels": feed_forward_channels,
            "steps_per_day": steps_per_day,
        }
        self.check_positive(**sizes)
        self.hyperparameters |= sizes | {"dropout": dropout, "time_features": time_features}
        self.values = value_channels(self, time_features)
        self.steps_per_day = steps_per_day
        width = (1 + len(_TABLES[time_features])) * hidden_channels + emb_size
        self._check_shares(width, heads, dropout)
        rows = {"day_of_week": _DAYS, "time_of_day": steps_per_day}
        self.input_embedding = nn.Linear(in_channels, hidden_channels)
        self.times = nn.ModuleDict({key: nn.Embedding(rows[key], hidden_channels) for key in _TABLES[time_features]})
        self.adaptive_embedding = AdaptiveEmbedding(window, num_nodes, emb_size)
        shape = width, heads, feed_forward_channels, dropout
        self.step_layers = nn.Sequential(*(SelfAttentionLayer(*shape, "steps") for _ in range(num_layers)))
        self.node_layers = nn.Sequential(*(SelfAttentionLayer(*shape, "nodes") for _ in range(num_layers)))
        self.head = nn.Linear(window * width, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the layers and read all steps at once; the graph is not used."""
        hidden = self.node_layers(self.step_layers(self.embed(x)))  # [b t n c]
        change: Tensor = self.head(hidden.transpose(1, 2).flatten(2))  # [b n (t c)]
        return change

    def embed(self, x: Tensor) -> Tensor:
        """Put the map of the input and the embeddings of time, step and node side by side: ``[b t n c]``."""
        parts = [self.input_embedding(x), *self._time_embeddings(x), self.adaptive_embedding(x)]
        return torch.cat([part.expand(*x.shape[:3], -1) for part in parts], -1)

    def _time_embeddings(self, x: Tensor) -> Iterator[Tensor]:
        """Look up every step's day of the week and slot of the day, each where the input tells it: ``[b t 1 c]``."""
        tables = [cast(nn.Embedding, table) for table in self.times.values()]
        if tables:
            marks = time_rows(x[..., self.values :].mean(2), 0, self.steps_per_day)
            for table, mark in zip(tables, marks.split([table.num_embeddings for table in tables], -1), strict=True):
                yield (mark @ table.weight)[:, :, None]

    def _check_shares(self, width: int, heads: int, dropout: float) -> None:
        """Refuse heads that do not divide the width, and a dropout that is no share."""
        if width % heads:
            self.refuse(
                "heads out of range",
                f"a divisor of {width}, the widths of all embeddings together",
                f"heads = {heads}",
                "give another number of heads, hidden_channels or emb_size",
            )
        if not 0 <= dropout < 1:
            self.refuse("dropout out of range", "0 <= dropout < 1", f"dropout = {dropout}", "give a smaller share")
