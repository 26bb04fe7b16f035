"""The method's formulas as loops over nodes, in float64, written from the equations and never from the package.

Tensors are laid out ``b t n c``. Autograd runs through the loops, so their gradients are references too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def node_factors(conditioning: str, factors: Mapping[str, Tensor], node: int) -> tuple[Tensor, Tensor]:
    """A_i, and the vector h_i that B carries to the output as a bias of the node."""
    A = factors["A"]
    none = torch.zeros(factors["B"].shape[1], dtype=A.dtype)
    if conditioning == "bias":
        return A, factors["node_vector"][node]
    if conditioning == "full":
        return A[node], none
    if conditioning == "core":
        return torch.tensordot(factors["core"][node], A, dims=1), none
    if conditioning == "shared":
        return A, none
    if conditioning == "gate":
        gate, bias = factors["gate"][node], factors["node_bias"][node]
    else:
        vector = factors["emb"][node]
        gate, bias = 1 + factors["gate_map"] @ vector, factors["node_bias_map"] @ vector
    return torch.tensordot(torch.diag(gate), A, dims=1), bias


def with_matrix(factors: Mapping[str, Tensor], *in_shape: int) -> Mapping[str, Tensor]:
    """The factors with A = 0 where the form has none: a node bias."""
    rank = factors["B"].shape[1]
    return factors if "A" in factors else {**factors, "A": factors["B"].new_zeros(rank, *in_shape)}


def scale_of(alpha: float, r: int, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) where the update is rank-stabilised."""
    return alpha / (r**0.5 if rslora else r)


def pointwise_update(x: Tensor, conditioning: str, factors: Mapping[str, Tensor], scale: float) -> Tensor:
    """scale * B (A_i x_i + h_i) at every sample, step and node."""
    factors = with_matrix(factors, x.shape[-1])
    samples = []
    for b in range(x.shape[0]):
        steps = []
        for t in range(x.shape[1]):
            nodes = []
            for n in range(x.shape[2]):
                A, h = node_factors(conditioning, factors, n)
                nodes.append(scale * (factors["B"] @ (A @ x[b, t, n] + h)))
            steps.append(torch.stack(nodes))
        samples.append(torch.stack(steps))
    return torch.stack(samples)


@dataclass(frozen=True)
class Temporal:
    """A convolution along time: kernel width, stride, dilation, steps added before and after, and with what."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"


def padded(series: Tensor, conv: Temporal) -> list[Tensor]:
    """The steps of one series ``t c`` with those that padding adds."""
    last = len(series) - 1
    steps = []
    for t in range(-conv.before, len(series) + conv.after):
        if 0 <= t <= last:
            steps.append(series[t])
        elif conv.mode == "circular":
            steps.append(series[t % len(series)])
        elif conv.mode == "reflect":
            steps.append(series[-t if t < 0 else 2 * last - t])
        elif conv.mode == "replicate":
            steps.append(series[0 if t < 0 else last])
        else:
            steps.append(torch.zeros_like(series[0]))
    return steps


def conv_update(
    x: Tensor, conditioning: str, factors: Mapping[str, Tensor], scale: float, conv: Temporal = Temporal()
) -> Tensor:
    """scale * B (sum_k A_ik x_i,(st + dk) + h_i): A_i is a temporal kernel, given as (r, F_in, K)."""
    factors = with_matrix(factors, x.shape[-1], conv.kernel)
    samples = []
    for b in range(x.shape[0]):
        nodes = []
        for n in range(x.shape[2]):
            A, h = node_factors(conditioning, factors, n)
            series = padded(x[b, :, n], conv)
            steps = []
            for start in range(0, len(series) - conv.dilation * (conv.kernel - 1), conv.stride):
                u = h
                for k in range(conv.kernel):
                    u = u + A[..., k] @ series[start + conv.dilation * k]
                steps.append(scale * (factors["B"] @ u))
            nodes.append(torch.stack(steps))
        samples.append(torch.stack(nodes, dim=1))
    return torch.stack(samples)


def conv_base(x: Tensor, weight: Tensor, bias: Tensor, conv: Temporal) -> Tensor:
    """The frozen convolution, weight (F_out, F_in, K), as the same loop."""
    shared = {"A": weight, "B": torch.eye(len(weight), dtype=weight.dtype)}
    return conv_update(x, "shared", shared, 1.0, conv) + bias


def dense_graph(edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> Tensor:
    """Matrix whose entry [i, j] is the weight of the edge from j to i."""
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    for e in range(edge_index.shape[1]):
        source, target = int(edge_index[0, e]), int(edge_index[1, e])
        adjacency[target, source] += edge_weight[e]
    return adjacency


def gcn_base(x: Tensor, weight: Tensor, bias: Tensor, adjacency: Tensor) -> Tensor:
    """Kipf and Welling's convolution: D^-1/2 (A + I) D^-1/2 X W + b, D the in-degrees with self-loops."""
    loops = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype)
    root = loops.sum(1).rsqrt()
    norm = root[:, None] * loops * root[None, :]
    rows = []
    for i in range(len(norm)):
        heard = sum(norm[i, j] * (x[:, :, j] @ weight.T) for j in range(len(norm)))
        rows.append(heard + bias)
    return torch.stack(rows, dim=2)


def cheb_base(x: Tensor, weights: list[Tensor], bias: Tensor, adjacency: Tensor) -> Tensor:
    """Chebyshev convolution of a symmetric graph without self-loops; the largest eigenvalue counts as 2."""
    root = adjacency.sum(1).rsqrt()
    laplacian = -(root[:, None] * adjacency * root[None, :])  # 2 L / 2 - I
    terms = [x, torch.einsum("ij,btjc->btic", laplacian, x)]
    while len(terms) < len(weights):
        terms.append(2 * torch.einsum("ij,btjc->btic", laplacian, terms[-1]) - terms[-2])
    return sum(term @ weight.T for term, weight in zip(terms, weights, strict=False)) + bias


def gate_products(x: Tensor, weights: list[Tensor], update: Tensor) -> list[Tensor]:
    """x W_g for each of the gates i, f, c, o, with that gate's part of ``update``, at every sample, step and node."""
    width, products = weights[0].shape[1], []
    for g, weight in enumerate(weights):
        rows = [torch.stack([weight.T @ x[b, t, n] for n in range(x.shape[2])]) for b, t in np.ndindex(*x.shape[:2])]
        product = torch.stack(rows).view(*x.shape[:3], width)
        products.append(product + update[..., width * g : width * (g + 1)])
    return products


def lstm_gates(gates: list[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
    """State and cell state after the gates i, f, c, o, given before their activation."""
    i, f, g, o = gates
    after = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * after.tanh(), after


def mean_of_neighbours(h: Tensor, edge_index: Tensor) -> Tensor:
    """At each node the mean of ``h`` over the sources of the edges that end there."""
    rows = []
    for node in range(h.shape[2]):
        sources = [int(s) for s, t in edge_index.T if int(t) == node]
        rows.append(sum(h[:, :, s] for s in sources) / len(sources) if sources else torch.zeros_like(h[:, :, 0]))
    return torch.stack(rows, dim=2)


def predictor_correction(
    window: Tensor,
    forecast: Tensor,
    weights: Mapping[str, Tensor],
    conditioning: str,
    scale: float,
    num_layers: int,
    emb: Tensor | None = None,
    history_channels: int = 1,
) -> Tensor:
    """H_0 = W [X, c, Y] + b; H_l = H_(l-1) + NALL_l(s(H_(l-1))); dY = NALL_out(s(H_L)), node by node."""

    def activation(h: Tensor, name: str) -> Tensor:
        h = h / (h.square().mean() + torch.finfo(h.dtype).eps).sqrt() * weights[f"norm_{name}"]
        return torch.where(h > 0, h, 0.1 * h)

    def nall(h: Tensor, name: str, node: int) -> Tensor:
        factors = {key[: -len(name) - 1]: value for key, value in weights.items() if key.endswith(f"_{name}")}
        if emb is not None:
            factors["emb"] = emb
        A, bias = node_factors(conditioning, with_matrix(factors, len(h)), node)
        return factors["weight"] @ h + factors["bias"] + scale * (factors["B"] @ (A @ h + bias))

    out = torch.empty_like(forecast)
    for b in range(window.shape[0]):
        for n in range(window.shape[2]):
            past, last = window[b, :, n, :history_channels], window[b, -1, n, history_channels:]
            z = torch.cat([past.flatten(), last, forecast[b, :, n].flatten()])
            h = weights["weight_in"] @ z + weights["bias_in"]
            for layer in range(num_layers):
                h = h + nall(activation(h, str(layer)), str(layer), n)
            out[b, :, n] = nall(activation(h, "out"), "out", n).view_as(forecast[b, :, n])
    return out


def normalisation_statistics(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each node over everything in ``batches``, nodes on axis 1."""
    rows = np.concatenate(
        [np.moveaxis(np.asarray(batch, np.float64), 1, 0).reshape(batch.shape[1], -1) for batch in batches], axis=1
    )
    return rows.mean(1), rows.var(1, ddof=1)


def resized_rows(value: np.ndarray, num_nodes: int) -> np.ndarray:
    """Every row the mean over the old nodes."""
    return np.stack([np.asarray(value, np.float64).mean(0)] * num_nodes)


def mixture_variance(mean: np.ndarray, variance: np.ndarray) -> float:
    """Variance of one reading drawn from a node that is drawn at random."""
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    return float((variance + mean**2).mean() - mean.mean() ** 2)
