"""A3TGCN and A3TGCN2: an attention over the steps of a TGCN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent
_LAYERS = ("conv_z", "conv_h", "linear_z", "linear_h")


class A3TGCNForecaster(RecurrentForecaster):
    r"""A TGCN whose states are averaged by learned weights of the steps, and a linear head.

    .. math::
        h_t = \mathrm{TGCN}(x_t, h_{t-1}), \qquad
        \hat y_n = W \sum_{t=1}^{T} \mathrm{softmax}(a)_t \, h_{t,n} + b \; [\, + x_{T,n} \,]

    torch-geometric-temporal never passes the state on: each of its steps starts at :math:`h_{t-1} = 0`, so that the
    network is a weighted mean of separate steps, its reset gate (``conv_r``, ``linear_r``) and the half of
    ``linear_z`` and ``linear_h`` that reads the state never train. These numbers are kept unless ``carry_state=True``,
    with a warning. The reset gate is therefore no default target of an adapter.

    It fits any number of nodes, but the weights :math:`a` belong to the ``window`` that it was built for. The cell has
    no batch axis and runs on the union of :math:`B` copies of the graph; :class:`A3TGCN2Forecaster` computes the same
    from the same weights with a batch axis.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        carry_state: Pass the state on from step to step, as the paper does. A network that was trained without it
            forecasts differently with it.
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
        >>> model = A3TGCNForecaster(in_channels=3, hidden_channels=8, carry_state=True)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Bai et al. (A3T-GCN), ISPRS IJGI 2021, arXiv:2006.11583, as torch-geometric-temporal's ``A3TGCN`` builds it.
        Differs: the weights of the steps are parameters instead of computed from the states, and the state is passed
        on with ``carry_state=True`` only; the residual.
    """

    name = "a3tgcn"
    folded = True
    stlora_spec = cell_spec(_LAYERS, "(b n) c")

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        carry_state: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels)
        self.hyperparameters["carry_state"] = carry_state
        self.carry_state = carry_state
        self.cell = self.new_cell()
        # upstream puts this parameter, unlike the others, on a CUDA device where there is one
        self.cell._attention = nn.Parameter(torch.rand(window))
        self.head = self.new_head(hidden_channels)
        if window > 1 and not carry_state:
            self.warn_once(
                "torch-geometric-temporal does not pass its state on",
                "h_t computed from h_(t-1)",
                f"each of the {window} steps computed from a state of zero",
                "build it with carry_state=True and train it so, or ignore this if its weights come from there",
            )

    def new_cell(self) -> Any:
        """The cell with fresh weights."""
        return _cells.A3TGCN(self.in_channels, self.hidden_channels, periods=self.window)

    def step(self, cell: Any, x: Tensor, graph: tuple[Any, ...], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """State after one more step of the TGCN inside the cell."""
        before = state if self.carry_state else (torch.zeros_like(state[0]),)
        return super().step(cell._base_tgcn, x, graph, before)

    def read(self, outputs: list[Tensor]) -> Tensor:
        """Mean of the states, weighted by the attention."""
        mean: Tensor = torch.tensordot(self.cell._attention.softmax(0), torch.stack(outputs), 1)
        return mean


class A3TGCN2Forecaster(A3TGCNForecaster):
    r"""A TGCN2 whose states are averaged by learned weights of the steps, with a batch axis, and a linear head.

    The network of :class:`A3TGCNForecaster`, whose docstring has the formula and the defect that is kept by default,
    around the cell that takes batches. Each loads the other's state dict.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        carry_state: Pass the state on from step to step, as the paper does. A network that was trained without it
            forecasts differently with it.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees ``[b n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = A3TGCN2Forecaster(in_channels=3, hidden_channels=8, carry_state=True)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Bai et al. (A3T-GCN), ISPRS IJGI 2021, arXiv:2006.11583, as torch-geometric-temporal's ``A3TGCN2`` builds it.
        Differs: the weights of the steps are parameters instead of computed from the states, and the state is passed
        on with ``carry_state=True`` only; the residual.
    """

    name = "a3tgcn2"
    folded = False
    stlora_spec = cell_spec(_LAYERS, "b n c")

    def new_cell(self) -> Any:
        """The cell with fresh weights; it does not use its ``batch_size``."""
        return _cells.A3TGCN2(self.in_channels, self.hidden_channels, periods=self.window, batch_size=1)
