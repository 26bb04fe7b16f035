"""The diffusion block: what a node hears from others over the last few steps, and how that goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LocalisedConv(nn.Module):
    r"""Spatial-temporal localised convolution over the last :math:`k_t` steps.

    .. math::
        X^{(1)}_t \| \dots \| X^{(k_t)}_t = \mathrm{relu}\big((X_{t-k_t+1} \| \dots \| X_t)\, U\big), \qquad
        H_t = \Big(\bar X_t \,\big\|\, \big\|_k\, P_k^{local} X^{local}_t\Big)\, W + b

    with :math:`X^{local}_t` the :math:`k_t` transformed steps below each other, :math:`\bar X_t` their mean, and the
    localised matrices :math:`P_k^{local} = (P_k \| \dots \| P_k)`, each repeated for every step. As the repeated
    matrices are equal, the steps are summed before the product.

    Args:
        channels: Width of the series.
        kernel_size: Number of steps :math:`k_t`.
        num_matrices: Number of matrices.
        dropout: Share of values that training leaves out.

    Shapes:
        - **x:** :math:`(B, N, T, D)`
        - **matrices:** each :math:`(B, N, N)`
        - **output:** :math:`(B, N, T - k_t + 1, D)`
    """

    def __init__(self, channels: int, kernel_size: int, num_matrices: int, dropout: float) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.transform = nn.Linear(kernel_size * channels, kernel_size * channels, bias=False)
        self.mix = nn.Linear((num_matrices + 1) * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Hear what the other nodes sent."""
        steps = x.unfold(2, self.kernel_size, 1).mT.flatten(3)  # [b n t (k c)]
        total = self.transform(steps).relu().unflatten(3, (self.kernel_size, -1)).sum(3)  # [b n t c]
        rows = total.flatten(2)  # [b n (t c)]
        heard = [(matrix @ rows).view_as(total) for matrix in matrices]
        hidden: Tensor = self.dropout(self.mix(torch.cat([total / self.kernel_size, *heard], 3)))
        return hidden


class DiffusionBlock(nn.Module):
    r"""Hidden states of what spreads, and their forecast in strides.

    The convolution that reads the series goes on beyond it: its last state is taken for the next step, of which,
    with those before, it makes the one after,

    .. math:: H_{t+s+1} = \mathrm{conv}(\dots, X_t, H_t, \dots, H_{t+s}), \qquad s = 0 \dots S - 2

    always of the last :math:`k_t`. Each of the :math:`S` states is to forecast several steps.

    Args:
        hidden_channels: Width of the series.
        forecast_channels: Width of the forecast states.
        num_strides: Number of states :math:`S` of the forecast.
        kernel_size: Number of steps of the convolution.
        num_matrices: Number of matrices.
        dropout: Share of values that training leaves out.

    Shapes:
        - **x:** :math:`(B, N, T, D)`
        - **output:** the states :math:`(B, N, T - k_t + 1, D)` and the forecast :math:`(B, N, S, F)`
    """

    def __init__(
        self,
        hidden_channels: int,
        forecast_channels: int,
        num_strides: int,
        kernel_size: int,
        num_matrices: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_strides = num_strides
        self.conv = LocalisedConv(hidden_channels, kernel_size, num_matrices, dropout)
        self.forecast = nn.Linear(hidden_channels, forecast_channels)

    def forward(self, x: Tensor, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Read the series and go on with it."""
        states = self.conv(x, matrices)
        kernel = self.conv.kernel_size
        steps = torch.cat([x[:, :, -kernel:], states[:, :, -1:]], 2)
        for _ in range(self.num_strides - 1):
            steps = torch.cat([steps, self.conv(steps[:, :, -kernel:], matrices)], 2)
        return states, self.forecast(steps[:, :, -self.num_strides :])
