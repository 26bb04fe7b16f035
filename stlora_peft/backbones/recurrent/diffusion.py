"""DCRNN and BatchedDCRNN: a GRU made of diffusion convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec
from stlora_peft.backbones.recurrent.diffusion_conv import DiffusionConv, exact_norms, upstream_norms

_cells: Any = tgt.load().nn.recurrent
_CONVOLUTIONS = ("conv_x_z", "conv_x_r", "conv_x_h")


class DCRNNForecaster(RecurrentForecaster):
    r"""A GRU whose matrix products are diffusion convolutions, and a linear head.

    With diffusion convolutions :math:`\Theta` of :math:`K` terms and :math:`[\cdot, \cdot]` for the two side by side,

    .. math::
        z_t &= \sigma(\Theta_z * [x_t, h_{t-1}]), \qquad r_t = \sigma(\Theta_r * [x_t, h_{t-1}]), \\
        \tilde h_t &= \tanh(\Theta_h * [x_t, h_{t-1} \odot r_t]), \qquad
        h_t = z_t \odot h_{t-1} + (1 - z_t) \odot \tilde h_t, \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    torch-geometric-temporal's diffusion convolution is wrong on many graphs: it leaves the weight of an edge out of
    the message, deals the norms of the walk against the edges out in the wrong order unless the graph is symmetric
    and its edges are in order, and divides by zero for a node that edges leave but none enters. These numbers are
    kept unless ``exact_diffusion=True``, with a warning on a graph where they are wrong. See
    :class:`stlora_peft.backbones.recurrent.diffusion_conv.DiffusionConv` for both formulas.

    It fits any number of nodes. torch-geometric-temporal's cell has no batch axis and builds a dense adjacency in
    each of its convolutions; here a :class:`DiffusionConv` with the same weights and numbers takes their place, the
    edges are normalised once for each call, and the cell runs on the union of :math:`B` copies of the graph.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        K: Terms of each convolution: a node hears nodes up to :math:`K - 1` edges away in each step, both ways.
        exact_diffusion: Compute the convolution of the paper. A network that was trained without it forecasts
            differently with it, on any graph.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees rows ``[(b n) c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = DCRNNForecaster(in_channels=3, hidden_channels=8, exact_diffusion=True)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926, as torch-geometric-temporal's ``DCRNN`` builds it. Differs:
        one layer, and a linear head for all horizons at once in place of a decoder; the residual.
    """

    name = "dcrnn"
    folded = True
    stlora_spec = cell_spec(_CONVOLUTIONS, "(b n) c")

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        K: int = 2,
        exact_diffusion: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels, K=K)
        self.hyperparameters["exact_diffusion"] = exact_diffusion
        self.exact_diffusion = exact_diffusion
        self.cell = self.new_cell(K)
        for name in _CONVOLUTIONS:
            conv = DiffusionConv(in_channels + hidden_channels, hidden_channels, K, exact=exact_diffusion)
            setattr(self.cell, name, conv)
        self.head = self.new_head(hidden_channels)

    def new_cell(self, K: int) -> Any:
        """The cell with fresh weights."""
        return _cells.DCRNN(self.in_channels, self.hidden_channels, K)

    def graph(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> tuple[Any, ...]:
        """Edges of the union and their norms."""
        num_nodes = x.shape[2]
        weight = edge_weight.to(x.dtype)
        norms = exact_norms(edge_index, weight, num_nodes)
        if not self.exact_diffusion:
            right, norms = norms, upstream_norms(edge_index, weight, num_nodes)
            self._compare(norms, right)
        return union(edge_index, norms, x.shape[0], num_nodes)

    def _compare(self, norms: Tensor, right: Tensor) -> None:
        """Warn if this graph brings an upstream defect to light."""
        if self._warned or self.hyperparameters["K"] == 1 or torch.compiler.is_compiling():
            return
        along, against = (~torch.isclose(norms, right)).sum(1).tolist()
        infinite = int(norms.isinf().sum())
        if along or against:
            self.warn_once(
                "torch-geometric-temporal's diffusion is wrong on this graph",
                "each edge weighted by its share in the degree of its source, and in that of its target",
                f"other weights for {along} and {against} of {norms.shape[1]} edges, {infinite} of them infinite",
                "build it with exact_diffusion=True and train it so; weights trained without it need the numbers as "
                "they are, which are finite if every node that edges leave has one that enters, e.g. a self-loop",
            )


class BatchedDCRNNForecaster(DCRNNForecaster):
    r"""A GRU whose matrix products are diffusion convolutions, around the cell for batches, and a linear head.

    The network of :class:`DCRNNForecaster`, whose docstring has the formula and the defects that are kept by default,
    around torch-geometric-temporal's other cell. Each loads the other's state dict. The cell's own ``forward`` needs
    weights of the edges and keeps the union of the graph under a key without the number of nodes, so that it is stale
    in a city with the same edges; its gates are called step by step instead.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        K: Terms of each convolution: a node hears nodes up to :math:`K - 1` edges away in each step, both ways.
        exact_diffusion: Compute the convolution of the paper. A network that was trained without it forecasts
            differently with it, on any graph.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees rows ``[(b n) c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = BatchedDCRNNForecaster(in_channels=3, hidden_channels=8, exact_diffusion=True)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926, as torch-geometric-temporal's ``BatchedDCRNN`` builds it.
        Differs: one layer, and a linear head for all horizons at once in place of a decoder; the residual.
    """

    name = "batcheddcrnn"

    def new_cell(self, K: int) -> Any:
        """The cell with fresh weights."""
        return _cells.BatchedDCRNN(self.in_channels, self.hidden_channels, K)

    def step(self, cell: Any, x: Tensor, graph: tuple[Any, ...], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """State after one more step, through the gates of the cell."""
        (before,) = state
        update = cell._calculate_update_gate(x, *graph, before, False)
        reset = cell._calculate_reset_gate(x, *graph, before, False)
        candidate = cell._calculate_candidate_state(x, *graph, before, reset, False)
        return (cell._calculate_hidden_state(update, before, candidate),)
