"""Who hears whom: the road graph weighed anew for every window, and a graph of the node vectors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stlora_peft.backbones.graphs import transition


def localised(matrix: Tensor, order: int) -> list[Tensor]:
    r"""Powers of a transition matrix without their diagonals, :math:`P^k \odot (1 - I)` for :math:`k = 1 \dots K`.

    What a node hears of itself is no diffusion.

    Args:
        matrix: Transition matrix :math:`P`.
        order: Highest power :math:`K`.

    Shapes:
        - **matrix**, each **output:** :math:`(*, N, N)`

    Example:
        >>> [power.tolist() for power in localised(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 2)]
        [[[0.0, 0.5], [1.0, 0.0]], [[0.0, 0.25], [0.5, 0.0]]]
    """
    others = 1 - torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    powers = [matrix]
    for _ in range(order - 1):
        powers.append(powers[-1] @ matrix)
    return [power * others for power in powers]


def adaptive(source_vectors: Tensor, target_vectors: Tensor) -> Tensor:
    r"""Transition matrix of the node vectors, :math:`P_{apt} = \mathrm{softmax}(\mathrm{relu}(E^d {E^u}^\top))`.

    Args:
        source_vectors: Vectors :math:`E^u` of the nodes that are heard.
        target_vectors: Vectors :math:`E^d` of the nodes that hear.

    Shapes:
        - **source_vectors**, **target_vectors:** :math:`(N, d)`
        - **output:** :math:`(N, N)`, what a node hears in its row
    """
    return (target_vectors @ source_vectors.T).relu().softmax(-1)


class Distance(nn.Module):
    r"""How much each node matters to each other one, from their windows, the time and their vectors.

    .. math::
        q_i, k_i = W^Q d_i, W^K d_i, \qquad d_i = f(x_i) \,\|\, T \,\|\, E_i , \qquad
        f(x) = W_2\, \mathrm{norm}(\mathrm{relu}(W_1 x + b_1)) + b_2 , \qquad
        s = q k^\top / \sqrt{D}

    with the window :math:`x_i` of all steps and values of a node, the vector :math:`T` of the last step's time and a
    batch normalisation.

    Args:
        window_size: Steps times values of a window.
        hidden_channels: Width :math:`D` of queries and keys.
        time_size: Width of :math:`T`.
        emb_size: Width of the node vectors :math:`E`.
        dropout: Share of values that training leaves out.

    Shapes:
        - **windows** of :meth:`read`: :math:`(B, N, window)`
        - **features**, its output: :math:`(B, N, D)`, **time:** :math:`(B, T)`, **vectors:** :math:`(N, E)`
        - **output:** :math:`(B, N, N)`, the scores of a node for all others in its row
    """

    def __init__(self, window_size: int, hidden_channels: int, time_size: int, emb_size: int, dropout: float) -> None:
        super().__init__()
        self.window_1 = nn.Linear(window_size, 2 * hidden_channels)
        self.norm = nn.BatchNorm1d(2 * hidden_channels)
        self.dropout = nn.Dropout(dropout)
        self.window_2 = nn.Linear(2 * hidden_channels, hidden_channels)
        width = hidden_channels + time_size + emb_size
        self.query = nn.Linear(width, hidden_channels, bias=False)
        self.key = nn.Linear(width, hidden_channels, bias=False)

    def read(self, windows: Tensor) -> Tensor:
        """Features of the windows, the same for both directions."""
        wide = self.window_1(windows).relu()
        normed = self.norm(wide.flatten(0, 1)).view_as(wide)  # of all nodes of the batch together
        features: Tensor = self.window_2(self.dropout(normed))
        return features

    def forward(self, features: Tensor, time: Tensor, vectors: Tensor) -> Tensor:
        """Compare the nodes of each sample."""
        batch, num_nodes, _ = features.shape
        now = time[:, None].expand(-1, num_nodes, -1)
        known = torch.cat([features, now, vectors.expand(batch, -1, -1)], -1)  # [b n c]
        query, key = self.query(known), self.key(known)
        scores: Tensor = query @ key.mT / math.sqrt(query.shape[-1])
        return scores


class DynamicGraph(nn.Module):
    r"""Localised transition matrices of every window: along the roads, against them, and of the node vectors.

    The road graph says who can hear whom, the distances how well at this time:

    .. math::
        P_f^{dy} = \mathrm{norm}\big(P_f \odot \mathrm{softmax}(s^d)\big), \qquad
        P_b^{dy} = \mathrm{norm}\big(P_b \odot \mathrm{softmax}(s^u)\big)

    with :math:`P_f` the row-normalised road graph in whose rows stands what a node hears along the edges,
    :math:`P_b` the one against them, and the scores :math:`s^d, s^u` from the vectors :math:`E^d, E^u`, see
    :class:`Distance`. The rows are scaled to one again; those of a node without neighbours stay zeros.

    Args:
        window_size: Steps times values of a window.
        hidden_channels: Width of queries and keys.
        time_size: Width of the vector of a time.
        emb_size: Width of the node vectors.
        order: Highest power of each matrix.
        dropout: Share of values that training leaves out.

    Shapes:
        - **road:** :math:`(N, N)`, sources in the rows
        - **windows:** :math:`(B, N, window)`, **time:** :math:`(B, T)`
        - **source_vectors**, **target_vectors:** :math:`(N, E)`
        - **output:** ``3 * order`` of :math:`(B, N, N)`, the powers along the roads first, then those against them
    """

    def __init__(
        self, window_size: int, hidden_channels: int, time_size: int, emb_size: int, order: int, dropout: float
    ) -> None:
        super().__init__()
        self.order = order
        self.distance = Distance(window_size, hidden_channels, time_size, emb_size, dropout)

    def forward(
        self, road: Tensor, windows: Tensor, time: Tensor, source_vectors: Tensor, target_vectors: Tensor
    ) -> list[Tensor]:
        """Weigh the road graph for these windows."""
        features = self.distance.read(windows)
        matrices = []
        for static, vectors in ((road.T, target_vectors), (road, source_vectors)):
            scores = self.distance(features, time, vectors)
            # Of the neighbours alone: it is the same but for the scale of a row, and far others cannot round it away.
            shares = scores.masked_fill(static == 0, torch.finfo(scores.dtype).min).softmax(-1)
            matrices += localised(transition(transition(static) * shares), self.order)
        fixed = localised(adaptive(source_vectors, target_vectors), self.order)
        # A product with a single matrix would round otherwise where the vectors need a gradient.
        return matrices + [matrix.expand_as(matrices[0]) for matrix in fixed]
