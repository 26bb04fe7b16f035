"""AAGCN: graph convolutions whose edges are the given ones, learned ones and those of the data together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import dense_graph
from stlora_peft.backbones.nodes import NodeBound, NodeBoundForecaster, mean_entry, mean_pair
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _UnitGCN(nn.Module):
        PA: nn.Parameter
        A: Tensor
        alpha: nn.Parameter
        conv_a: nn.ModuleList
        conv_b: nn.ModuleList
        conv_d: nn.ModuleList
        bn: nn.BatchNorm2d

        def __init__(self, in_channels: int, out_channels: int, A: Tensor) -> None: ...

        def _attentive_forward(self, y: Tensor) -> Tensor: ...

    class _UnitTCN(nn.Module):
        def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 9) -> None:
            """Types of torch-geometric-temporal's UnitTCN."""
else:
    _upstream = tgt.load().nn.attention.tsagcn
    _UnitGCN, _UnitTCN = _upstream.UnitGCN, _upstream.UnitTCN

_SUBSETS = 3


class GraphShift(NodeBound):
    """A learned weight for each pair of nodes, added to the given graph; zero at the start.

    In another city it has two values for each subset, one for a node and itself and one for any other pair: the means
    over the old pairs, scaled so that what a node hears in sum stays.

    Shapes:
        - **graphs:** :math:`(3, N, N)`
        - **output:** :math:`(3, N, N)`
    """

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.weight = nn.Parameter(torch.zeros(_SUBSETS, num_nodes, num_nodes))

    def forward(self, graphs: Tensor) -> Tensor:
        """Shift the weights of the edges."""
        return graphs + self.weight

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Mean shift of a pair."""
        return {"weight": mean_pair(self.weight, num_nodes, summed=True)}


class NodeKernel(nn.Conv1d, NodeBound):
    """A convolution along the nodes, in their order, with a kernel as long as there are nodes.

    In another city every entry of the kernel is the mean over the old ones, scaled so that their sum stays.

    Args:
        channels: Width of the input.
        num_nodes: Number of nodes.

    Shapes:
        - **x:** :math:`(B, C, N)`
        - **output:** :math:`(B, 1, N)`
    """

    def __init__(self, channels: int, num_nodes: int) -> None:
        size = _kernel_size(num_nodes)
        super().__init__(channels, 1, size, padding=size // 2)
        self.num_nodes = num_nodes
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def resized(self, num_nodes: int) -> NodeKernel:
        """Copy the convolution for ``num_nodes`` nodes; with their number unchanged the copy is exact."""
        new, size = super().resized(num_nodes), _kernel_size(num_nodes)
        new.kernel_size, new.padding = (size,), (size // 2,)
        new._reversed_padding_repeated_twice = [size // 2] * 2
        return new

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Mean entry of the kernel."""
        return {"weight": mean_entry(self.weight, 2, _kernel_size(num_nodes), summed=True)}


class GraphUnit(_UnitGCN):
    """torch-geometric-temporal's UnitGCN on a graph that is given with the input.

    Shapes:
        - **x:** :math:`(B, C_{in}, T, N)`, **graphs:** :math:`(3, N, N)`
        - **output:** :math:`(B, C_{out}, T, N)`
    """

    def __init__(self, in_channels: int, out_channels: int, num_nodes: int) -> None:
        super().__init__(in_channels, out_channels, torch.zeros(_SUBSETS, num_nodes, num_nodes))
        del self.PA, self.A
        self.shift = GraphShift(num_nodes)
        self.conv_sa = NodeKernel(out_channels, num_nodes)
        if in_channels == out_channels:
            self.down = nn.Identity()  # a lambda upstream, which cannot be pickled

    def forward(self, x: Tensor, graphs: Tensor) -> Tensor:
        """Convolve over the three graphs, then weigh nodes, steps and channels by attention."""
        y = torch.zeros((), dtype=x.dtype, device=x.device)
        for i, graph in enumerate(self.shift(graphs)):
            heard = x.flatten(1, 2) @ (graph + self.alpha * self._alike(x, i))
            y = y + self.conv_d[i](heard.view(x.shape))
        return self._attentive_forward((self.bn(y) + self.down(x)).relu())

    def _alike(self, x: Tensor, i: int) -> Tensor:
        """How alike the nodes of a sample are, ``[b n n]``."""
        a, b = self.conv_a[i](x).flatten(1, 2), self.conv_b[i](x).flatten(1, 2)  # [b (c t) n]
        return torch.tanh(a.transpose(1, 2) @ b / a.shape[1])


class Block(nn.Module):
    """A :class:`GraphUnit`, a convolution along time and a residual map, as torch-geometric-temporal's AAGCN."""

    def __init__(self, in_channels: int, out_channels: int, num_nodes: int) -> None:
        super().__init__()
        self.gcn1 = GraphUnit(in_channels, out_channels, num_nodes)
        self.tcn1 = _UnitTCN(out_channels, out_channels)
        alike = in_channels == out_channels
        self.residual = nn.Identity() if alike else _UnitTCN(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, graphs: Tensor) -> Tensor:
        """Convolve over the graphs and along time, ``[b c t n]``."""
        out: Tensor = (self.tcn1(self.gcn1(x, graphs)) + self.residual(x)).relu()
        return out


class AAGCN(NodeBoundForecaster):
    r"""Two adaptive graph convolution blocks of torch-geometric-temporal and a linear head over all steps.

    A block convolves over three graphs :math:`A_k`, every node itself, its in-neighbours and its out-neighbours, each
    summing to one over what a node hears. To each are added a learned shift :math:`B_k` and the similarity
    :math:`C_k` of the nodes in the sample,

    .. math::
        z = \sum_{k=1}^{3} W_k\, x\, (A_k + B_k + \alpha C_k), \qquad
        C_k = \tanh\bigl((\Theta_k x)^\top (\Phi_k x) / c\bigr)

    and weighs nodes, steps and channels by attention before it convolves along time. :math:`B_k` and :math:`\alpha`
    start at zero: the road graph is where the network begins, in another city too.

    **The order of the nodes matters**: the attention over nodes is a convolution along their numbers
    (:class:`NodeKernel`), meant for the joints of a skeleton.

    Args:
        num_nodes: Number of nodes :math:`N` of the shifts and of the kernels along the nodes.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the blocks, at least 4.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Cost:
        :math:`6 N^2 + 2 N C_{hidden}` numbers are bound to the nodes.

    Raises:
        ValueError: If a size is below 1, or ``hidden_channels`` below 4, or if ``residual`` is asked for with fewer
            input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> model = AAGCN(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Shi et al. (2s-AGCN), CVPR 2019, arXiv:1805.07694, whose :math:`A_k + B_k + C_k` this is; attention and
        :math:`\alpha` from their AAGCN, arXiv:1912.06971. Differs: two blocks instead of ten, a forecast instead of a
        class. torch-geometric-temporal 0.56.2 differs from both: it folds :math:`A_k` into the learned weight when it
        is built, so that the graph belongs to the weights, and fails if the last node has no edges.
    """

    name = "aagcn"
    stlora_spec = BackboneSpec(
        target_modules=("conv_d.0", "conv_d.1", "conv_d.2", "down.0", "tcn1.conv", "residual.conv", "head"),
        node_layout={
            "conv_d.0": "b c t n",
            "conv_d.1": "b c t n",
            "conv_d.2": "b c t n",
            "down.0": "b c t n",
            "tcn1.conv": "b c t n",
            "residual.conv": "b c t n",
            "head": "b n c",
        },
        node_bound=("block1.gcn1.shift", "block1.gcn1.conv_sa", "block2.gcn1.shift", "block2.gcn1.conv_sa"),
        head=("head",),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {"num_nodes": num_nodes, "hidden_channels": hidden_channels}
        self.check_positive(**sizes)
        if hidden_channels < 4:
            self.refuse(
                "hidden_channels out of range",
                "hidden_channels >= 4, a quarter of which compares nodes",
                f"hidden_channels = {hidden_channels}",
                "give a larger hidden_channels",
            )
        self.hyperparameters |= sizes
        self.block1 = Block(in_channels, hidden_channels, num_nodes)
        self.block2 = Block(hidden_channels, hidden_channels, num_nodes)
        self.head = nn.Linear(window * hidden_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the blocks over the three graphs and read all steps."""
        roads = dense_graph(edge_index, edge_weight, x)
        itself = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        graphs = torch.stack([itself, F.normalize(roads, 1, dim=0), F.normalize(roads.T, 1, dim=0)])
        z = self.block2(self.block1(x.permute(0, 3, 1, 2), graphs), graphs)  # [b c t n]
        change: Tensor = self.head(z.permute(0, 3, 2, 1).flatten(2))  # [b n (t c)]
        return change


def _kernel_size(num_nodes: int) -> int:
    """The largest odd number up to the number of nodes."""
    return num_nodes - 1 + num_nodes % 2
