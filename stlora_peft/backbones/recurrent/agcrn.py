"""AGCRN: a GRU whose graph and weights come from a table of node embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent


class AGCRNForecaster(RecurrentForecaster):
    r"""A GRU whose graph and weights come from node embeddings, in several layers, and a linear head.

    Node :math:`n` has an embedding :math:`e_n`, a row of :math:`E`. The embeddings make a graph, whose Chebyshev
    terms :math:`T_k` are the support, and mix the weights of each node from a pool of matrices :math:`\Theta`,

    .. math::
        (\Theta * x)_n &= \sum_{k=0}^{K-1} \Big(\sum_d e_{n,d} \Theta_{dk}\Big)^\top
        \big(T_k(A)\, x\big)_n + \sum_d e_{n,d} \theta_d , \qquad A = \mathrm{softmax}(\mathrm{relu}(E E^\top)), \\
        z_t, r_t &= \sigma(\Theta_g * [x_t, h_{t-1}]), \qquad
        \tilde h_t = \tanh(\Theta_u * [x_t, z_t \odot h_{t-1}]), \\
        h_t &= r_t \odot h_{t-1} + (1 - r_t) \odot \tilde h_t, \qquad
        \hat y_n = W h_{T,n} + b \; [\, + x_{T,n} \,]

    where each further layer reads the states of the one below. The edges given are checked and not used. The table
    ``node_embedding`` is bound to the nodes; all else fits any number of them.

    Args:
        num_nodes: Number of nodes :math:`N`, rows of the table.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the states.
        K: Terms of each convolution, at least 2.
        emb_size: Width of the node embeddings.
        num_layers: Number of cells on top of each other.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*, neither used
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if ``K`` is 1, or if ``residual`` is asked for with fewer input than output
            channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> model = AGCRNForecaster(num_nodes=5, in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Bai et al. (AGCRN), NeurIPS 2020, arXiv:2007.02842, of torch-geometric-temporal's ``AGCRN`` cells. With
        ``in_channels=1``, ``hidden_channels=64`` and the other defaults it has the published 748,810 parameters on
        PEMS04. Differs: the residual.
    """

    name = "agcrn"
    stlora_spec = cell_spec(("_gate", "_update"), "b n c", node_bound=("node_embedding",))

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        K: int = 2,
        emb_size: int = 10,
        num_layers: int = 2,
        residual: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            window,
            horizon,
            residual,
            num_nodes=num_nodes,
            hidden_channels=hidden_channels,
            K=K,
            emb_size=emb_size,
            num_layers=num_layers,
        )
        if K == 1:
            self.refuse("K out of range", "K >= 2: the support always has two terms", "K = 1", "give a larger K")
        widths = [in_channels] + [hidden_channels] * (num_layers - 1)
        self.cells = nn.ModuleList(_cells.AGCRN(num_nodes, width, hidden_channels, K, emb_size) for width in widths)
        self.node_embedding = nn.Embedding(num_nodes, emb_size)
        nn.init.xavier_uniform_(self.node_embedding.weight)
        self.head = self.new_head(hidden_channels)

    def encode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Run each layer over the states of the one below."""
        graph = (self.node_embedding(torch.arange(x.shape[2], device=x.device)),)
        outputs = list(x.unbind(1))
        for cell in self.cells:
            outputs = self.unroll(cell, outputs, graph)
        return self.read(outputs)

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit, before any arithmetic.

        Raises:
            ValueError: If the number of axes, of steps, of channels or of nodes is wrong.
        """
        super().check_input(x)
        bound, found = self.node_embedding.num_embeddings, x.shape[2]
        if bound != found:
            self.refuse(
                "wrong number of nodes",
                f"N={bound} on axis 'n' of 'b t n c', the number of rows of its table of nodes",
                f"N={found} from an input of shape {tuple(x.shape)}",
                f"adapt it to the new city with STLoraConfig(num_nodes={found}), or build it with num_nodes={found}",
            )
