"""Graph WaveNet: gated dilated convolutions along time, diffusion over the road graph and over a learned one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.backbones.graphs import dense_graph, transition
from stlora_peft.backbones.nodes import NodeBoundForecaster, NodeVectors, NoVectors
from stlora_peft.tuner.spec import BackboneSpec

_LAYERS = ("start_conv", "filter_conv", "gate_conv", "skip_conv", "graph_conv.mix", "end_conv_1", "end_conv_2")


class RoadTransitions(nn.Module):
    """The transition matrices along the edges and against them.

    Shapes:
        - **road:** :math:`(N, N)`, sources in the rows
        - **output:** two of :math:`(N, N)`, what a node hears in its row
    """

    num_matrices = 2

    def __init__(self) -> None:
        super().__init__()
        self.embedding_1 = NoVectors()  # the names of node-bound modules belong to the class, whatever its arguments
        self.embedding_2 = NoVectors()

    def forward(self, road: Tensor) -> list[Tensor]:
        """Normalise the graph in both directions."""
        return [transition(road.T), transition(road)]


class AdaptiveTransitions(nn.Module):
    r"""The two of the road graph and :math:`\tilde A = \mathrm{softmax}(\mathrm{relu}(E_1 E_2^\top))` over each row.

    Args:
        num_nodes: Number of nodes.
        emb_size: Width of the vectors :math:`E_1, E_2`.

    Shapes:
        - **road:** :math:`(N, N)`, sources in the rows
        - **output:** three of :math:`(N, N)`, what a node hears in its row
    """

    num_matrices = 3

    def __init__(self, num_nodes: int, emb_size: int) -> None:
        super().__init__()
        self.embedding_1 = NodeVectors(num_nodes, emb_size, seed=1)
        self.embedding_2 = NodeVectors(num_nodes, emb_size, seed=2)

    def forward(self, road: Tensor) -> list[Tensor]:
        """Normalise the graph in both directions and compute the learned one."""
        scores = self.embedding_1.weight @ self.embedding_2.weight.T
        return [transition(road.T), transition(road), scores.relu().softmax(1).to(road.dtype)]


class GatedConv(nn.Module):
    r"""Gated causal convolution along time, :math:`\tanh(\Theta_1 \star x + b) \odot \sigma(\Theta_2 \star x + c)`.

    Args:
        channels: Width of input and output.
        skip_channels: Width of the skip connection, which reads the last step.
        kernel_size: Steps that a kernel touches.
        dilation: Distance between two of them.

    Shapes:
        - **x:** :math:`(B, C, T, N)`, ``[b c t n]``
        - **output:** :math:`(B, C, T', N)` and :math:`(B, C_{skip}, 1, N)`, with ``(kernel_size - 1) * dilation``
          steps less
    """

    def __init__(self, channels: int, skip_channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.filter_conv = nn.Conv2d(channels, channels, (kernel_size, 1), dilation=(dilation, 1))
        self.gate_conv = nn.Conv2d(channels, channels, (kernel_size, 1), dilation=(dilation, 1))
        self.skip_conv = nn.Conv2d(channels, skip_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and read the last step."""
        z = self.filter_conv(x).tanh() * self.gate_conv(x).sigmoid()
        return z, self.skip_conv(z[:, :, -1:])


class DiffusionConv(nn.Module):
    r"""Diffusion over several transition matrices, :math:`Z = X W_0 + \sum_m \sum_{k=1}^{K} P_m^k X W_{k,m} + b`.

    Args:
        channels: Width of input and output.
        num_matrices: Number of matrices :math:`P_m`.
        order: Number of hops :math:`K`.

    Shapes:
        - **x**, **output:** :math:`(B, C, T, N)`, ``[b c t n]``
        - **matrices:** ``num_matrices`` of :math:`(N, N)`
    """

    def __init__(self, channels: int, num_matrices: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.mix = nn.Conv2d((1 + num_matrices * order) * channels, channels, 1)

    def forward(self, x: Tensor, matrices: list[Tensor]) -> Tensor:
        """Gather the hops and mix them: first the node itself, then matrix by matrix the hops in their order."""
        heard = [x]
        for matrix in matrices:
            hop = x
            for _ in range(self.order):
                hop = F.linear(hop.flatten(0, 2), matrix).view_as(hop)  # of rows: one kernel, trained or frozen
                heard.append(hop)
        mixed: Tensor = self.mix(torch.cat(heard, 1))
        return mixed


class GraphLayer(nn.Module):
    """Diffusion convolution, dropout, the residual connection around the whole layer, and batch normalisation.

    Args:
        channels: Width of the layer.
        num_matrices: Number of transition matrices.
        order: Number of hops.
        dropout: Share of the convolution's output that training leaves out.

    Shapes:
        - **z:** :math:`(B, C, T', N)`, what the gated convolution made of **x:** :math:`(B, C, T, N)`
        - **output:** :math:`(B, C, T', N)`, ``[b c t n]``
    """

    def __init__(self, channels: int, num_matrices: int, order: int, dropout: float) -> None:
        super().__init__()
        self.graph_conv = DiffusionConv(channels, num_matrices, order)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, z: Tensor, x: Tensor, matrices: list[Tensor]) -> Tensor:
        """Spread over the graph and add what came in, its last steps."""
        spread = self.dropout(self.graph_conv(z, matrices))
        normed: Tensor = self.norm(spread + x[:, :, -z.shape[2] :])
        return normed


class GraphWaveNet(NodeBoundForecaster):
    r"""Graph WaveNet: a WaveNet along time whose layers diffuse over the road graph and over a learned graph.

    A layer with input :math:`X` is a gated causal convolution, a diffusion of order :math:`K` over the transition
    matrices along the edges, :math:`P_f`, and against them, :math:`P_b`, and over the self-adaptive adjacency of two
    tables of node vectors, a residual connection and a batch normalisation over the channels:

    .. math::
        z &= \tanh(\Theta_1 \star_d X + b) \odot \sigma(\Theta_2 \star_d X + c) \\
        X &\leftarrow \mathrm{norm}\Big(X + \sum_{k=0}^{K} P_f^k z W_{k1} + P_b^k z W_{k2} + \tilde A^k z W_{k3}\Big),
        \qquad \tilde A = \mathrm{softmax}\big(\mathrm{relu}(E_1 E_2^\top)\big)

    Row :math:`n` of a matrix holds what node :math:`n` hears. The rows of :math:`P_f` sum to one, or to zero at a node
    that no edge leads to, and those of :math:`P_b` likewise. The dilation :math:`d` doubles from layer to layer and
    starts at one in each block. A convolution of width one reads the last step of every layer's :math:`z`; two more,
    each after a relu, make the forecast of the sum.

    Together the layers see ``1 + num_blocks * (kernel_size - 1) * (2 ** num_layers - 1)`` steps, 13 by default. A
    shorter window is padded with zeros on the left; of a longer one the first steps have no effect.

    Args:
        num_nodes: Number of nodes :math:`N` of the vectors.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the layers.
        skip_channels: Width of the skip connections.
        end_channels: Width between the last two convolutions.
        num_blocks: Number of blocks.
        num_layers: Number of layers of a block.
        kernel_size: Steps that a convolution along time touches.
        order: Number of hops :math:`K`.
        adaptive: Diffuse over the learned graph too. Otherwise nothing is bound to the nodes.
        emb_size: Width of the vectors :math:`E_1, E_2`.
        dropout: Share of a graph convolution's output that training leaves out.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if ``dropout`` is no share, or if ``residual`` is asked for with fewer input
            than output channels.

    Example:
        >>> model = GraphWaveNet(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Wu et al. (Graph WaveNet), IJCAI 2019, arXiv:1906.00121, Eq. 5 to 8. Differs: the residual. The three matrices
        of :math:`k = 0` are one, their sum, as in the authors' program. That program also holds eight convolutions
        that it never calls, and a diffusion and a normalisation after the last layer that nothing reads: 15,712 of its
        309,400 parameters on METR-LA, which do not exist here. It multiplies by the transposed matrices, so that what
        a node says is divided among those who hear it; here, as in the formula, a node hears a mean. In another city
        the vectors are drawn anew, see :class:`stlora_peft.backbones.nodes.NodeVectors`.
    """

    name = "gwnet"
    stlora_spec = BackboneSpec(
        target_modules=_LAYERS,
        node_layout=dict.fromkeys(_LAYERS, "b c t n"),
        node_bound=("transitions.embedding_1", "transitions.embedding_2"),
        head=("end_conv_1", "end_conv_2"),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        skip_channels: int = 256,
        end_channels: int = 512,
        num_blocks: int = 4,
        num_layers: int = 2,
        kernel_size: int = 2,
        order: int = 2,
        adaptive: bool = True,
        emb_size: int = 10,
        dropout: float = 0.3,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "hidden_channels": hidden_channels,
            "skip_channels": skip_channels,
            "end_channels": end_channels,
            "num_blocks": num_blocks,
            "num_layers": num_layers,
            "kernel_size": kernel_size,
            "order": order,
            "emb_size": emb_size,
        }
        self.check_positive(**sizes)
        if not 0 <= dropout < 1:
            self.refuse("dropout out of range", "0 <= dropout < 1", f"dropout = {dropout}", "give a smaller share")
        self.hyperparameters |= sizes | {"adaptive": adaptive, "dropout": dropout}
        dilations = [2**layer for layer in range(num_layers)] * num_blocks
        self.receptive_field = 1 + (kernel_size - 1) * sum(dilations)
        self.transitions = AdaptiveTransitions(num_nodes, emb_size) if adaptive else RoadTransitions()
        self.start_conv = nn.Conv2d(in_channels, hidden_channels, 1)
        self.gated_convs = nn.ModuleList(GatedConv(hidden_channels, skip_channels, kernel_size, d) for d in dilations)
        self.graph_layers = nn.ModuleList(  # none after the last layer: nothing would read it
            GraphLayer(hidden_channels, self.transitions.num_matrices, order, dropout) for _ in dilations[1:]
        )
        self.end_conv_1 = nn.Conv2d(skip_channels, end_channels, 1)
        self.end_conv_2 = nn.Conv2d(end_channels, horizon * out_channels, 1)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the layers over the graphs and read their skip connections."""
        matrices = self.transitions(dense_graph(edge_index, edge_weight, x))
        seen = F.pad(x.permute(0, 3, 1, 2), (0, 0, self.receptive_field - self.window, 0))  # a negative pad cuts
        hidden = self.start_conv(seen)  # [b c t n]
        first, *others = self.gated_convs
        z, skip = first(hidden)
        for graph, gated in zip(self.graph_layers, others, strict=True):
            hidden = graph(z, hidden, matrices)
            z, read = gated(hidden)
            skip = skip + read
        forecast = self.end_conv_2(self.end_conv_1(skip.relu()).relu())  # [b (t c) 1 n]
        change: Tensor = forecast.squeeze(2).transpose(1, 2)  # [b n (t c)]
        return change
