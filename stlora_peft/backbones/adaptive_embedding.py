"""The vectors that STAEformer learns for each step at each node, and what an adapter has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from stlora_peft.backbones.nodes import NodeBound, mean_entry


class AdaptiveEmbedding(NodeBound):
    """A learned vector for each step of the window at each node.

    In another city every node starts from the mean over the nodes, step by step. The nodes then differ by their
    readings alone, which is enough for the attention to tell them apart and for the vectors to part.

    Args:
        window: Number of steps :math:`T`.
        num_nodes: Number of nodes :math:`N`.
        emb_size: Width of the vectors.

    Shapes:
        - **output:** :math:`(T, N, D)`, whatever the input
    """

    node_axes: ClassVar[Mapping[str, int] | None] = {"weight": 1}

    def __init__(self, window: int, num_nodes: int, emb_size: int) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.weight = nn.Parameter(torch.empty(window, num_nodes, emb_size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """All vectors; an adapter gives them the type of ``x``."""
        return self.weight

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """The mean over the nodes, for each node."""
        return {"weight": mean_entry(self.weight, 1, num_nodes, summed=False)}

    def adapted(self, num_nodes: int) -> NodeBound:
        """A low-rank table in another city; in one of as many nodes, perhaps the same, a whole copy."""
        return self.resized(num_nodes) if num_nodes == self.num_nodes else LowRankEmbedding(self, num_nodes)


class LowRankEmbedding(NodeBound):
    r"""The vectors of an adapter's city: the mean over the backbone's nodes, and what sets each node apart.

    .. math:: E_{t,n} = \overline{E_t} + \sum_{k=1}^{r} u_{n,k} V_{t,k}

    :math:`V` starts at zero, so all nodes start from the mean. Of a whole table every node would have :math:`T D`
    numbers of its own, most of what an adapter holds.

    Args:
        base: The backbone's vectors :math:`E`, which are frozen.
        num_nodes: Number of nodes :math:`N` of the city.
        r: Rank.

    Shapes:
        - **rows** :math:`u`: :math:`(N, r)`; **basis** :math:`V`: :math:`(T, r, D)`
        - **output:** :math:`(T, N, D)`, whatever the input

    Cost:
        :math:`r (N + T D)` trained numbers in place of :math:`N T D`.

    References:
        Node prompts of low rank: Chen and Liang (EAC), ICLR 2025, arXiv:2410.12593, whose errors are lowest at ranks 6
        to 8. Differs: deep in the input of a transformer, and one for each step of the window.
    """

    node_axes: ClassVar[Mapping[str, int] | None] = {"rows": 0}
    mean: Tensor

    def __init__(self, base: AdaptiveEmbedding, num_nodes: int, r: int = 6) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        mean = base.weight.detach().mean(1, keepdim=True)
        self.register_buffer("mean", mean, persistent=False)  # it is the backbone's, and not saved with the adapter
        self.rows = nn.Parameter(torch.randn(num_nodes, r, dtype=mean.dtype, device=mean.device))
        self.basis = nn.Parameter(mean.new_zeros(len(mean), r, mean.shape[2]))

    @property
    def weight(self) -> Tensor:
        """All vectors."""
        return self.mean + torch.einsum("nr,trd->tnd", self.rows, self.basis)

    def forward(self, x: Tensor) -> Tensor:
        """All vectors; an adapter gives them the type of ``x``."""
        return self.weight

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """The mean over the nodes, for each node."""
        return {"rows": mean_entry(self.rows, 0, num_nodes, summed=False)}

    def folded(self) -> AdaptiveEmbedding:
        """The vectors as a table."""
        weight = self.weight.detach()
        whole = AdaptiveEmbedding(*weight.shape)
        whole.weight = nn.Parameter(weight)
        return whole
