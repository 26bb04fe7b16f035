"""HeteroGCLSTM: a recurrent cell whose gates convolve separately along and against the edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.base import Forecaster
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # neither package ships types: this is the part of them that is used here

    class _HeteroConv(nn.Module):
        def __init__(self, convs: Mapping[tuple[str, str, str], nn.Module]) -> None:
            """Types of PyG's HeteroConv."""

    class _SAGEConv(nn.Module):
        def __init__(self, in_channels: int, out_channels: int) -> None:
            """Types of PyG's SAGEConv."""

    class _HeteroGCLSTM(nn.Module):
        def __init__(self, in_channels_dict: dict[str, int], out_channels: int, metadata: Any) -> None:
            """Types of torch-geometric-temporal's HeteroGCLSTM."""
else:
    _HeteroGCLSTM = tgt.load().nn.hetero.heterogclstm.HeteroGCLSTM
    from torch_geometric.nn import HeteroConv as _HeteroConv
    from torch_geometric.nn import SAGEConv as _SAGEConv

NODE = "sensor"
ALONG = (NODE, "along", NODE)
AGAINST = (NODE, "against", NODE)
_GATES = "ifco"


class Cell(_HeteroGCLSTM):
    """torch-geometric-temporal's HeteroGCLSTM for one type of node, with convolutions whose widths are known.

    Upstream they are lazy: without a first forward there is no optimiser, no copy and no saved state.
    """

    def __init__(self, in_channels: int, hidden_channels: int) -> None:
        super().__init__({NODE: in_channels}, hidden_channels, ([NODE], [ALONG, AGAINST]))
        for gate in _GATES:
            convolutions = {kind: _SAGEConv(hidden_channels, hidden_channels) for kind in (ALONG, AGAINST)}
            setattr(self, f"conv_{gate}", _HeteroConv(convolutions))


_TARGETS = ("cell", *(f"conv_{gate}.convs.<{'___'.join(ALONG)}>" for gate in _GATES), "head")


class HeteroGCLSTM(Forecaster):
    r"""torch-geometric-temporal's HeteroGCLSTM on a road graph, and a linear head on its last hidden state.

    Sensors are one type of node, joined by two types of edges: along the roads and against them. A gate of the cell
    reads the step and convolves the hidden state over each type with weights of its own,

    .. math::
        g_n = \sigma\Bigl(x_n W + b + \sum_{e \in \{along, against\}}
        \bigl(L_e \operatorname{mean}_{m \to_e n} h_m + R_e h_n\bigr)\Bigr)

    as the gates of an LSTM, so that what arrives from upstream and from downstream can be told apart. No weight is
    bound to a node: the network fits any number of them.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the hidden state.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** ignored, as neighbours are averaged
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = HeteroGCLSTM(in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        The cell of torch-geometric-temporal 0.56.2, an LSTM of GraphSAGE convolutions (Hamilton et al., NeurIPS
        2017, arXiv:1706.02216) after GC-LSTM (Chen et al., arXiv:1812.04206). Differs: several samples at once,
        states in the type and on the device of the input, no lazy layers.
    """

    name = "heterogclstm"
    # The root terms of the two types add up, so that one of the two is adapted.
    stlora_spec = BackboneSpec(
        target_modules=_TARGETS,
        node_layout=dict.fromkeys(_TARGETS, "b n c"),
        head=("head",),
    )

    def __init__(
        self,
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
        self.check_positive(hidden_channels=hidden_channels)
        self.hyperparameters |= {"hidden_channels": hidden_channels}
        self.hidden_channels = hidden_channels
        self.cell = Cell(in_channels, hidden_channels)
        self.head = nn.Linear(hidden_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the cell over the window; weights of the edges are not used."""
        edges = {ALONG: edge_index, AGAINST: edge_index.flip(0)}
        hidden = {NODE: x.new_zeros(x.shape[0], x.shape[2], self.hidden_channels)}
        cell = dict(hidden)
        for step in x.unbind(1):
            hidden, cell = self.cell({NODE: step}, edges, hidden, cell)
        change: Tensor = self.head(hidden[NODE])  # [b n (t c)]
        return change
