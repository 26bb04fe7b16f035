"""EvolveGCNH and EvolveGCNO: a graph convolution whose weights change from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent


class EvolveGCNOForecaster(RecurrentForecaster):
    r"""A graph convolution whose weights evolve over the window, and a linear head on all of its steps.

    .. math::
        W_t = \mathrm{GRU}(W_{t-1}, W_{t-1}), \qquad
        z_t = \mathrm{relu}(\hat A \, (x_t V + v) \, W_t), \qquad
        \hat y_n = U\, \mathrm{vec}(z_{1 \dots T, n}) + b \; [\, + x_{T,n} \,]

    with the normalised adjacency :math:`\hat A` and an embedding :math:`V` of the input, because the weights that
    evolve are square. The rows of :math:`W` are what the GRU takes for a batch. No state reaches step :math:`t` from
    the readings of an earlier one, so the head reads every step.

    The weights start at ``initial_weight`` in each call; torch-geometric-temporal goes on where the last call ended.
    Neither the GRU, which sees no nodes, nor the convolution, whose weights are no parameters, is a default target of
    an adapter.

    It fits any number of nodes, but the head belongs to the ``window`` that it was built for.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the embedding and of the convolution.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = EvolveGCNOForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Pareja et al. (EvolveGCN), AAAI 2020, arXiv:1902.10191, version O with a GRU, as torch-geometric-temporal's
        ``EvolveGCNO`` builds it. Differs: one layer; the head reads all steps of a window instead of the last one.
    """

    name = "evolvegcno"
    stlora_spec = cell_spec(("embed",), "b t n c")

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels)
        self.embed = nn.Linear(in_channels, hidden_channels)
        self.cell = self.new_cell()
        self.head = self.new_head(window * hidden_channels)

    def new_cell(self) -> Any:
        """The cell with fresh weights."""
        return _cells.EvolveGCNO(self.hidden_channels)

    def encode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Embed the readings, then run the cell over them."""
        return super().encode(self.embed(x), edge_index, edge_weight)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Weights before the first step, one matrix for all samples."""
        return (self.cell.initial_weight,)

    def step(self, cell: Any, x: Tensor, graph: tuple[Any, ...], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Output of the convolution, and its weights, of which the last step's come in.

        The parts of the cell are called one by one: its own ``forward`` would keep the weights, and their graph of
        gradients, until the next call.
        """
        weight = state[-1]
        _, weight = cell.recurrent_layer(self.summary(x, weight), weight)
        square = weight.reshape(-1, self.hidden_channels, self.hidden_channels)  # [b c c]
        convolved: Tensor = cell.conv_layer(square, x, *graph)
        return convolved.relu(), weight

    def summary(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the GRU reads at a step: the weights themselves."""
        return weight

    def read(self, outputs: list[Tensor]) -> Tensor:
        """All steps side by side."""
        return torch.cat(outputs, dim=-1)


class EvolveGCNHForecaster(EvolveGCNOForecaster):
    r"""A graph convolution whose weights evolve with the readings, and a linear head on all of its steps.

    .. math::
        W_t = \mathrm{GRU}(\mathrm{top}_C(x_t V + v), W_{t-1}), \qquad
        z_t = \mathrm{relu}(\hat A \, (x_t V + v) \, W_t), \qquad
        \hat y_n = U\, \mathrm{vec}(z_{1 \dots T, n}) + b \; [\, + x_{T,n} \,]

    as in :class:`EvolveGCNOForecaster`, save that the GRU reads the embeddings of the :math:`C` nodes with the highest
    scores, :math:`C` being ``hidden_channels``, each multiplied with its score. Every sample has weights of its own.

    torch-geometric-temporal takes :math:`C` nodes as the share :math:`C / N` of them, which fails for some pairs of
    numbers by rounding, always for :math:`C \geq N`, and in any other city. Here it is the number itself; a city with
    fewer nodes than :math:`C` has its last one repeated.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the embedding and of the convolution, and number :math:`C` of nodes read.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = EvolveGCNHForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Pareja et al. (EvolveGCN), AAAI 2020, arXiv:1902.10191, version H, as torch-geometric-temporal's
        ``EvolveGCNH`` builds it; its authors' code repeats the last node too. Differs: one layer; the head reads all
        steps of a window instead of the last one.
    """

    name = "evolvegcnh"

    def new_cell(self) -> Any:
        """The cell with fresh weights; its number of nodes only serves the share that is not used."""
        return _cells.EvolveGCNH(self.hidden_channels, self.hidden_channels)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Weights before the first step, a matrix for each sample, rows below each other."""
        return (self.cell.initial_weight.repeat(1, x.shape[0], 1),)

    def summary(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the GRU reads at a step: the nodes with the highest scores, times their scores."""
        select, (_, nodes, width) = self.cell.pooling_layer.select, x.shape
        scores = select.act((x * select.weight).sum(-1) / select.weight.norm())  # [b n]
        best = scores.topk(min(nodes, width), dim=1)
        top = x.take_along_dim(best.indices[..., None], dim=1) * best.values[..., None]  # [b n c]
        missing = top[:, -1:].expand(-1, width - top.shape[1], -1)
        return torch.cat([top, missing], dim=1).flatten(0, 1)[None]  # [1 (b c) c]
