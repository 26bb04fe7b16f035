"""What the forecasters of this package have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stlora_peft.backbones.graphs import check_graph
from stlora_peft.errors import message
from stlora_peft.tuner.spec import BackboneSpec


class Forecaster(nn.Module):
    r"""A network that maps a window of readings of every node to a forecast of every node.

    Subclasses compute :meth:`decode`. With ``residual=True`` the network forecasts the change since the last step of
    the window,

    .. math::
        \hat y_{h} = x_{\mathrm{last}} + f(x)_h , \qquad h = 1 \dots H ,

    where :math:`x_{\mathrm{last}}` are the first ``out_channels`` channels of the last step. The level of a sensor
    then never passes through the weights, which is what differs most from city to city.

    Args:
        window: Number of input steps.
        horizon: Number of forecast steps :math:`H`.
        in_channels: Channels of the input. The first ``out_channels`` of them are the scaled values themselves,
            the others (time of day, day of week) only inform.
        out_channels: Channels of the forecast.
        residual: Forecast the change since the last step of the window instead of the value itself.

    Attributes:
        name: Name under which :func:`stlora_peft.backbones.build_backbone` knows the class.
        stlora_spec: What the tuner adapts by default and where it finds the node axis.
        hyperparameters: Arguments that build the same network again, as JSON can hold them.

    Shapes:
        - **x:** :math:`(B, window, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, source above target
        - **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values. Invert the scaler before quoting an error.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
    """

    name: ClassVar[str]
    stlora_spec: ClassVar[BackboneSpec]

    def __init__(self, *, window: int, horizon: int, in_channels: int, out_channels: int, residual: bool) -> None:
        super().__init__()
        self.check_positive(window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels)
        if residual and in_channels < out_channels:
            raise ValueError(
                message(
                    f"backbone '{self.name}': too few input channels for residual=True",
                    expected=f"in_channels >= out_channels = {out_channels}",
                    got=f"in_channels = {in_channels}",
                    fix="give the network the values that it forecasts as its first channels, or set residual=False",
                )
            )
        self.window = window
        self.horizon = horizon
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.residual = residual
        self.hyperparameters: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "window": window,
            "horizon": horizon,
            "residual": residual,
        }

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Forecast ``horizon`` steps of every node.

        Args:
            x: Scaled readings and time encodings.
            edge_index: Edges of the road graph.
            edge_weight: Weights of the edges; all one where absent.

        Shapes:
            - **x:** :math:`(B, window, N, C_{in})`
            - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)`
            - **output:** :math:`(B, H, N, C_{out})`

        Raises:
            ValueError: If the shape of ``x`` does not fit the network, or the edges do not fit its nodes.
        """
        self.check_input(x)
        check_graph(edge_index, edge_weight, x.shape[2])
        change = self.decode(x, edge_index, edge_weight)  # [b n (t c)]
        forecast = change.reshape(*change.shape[:2], self.horizon, self.out_channels).transpose(1, 2)  # [b t n c]
        return forecast + x[:, -1:, :, : self.out_channels] if self.residual else forecast

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Compute ``horizon * out_channels`` numbers for every node, steps before channels: ``[b n (t c)]``."""
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit, before any arithmetic.

        Raises:
            ValueError: If the number of axes, of steps or of channels is wrong.
        """
        shape = tuple(x.shape)
        if x.ndim != 4:
            self.refuse(
                "wrong number of axes",
                "4 axes 'b t n c'",
                f"{x.ndim} axes: {shape}",
                "give x one axis for each of batch, steps, nodes and channels, also where its length is 1",
            )
        if shape[1] != self.window:
            self.refuse(
                "wrong number of input steps",
                f"window={self.window} on axis 't' of 'b t n c'",
                f"{shape[1]} steps from an input of shape {shape}",
                f"give {self.window} steps, or build the backbone with window={shape[1]}",
            )
        if shape[3] != self.in_channels:
            self.refuse(
                "wrong number of channels",
                f"in_channels={self.in_channels} on axis 'c' of 'b t n c'",
                f"{shape[3]} channels from an input of shape {shape}",
                f"give the channels of the training data, or build the backbone with in_channels={shape[3]}",
            )

    def check_positive(self, **sizes: int) -> None:
        """Refuse sizes below 1.

        Raises:
            ValueError: If a size is below 1.
        """
        for key, value in sizes.items():
            if value < 1:
                self.refuse(f"{key} out of range", f"{key} >= 1", f"{key} = {value}", f"give a larger {key}")

    def refuse(self, problem: str, expected: str, got: str, fix: str) -> None:
        """Raise the error of this backbone.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message(f"backbone '{self.name}': {problem}", expected=expected, got=got, fix=fix))
