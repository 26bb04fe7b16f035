"""How a series is taken apart: a gate that estimates what spreads, and the removal of what a block explained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from stlora_peft.backbones.d2stgnn.diffusion import DiffusionBlock
from stlora_peft.backbones.d2stgnn.inherent import InherentBlock


class EstimationGate(nn.Module):
    r"""Estimate which share of a series spreads over the roads, from place and time alone.

    .. math::
        \Lambda_{t,i} = \sigma\big(W_2\, \mathrm{relu}(W_1 (T_t \,\|\, E_i) + b_1) + b_2\big), \qquad
        X^{dif} = \Lambda \odot X

    with the vector :math:`T_t` of a step's time and the vectors :math:`E_i = E^u_i \| E^d_i` of a node. The two parts
    of :math:`W_1` are layers of their own, so that each is applied once to every time and once to every node.

    Args:
        time_size: Width of :math:`T_t`.
        place_size: Width of :math:`E_i`.
        gate_channels: Width of the gate.

    Shapes:
        - **x**, **output:** :math:`(B, N, T, D)`
        - **times:** :math:`(B, \ge T, time)`, the last :math:`T` count; **places:** :math:`(N, place)`
    """

    def __init__(self, time_size: int, place_size: int, gate_channels: int) -> None:
        super().__init__()
        self.times = nn.Linear(time_size, gate_channels, bias=False)
        self.places = nn.Linear(place_size, gate_channels)
        self.share = nn.Linear(gate_channels, 1)

    def forward(self, x: Tensor, times: Tensor, places: Tensor) -> Tensor:
        """Take the share that spreads."""
        when = self.times(times[:, -x.shape[2] :])[:, None]  # [b 1 t c]
        hidden = (when + self.places(places)[:, None]).relu()  # [b n t c]
        share: Tensor = self.share(hidden).sigmoid()
        return share * x


class Decomposition(nn.Module):
    r"""Remove from a series what a block has explained of it.

    .. math:: X \leftarrow \mathrm{norm}\big(X - \mathrm{relu}(H W + b)\big)

    with the hidden states :math:`H` of the block and a layer normalisation over the channels.

    Args:
        hidden_channels: Width of series and states.

    Shapes:
        - **x:** :math:`(B, N, \ge T, D)`, the last :math:`T` steps count
        - **states**, **output:** :math:`(B, N, T, D)`
    """

    def __init__(self, hidden_channels: int) -> None:
        super().__init__()
        self.backcast = nn.Linear(hidden_channels, hidden_channels)
        self.norm = nn.LayerNorm(hidden_channels)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Leave the rest of the series."""
        rest: Tensor = self.norm(x[:, :, -states.shape[2] :] - self.backcast(states).relu())
        return rest


@dataclass(frozen=True)
class Surroundings:
    """What all layers read beside their series.

    Args:
        matrices: Localised transition matrices, see :class:`~stlora_peft.backbones.d2stgnn.dynamic_graph
            .DynamicGraph`.
        times: Vectors of the window's times, ``[b t c]``.
        places: Vectors of the nodes, ``[n c]``.
        positions: Positions of the steps, ``[t c]``.
    """

    matrices: list[Tensor]
    times: Tensor
    places: Tensor
    positions: Tensor


class DecoupledLayer(nn.Module):
    """A gate, a diffusion block, and an inherent block for what that leaves.

    Args:
        gate: Gate of the series.
        diffusion: Block of the share that spreads.
        inherent: Block of the rest.
        hidden_channels: Width of the series.

    Shapes:
        - **x:** :math:`(B, N, T, D)`
        - **output:** the series :math:`(B, N, T', D)` of the inherent block, its states of the same shape, and the
          sum of both forecasts, :math:`(B, N, S, F)`
    """

    def __init__(
        self, gate: EstimationGate, diffusion: DiffusionBlock, inherent: InherentBlock, hidden_channels: int
    ) -> None:
        super().__init__()
        self.gate = gate
        self.diffusion = diffusion
        self.decomposition = Decomposition(hidden_channels)
        self.inherent = inherent

    def forward(self, x: Tensor, around: Surroundings) -> tuple[Tensor, Tensor, Tensor]:
        """Take the series apart."""
        spread, spread_ahead = self.diffusion(self.gate(x, around.times, around.places), around.matrices)
        own = self.decomposition(x, spread)
        states, own_ahead = self.inherent(own, around.positions)
        return own, states, spread_ahead + own_ahead
