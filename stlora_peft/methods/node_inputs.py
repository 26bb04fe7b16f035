"""Node parameters at the input of a frozen backbone: node embeddings and node prompts."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.conditioning import factor_dtype

_AXES = (
    ("input steps", "window", "t", "give windows of the length that the backbone was trained on"),
    ("nodes", "num_nodes", "n", "give the nodes that it was built for, or build it with num_nodes={}"),
    ("channels", "in_channels", "c", "give the channels that the backbone was trained on"),
)


class InputShift(nn.Module):
    r"""A number for each step, node and channel of a window; subclasses say what it is made of.

    Args:
        num_nodes: Number of nodes :math:`N`.
        window: Number of input steps.
        in_channels: Channels of the input.

    Attributes:
        title: What it is called in errors.
        shape: Shape of the shift, :math:`(window, N, C_{in})`, ``[t n c]``.

    Raises:
        ValueError: If a size is below 1.
    """

    title: ClassVar[str]

    def __init__(self, num_nodes: int, window: int, in_channels: int) -> None:
        super().__init__()
        self.check_positive(num_nodes=num_nodes, window=window, in_channels=in_channels)
        self.shape = (window, num_nodes, in_channels)

    def forward(self) -> Tensor:
        """Compute the shift, ``[t n c]``."""
        raise NotImplementedError

    def check_positive(self, **sizes: int) -> None:
        """Raise unless every size is at least 1."""
        for key, value in sizes.items():
            if value < 1:
                self.refuse(f"{key} out of range", f"{key} >= 1", f"{key} = {value}", f"give a larger {key}")

    def refuse(self, problem: str, expected: str, got: str, fix: str) -> NoReturn:
        """Raise the error of this shift."""
        raise ValueError(message(f"{self.title}: {problem}", expected=expected, got=got, fix=fix))


class NodeEmbedding(InputShift):
    r"""A free vector :math:`e_i` of every node :math:`i`.

    .. math:: s_{t,i} = e_{i,t}

    Starts at zero. The time encodings are shifted too: a backbone that looks a time up by them, as STAEformer does,
    may come to read another time.

    Args:
        num_nodes: Number of nodes :math:`N`.
        window: Number of input steps :math:`T`.
        in_channels: Channels of the input, time encodings among them.

    Shapes:
        - **embedding:** :math:`(N, T, C_{in})`
        - **output:** :math:`(T, N, C_{in})`, ``[t n c]``

    Cost:
        :math:`N T C_{in}` parameters.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> NodeEmbedding(num_nodes=5, window=12, in_channels=3)().shape  # [t n c]
        torch.Size([12, 5, 3])

    References:
        Cini, Marisca, Zambon and Alippi, Taming Local Effects in Graph-based Spatiotemporal Forecasting, NeurIPS
        2023, arXiv:2302.04071. Differs: there the vectors are appended to the input of layers that were trained with
        them. A frozen backbone has no weights for further channels, so that here they are added to those it has.
    """

    title = "node embedding"

    def __init__(self, num_nodes: int, window: int, in_channels: int) -> None:
        super().__init__(num_nodes, window, in_channels)
        self.embedding = nn.Parameter(torch.zeros(num_nodes, window, in_channels))

    def forward(self) -> Tensor:
        """Compute the shift, ``[t n c]``."""
        return self.embedding.transpose(0, 1)


class NodePrompt(InputShift):
    r"""A low-rank table of shifts of the values; the time encodings stay as they are.

    .. math:: s_{t,i,c} = \sum_{m=1}^{k} U_{i,m} V_{m,(t,c)}

    for the first :math:`C` channels :math:`c`, which are the values themselves, and zero for the others.

    ``U`` starts at zero and ``V`` normal with variance :math:`1/k`: the shift starts at zero. With :math:`G` the
    loss's gradient by the shift, that by ``U`` is :math:`G V^\top`, which is not zero, and that by ``V`` is
    :math:`U^\top G`, which is: ``V`` follows from the second step on. Were both zero, neither would ever move.

    Args:
        num_nodes: Number of nodes :math:`N`.
        window: Number of input steps :math:`T`.
        in_channels: Channels of the input.
        out_channels: Channels of the forecast :math:`C`; of the input, as many are values, or all where there are
            fewer.
        rank: :math:`k`.

    Shapes:
        - **U:** :math:`(N, k)`, **V:** :math:`(k, T C)`, steps before channels
        - **output:** :math:`(T, N, C_{in})`, ``[t n c]``

    Cost:
        :math:`N k + k T C` parameters.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> prompt = NodePrompt(num_nodes=5, window=12, in_channels=3, out_channels=1)
        >>> prompt.U.shape, prompt.V.shape, prompt().shape
        (torch.Size([5, 6]), torch.Size([6, 12]), torch.Size([12, 5, 3]))

    References:
        EAC: Chen and Liang, Expand and Compress, ICLR 2025, arXiv:2410.12593. Differs: there both factors start
        uniform in :math:`\pm 0.1` and are first trained with the backbone; here the start is the backbone itself.
    """

    title = "node prompt"

    def __init__(self, num_nodes: int, window: int, in_channels: int, out_channels: int, rank: int = 6) -> None:
        super().__init__(num_nodes, window, in_channels)
        self.check_positive(out_channels=out_channels, rank=rank)
        self.value_channels = min(in_channels, out_channels)
        self.U = nn.Parameter(torch.zeros(num_nodes, rank))
        self.V = nn.Parameter(torch.randn(rank, window * self.value_channels) / math.sqrt(rank))

    def forward(self) -> Tensor:
        """Compute the shift, ``[t n c]``."""
        window, num_nodes, in_channels = self.shape
        values = (self.U @ self.V).view(num_nodes, window, self.value_channels)
        return F.pad(values, (0, in_channels - self.value_channels)).transpose(0, 1)


class NodeInputs(nn.Module):
    r"""A forecaster :math:`f` whose input is shifted at every node by numbers of the node's own.

    .. math:: \hat y = f(x + s, E)

    A shift that is zero leaves the forecast as it is, bit for bit. A backbone that forecasts the change since the
    last step of the window adds that step again, shifted: there the shift is also a bias of the node's forecast.

    It freezes nothing; :func:`node_embedding` and :func:`node_prompt` do. Of attributes that it does not have, it
    gives the backbone's.

    Args:
        backbone: The forecaster :math:`f`.
        shift: The shift :math:`s`.

    Shapes:
        - **x:** :math:`(B, window, N, C_{in})`, ``[b t n c]``
        - **output:** the backbone's
    """

    def __init__(self, backbone: nn.Module, shift: InputShift) -> None:
        super().__init__()
        self.backbone = backbone
        self.shift = shift

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Run the backbone on the shifted input.

        Args:
            x: Scaled readings and time encodings.
            edge_index: Edges of the road graph, for the backbone.
            edge_weight: Weights of the edges, for the backbone.

        Raises:
            ValueError: If the shape of ``x`` does not fit the shift.
        """
        self.check_input(x)
        forecast: Tensor = self.backbone(x + self.shift().to(x.dtype), edge_index, edge_weight)
        return forecast

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit the shift, before any arithmetic.

        Raises:
            ValueError: If the number of axes, of steps, of nodes or of channels is wrong.
        """
        shape = tuple(x.shape)
        if x.ndim != 4:
            self.shift.refuse(
                "wrong number of axes",
                "4 axes 'b t n c'",
                f"{x.ndim} axes: {shape}",
                "give x one axis for each of batch, steps, nodes and channels, also where its length is 1",
            )
        for (noun, name, letter, fix), size, found in zip(_AXES, self.shift.shape, shape[1:], strict=True):
            if found != size:
                self.shift.refuse(
                    f"wrong number of {noun}",
                    f"{name}={size} on axis '{letter}' of 'b t n c'",
                    f"{name}={found} from an input of shape {shape}",
                    fix.format(found),
                )

    def __getattr__(self, name: str) -> Any:
        """Forward what is asked of the backbone, e.g. ``window``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return getattr(self.backbone, name)


def node_embedding(backbone: nn.Module, num_nodes: int) -> NodeInputs:
    """Freeze a backbone, in place, and put a :class:`NodeEmbedding` of a city at its input.

    Args:
        backbone: Forecaster with the attributes ``window`` and ``in_channels``.
        num_nodes: Number of nodes of the city.

    Raises:
        ValueError: If ``num_nodes`` is below 1, or the backbone does not say its sizes.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> model = node_embedding(build_backbone("lstm", in_channels=3), num_nodes=5)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['shift.embedding']
    """
    window, in_channels = _sizes(backbone, "window", "in_channels")
    return _frozen(backbone, NodeEmbedding(num_nodes, window, in_channels))


def node_prompt(backbone: nn.Module, num_nodes: int, rank: int = 6) -> NodeInputs:
    """Freeze a backbone, in place, and put a :class:`NodePrompt` of a city at its input.

    Args:
        backbone: Forecaster with the attributes ``window``, ``in_channels`` and ``out_channels``.
        num_nodes: Number of nodes of the city.
        rank: Rank of the prompts.

    Raises:
        ValueError: If ``num_nodes`` or ``rank`` is below 1, or the backbone does not say its sizes.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> model = node_prompt(build_backbone("lstm", in_channels=3), num_nodes=5)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['shift.U', 'shift.V']
    """
    window, in_channels, out_channels = _sizes(backbone, "window", "in_channels", "out_channels")
    return _frozen(backbone, NodePrompt(num_nodes, window, in_channels, out_channels, rank))


def _frozen(backbone: nn.Module, shift: InputShift) -> NodeInputs:
    """Freeze the backbone and bring the shift to its device and type."""
    like = next(backbone.parameters(), torch.zeros(()))
    return NodeInputs(backbone.requires_grad_(False), shift.to(device=like.device, dtype=factor_dtype(like)))


def _sizes(backbone: nn.Module, *names: str) -> tuple[int, ...]:
    """Read sizes that the backbone must say."""
    missing = [name for name in names if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            message(
                f"backbone '{type(backbone).__name__}' does not say the size of its input",
                expected=f"attributes {', '.join(names)}",
                got=f"no {', '.join(missing)}",
                fix="set them in the class, or leave node-embedding and node-prompt out",
            )
        )
    return tuple(int(getattr(backbone, name)) for name in names)
