"""GMAN: attention over nodes and over steps, fused by gates, with embeddings of place and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.clock import table_width, time_rows, value_channels
from stlora_peft.backbones.nodes import NodeBoundForecaster
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _FullyConnected(nn.Module):
        def __init__(self, input_dims: list[int], units: list[int], activations: list[Any], bn_decay: float) -> None:
            """Types of torch-geometric-temporal's FullyConnected."""

    class _Attention(nn.Module):
        _fully_connected_q: nn.Module
        _fully_connected_k: nn.Module
        _fully_connected_v: nn.Module
        _fully_connected: nn.Module

        def __init__(self, K: int, d: int, bn_decay: float, *mask: bool) -> None:
            """Types of torch-geometric-temporal's three attentions."""

    class _SpatialAttention(_Attention): ...

    class _TemporalAttention(_Attention): ...

    class _TransformAttention(_Attention): ...

    class _GMAN(nn.Module):
        _st_embedding: nn.Module
        _st_att_block1: nn.ModuleList
        _st_att_block2: nn.ModuleList
        _transform_attention: nn.Module

        def __init__(
            self, L: int, K: int, d: int, his: int, bn_decay: float, day: int, use_bias: bool, mask: bool
        ) -> None:
            """Types of torch-geometric-temporal's GMAN."""
else:
    _upstream = tgt.load().nn.attention.gman
    _GMAN, _FullyConnected, _SpatialAttention = _upstream.GMAN, _upstream.FullyConnected, _upstream.SpatialAttention
    _TemporalAttention, _TransformAttention = _upstream.TemporalAttention, _upstream.TransformAttention

_BN_DECAY = 0.1
_DAYS = 7
# Without the layers of the times, which see no nodes, and those of the places, which see nothing else.
_DEPTH = {"_q": 1, "_k": 1, "_v": 1, "": 1, "_xs": 1, "_xt": 1, "_h": 2, "_1": 2, "_2": 2}
_LAYERS = tuple(f"_fully_connected{part}._conv2ds.{i}._conv2d" for part, n in _DEPTH.items() for i in range(n))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention between the rows on axis -2.

    torch-geometric-temporal divides the width into pieces of the number of heads, where the size of a head is meant:
    as many heads come out as a head should be wide, with scores that are scaled for the other size.

    Args:
        query: What each row asks for.
        key: What each row is asked by.
        value: What each row answers.
        heads: Number of heads.

    Shapes:
        - **query**, **output:** :math:`(*, R, D)`
        - **key**, **value:** :math:`(*, S, D)`
    """
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)


class NodeAttention(_SpatialAttention):
    """torch-geometric-temporal's SpatialAttention: between the nodes of a step, ``[b t n c]``."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(heads, head_size, _BN_DECAY)
        self.heads = heads

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Attend to the nodes of the step."""
        both = torch.cat([x, embedding], -1)
        query, key = self._fully_connected_q(both), self._fully_connected_k(both)
        out: Tensor = self._fully_connected(attend(query, key, self._fully_connected_v(both), self.heads))
        return out


class StepAttention(_TemporalAttention):
    """torch-geometric-temporal's TemporalAttention: between the steps of a node, ``[b t n c]``."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(heads, head_size, _BN_DECAY, False)
        self.heads = heads

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Attend to the steps of the node."""
        both = torch.cat([x, embedding], -1)
        query, key = self._fully_connected_q(both).transpose(1, 2), self._fully_connected_k(both).transpose(1, 2)
        heard = attend(query, key, self._fully_connected_v(both).transpose(1, 2), self.heads)  # [b n t c]
        out: Tensor = self._fully_connected(heard.transpose(1, 2))
        return out


class FutureAttention(_TransformAttention):
    """torch-geometric-temporal's TransformAttention: of the steps of the horizon to those of the window."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(heads, head_size, _BN_DECAY)
        self.heads = heads

    def forward(self, x: Tensor, past: Tensor, future: Tensor) -> Tensor:
        """Attend to the steps of the window whose embeddings are like those of the horizon."""
        query, key = self._fully_connected_q(future).transpose(1, 2), self._fully_connected_k(past).transpose(1, 2)
        heard = attend(query, key, self._fully_connected_v(x).transpose(1, 2), self.heads)  # [b n t c]
        out: Tensor = self._fully_connected(heard.transpose(1, 2))
        return out


class Network(_GMAN):
    """torch-geometric-temporal's GMAN for several value channels and with the heads that are asked for.

    Shapes:
        - **x:** :math:`(B, T, N, C)`, **place:** :math:`(N, D)`, **times:** :math:`(B, T + H, W)`
        - **output:** :math:`(B, H, N, C_{out})`
    """

    def __init__(
        self, num_blocks: int, heads: int, head_size: int, in_channels: int, out_channels: int, window: int, rows: int
    ) -> None:
        # The table of times has a row for each day of the week on top of those asked for.
        super().__init__(num_blocks, heads, head_size, window, _BN_DECAY, rows - _DAYS, True, False)
        width = heads * head_size
        self.window = window
        activations = [F.relu, None]
        self._fully_connected_1 = _FullyConnected([in_channels, width], [width, width], activations, _BN_DECAY)
        self._fully_connected_2 = _FullyConnected([width, width], [width, out_channels], activations, _BN_DECAY)
        self._transform_attention = FutureAttention(heads, head_size)
        for block in (*self._st_att_block1, *self._st_att_block2):
            block._spatial_attention = NodeAttention(heads, head_size)
            block._temporal_attention = StepAttention(heads, head_size)

    def forward(self, x: Tensor, place: Tensor, times: Tensor) -> Tensor:
        """Encode the window, translate it to the horizon by attention between times, and decode."""
        embedding = cast(Any, self._st_embedding)
        where = embedding._fully_connected_se(place[None, None])  # [1 1 n d]
        when = where + embedding._fully_connected_te(times[:, :, None])  # [b t n d]
        past, future = when[:, : self.window], when[:, self.window :]
        hidden = self._fully_connected_1(x)
        for block in self._st_att_block1:
            hidden = block(hidden, past)
        hidden = self._transform_attention(hidden, past, future)
        for block in self._st_att_block2:
            hidden = block(hidden, future)
        forecast: Tensor = self._fully_connected_2(hidden)
        return forecast


class GMAN(NodeBoundForecaster):
    r"""torch-geometric-temporal's GMAN: attention over nodes and over steps, steered by place and time.

    Every step of window and horizon at every node has an embedding :math:`e_{n,t} = p_n + q_t` of its place and its
    time. Blocks of two multi-head attentions, one over the nodes of a step and one over the steps of a node, read the
    hidden state beside it and are fused by a gate; an attention from the embeddings of the horizon to those of the
    window carries the state from the past to the future:

    .. math::
        h \leftarrow h + g \odot \mathrm{att}_{nodes}(h, e) + (1 - g) \odot \mathrm{att}_{steps}(h, e)

    Nodes only meet in the attention over all of them: the edges are checked and not used. What the paper takes from
    the graph, node2vec vectors, is here the table :math:`p`, learned from the data.

    The times are read off the last channels of the input, the encodings of :func:`stlora_peft.data.windows
    .time_encoding`; their mean over the nodes counts. The steps of the horizon go on at the interval of the window's
    last two steps. Without encodings (``time_features="none"``) each step of window and horizon has a learned
    position of its own and the network does not know the time of day. A time moves in slots: the forecast is
    piecewise constant in these channels.

    Args:
        num_nodes: Number of nodes :math:`N` of the table of places.
        in_channels: Channels of the input: values first, time encodings last.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        num_blocks: Number of blocks before, and of blocks after the step to the future.
        heads: Number of heads of each attention.
        head_size: Width of a head; the network is ``heads * head_size`` wide.
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
        ValueError: If a size is below 1, if ``time_features`` is none of the three or leaves no channel for the
            values, or if ``residual`` is asked for with fewer values than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = GMAN(num_nodes=5, in_channels=3)
        >>> model(torch.zeros(8, 12, 5, 3), torch.zeros(2, 0, dtype=torch.long)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Zheng et al. (GMAN), AAAI 2020, arXiv:1911.08415. Differs: learned places instead of node2vec vectors; one
        block on either side by default; the residual. Differs from torch-geometric-temporal 0.56.2: the heads, see
        :func:`attend`; several channels; no mask, which fails there unless both sizes of the heads agree.
    """

    name = "gman"
    stlora_spec = BackboneSpec(
        target_modules=_LAYERS,
        node_layout=dict.fromkeys(_LAYERS, "b c n t"),
        node_bound=("places",),
        head=("network._fully_connected_2",),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        num_blocks: int = 1,
        heads: int = 4,
        head_size: int = 8,
        time_features: str = "day",
        steps_per_day: int = 288,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "num_blocks": num_blocks,
            "heads": heads,
            "head_size": head_size,
            "steps_per_day": steps_per_day,
        }
        self.check_positive(**sizes)
        self.hyperparameters |= sizes | {"time_features": time_features}
        self.values = value_channels(self, time_features)
        self.steps_per_day = steps_per_day
        self.places = nn.Embedding(num_nodes, heads * head_size)
        rows = table_width(time_features, window + horizon, steps_per_day)
        self.network = Network(num_blocks, heads, head_size, self.values, out_channels, window, rows)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Read the times, then forecast all steps at once; the graph is not used."""
        times = time_rows(x[..., self.values :].mean(2), self.horizon, self.steps_per_day)
        forecast = self.network(x[..., : self.values], self.places.weight.to(x.dtype), times)  # [b t n c]
        change: Tensor = forecast.transpose(1, 2).flatten(2)  # [b n (t c)]
        return change
