"""The formulas of D2STGNN as plain loops in float64, one sample at a time, nodes before steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones.d2stgnn.decoupling import Decomposition, DecoupledLayer, EstimationGate
from stlora_peft.backbones.d2stgnn.diffusion import DiffusionBlock, LocalisedConv
from stlora_peft.backbones.d2stgnn.dynamic_graph import Distance, DynamicGraph
from stlora_peft.backbones.d2stgnn.inherent import InherentBlock, StepAttention
from stlora_peft.backbones.d2stgnn.times import TimeVectors

B, N, T, D, F = 2, 5, 6, 4, 3
EDGES = torch.tensor([[0, 0, 1, 2, 2], [1, 2, 2, 0, 2]])  # one way but for 0 and 2; nothing leads to or from 3 and 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 0.25, 1.0], dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def ready(module: nn.Module) -> Any:
    """A module in evaluation mode and float64 whose normalisations have weights and statistics of their own."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.LayerNorm):
            values = [part.weight, part.bias, *(value for value in part.buffers() if value.is_floating_point())]
            for value in values:
                value.data.add_(torch.rand_like(value))
    return module.double().eval()


def weighted(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear map of one vector."""
    out = layer.weight @ x
    return out if layer.bias is None else out + layer.bias


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


# -- graphs -----------------------------------------------------------------------------------------------------


def road_matrices() -> tuple[Tensor, Tensor]:
    """P_f and P_b from the list of edges: what a node hears along them, and against them, in its row."""
    along, against = torch.zeros(N, N).double(), torch.zeros(N, N).double()
    for (source, target), weight in zip(EDGES.T.tolist(), WEIGHTS.tolist(), strict=True):
        along[target, source] += weight
        against[source, target] += weight
    for matrix in (along, against):
        for i in range(N):
            if matrix[i].sum() > 0:
                matrix[i] /= matrix[i].sum()
    return along, against


def powers_without_diagonal(matrix: Tensor, order: int) -> list[Tensor]:
    power, found = matrix, []
    for k in range(order):
        if k:
            power = torch.stack([sum(power[i, m] * matrix[m] for m in range(N)) for i in range(N)])
        found.append(power.clone())
        for i in range(N):
            found[-1][i, i] = 0
    return found


def scores(distance: Distance, windows: Tensor, time: Tensor, vectors: Tensor) -> Tensor:
    """What node i makes of node j, in one sample."""
    norm, known = distance.norm, []
    for i in range(N):
        wide = relu(weighted(distance.window_1, windows[i]))
        wide = (wide - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
        known.append(torch.cat([weighted(distance.window_2, wide), time, vectors[i]]))
    out = torch.empty(N, N).double()
    for i in range(N):
        for j in range(N):
            out[i, j] = weighted(distance.query, known[i]) @ weighted(distance.key, known[j]) / math.sqrt(D)
    return out


def graphs(module: DynamicGraph, windows: Tensor, time: Tensor, sources: Tensor, targets: Tensor) -> list[Tensor]:
    """All localised matrices of one sample."""
    found = []
    for static, vectors in zip(road_matrices(), (targets, sources), strict=True):
        masked = static * scores(module.distance, windows, time, vectors).softmax(1)
        for i in range(N):
            if masked[i].sum() > 0:
                masked[i] = masked[i] / masked[i].sum()
        found += powers_without_diagonal(masked, module.order)
    own = torch.empty(N, N).double()
    for i in range(N):
        for j in range(N):
            own[i, j] = relu(targets[i] @ sources[j])
    return found + powers_without_diagonal(own.softmax(1), module.order)


# -- gate and decomposition ---------------------------------------------------------------------------------------


def gated(gate: EstimationGate, x: Tensor, times: Tensor, places: Tensor) -> Tensor:
    """Share of one sample that spreads: W1 of time and place side by side."""
    hidden = torch.cat([gate.times.weight, gate.places.weight], 1)
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            known = torch.cat([times[len(times) - x.shape[1] + t], places[n]])
            inside = relu(hidden @ known + gate.places.bias)
            out[n, t] = x[n, t] / (1 + torch.exp(-weighted(gate.share, inside)))
    return out


def rest(decomposition: Decomposition, x: Tensor, states: Tensor) -> Tensor:
    norm, out = decomposition.norm, torch.empty_like(states)
    for n in range(states.shape[0]):
        for t in range(states.shape[1]):
            explained = relu(weighted(decomposition.backcast, states[n, t]))
            left = x[n, x.shape[1] - states.shape[1] + t] - explained
            scale = torch.sqrt(((left - left.mean()) ** 2).mean() + norm.eps)
            out[n, t] = (left - left.mean()) / scale * norm.weight + norm.bias
    return out


# -- diffusion ----------------------------------------------------------------------------------------------------


def convolved(conv: LocalisedConv, x: Tensor, matrices: list[Tensor]) -> Tensor:
    """One sample, the matrices repeated over the steps and the steps below each other."""
    size, states = conv.kernel_size, []
    for t in range(size - 1, x.shape[1]):
        parts = []
        for n in range(N):
            read = torch.cat([x[n, t - size + 1 + s] for s in range(size)])
            parts.append(relu(weighted(conv.transform, read)).chunk(size))
        below = torch.stack([parts[n][s] for s in range(size) for n in range(N)])  # [(k n) c]
        rows = []
        for n in range(N):
            heard = [sum(parts[n][s] for s in range(size)) / size]
            for matrix in matrices:
                local = torch.cat([matrix[n]] * size)  # [(k n)]
                heard.append(sum(local[m] * below[m] for m in range(size * N)))
            rows.append(weighted(conv.mix, torch.cat(heard)))
        states.append(torch.stack(rows))
    return torch.stack(states, 1)


def diffused(block: DiffusionBlock, x: Tensor, matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """States of one sample, and its forecast: a state becomes a step of the series after it was made."""
    states, ahead = convolved(block.conv, x, matrices), []
    steps, new = [x[:, t] for t in range(x.shape[1])], states[:, -1]
    for _ in range(block.num_strides):
        ahead.append(torch.stack([weighted(block.forecast, new[n]) for n in range(N)]))
        steps.append(new)
        new = convolved(block.conv, torch.stack(steps[-block.conv.kernel_size :], 1), matrices)[:, 0]
    return states, torch.stack(ahead, 1)


# -- inherent -----------------------------------------------------------------------------------------------------


def position(t: int, width: int) -> Tensor:
    angles = [t / 10000 ** ((c - c % 2) / width) for c in range(width)]
    return torch.tensor([math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)], dtype=torch.float64)


def recur(cell: nn.GRUCell, x: Tensor, state: Tensor) -> Tensor:
    r_x, z_x, n_x = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
    r_h, z_h, n_h = (cell.weight_hh @ state + cell.bias_hh).chunk(3)
    reset, update = 1 / (1 + torch.exp(-(r_x + r_h))), 1 / (1 + torch.exp(-(z_x + z_h)))
    return (1 - update) * torch.tanh(n_x + reset * n_h) + update * state


def attended(attention: StepAttention, asks: Tensor, memory: list[Tensor]) -> Tensor:
    """Answer to one step of one node."""
    size, heads = D // attention.heads, []
    query = weighted(attention.query, asks)
    keys, values = ([weighted(part, m) for m in memory] for part in (attention.key, attention.value))
    for h in range(attention.heads):
        part = slice(h * size, (h + 1) * size)
        weights = [torch.exp(query[part] @ key[part] / math.sqrt(size)) for key in keys]
        heads.append(sum(w / sum(weights) * value[part] for w, value in zip(weights, values, strict=True)))
    return weighted(attention.out, torch.cat(heads))


def inherent(block: InherentBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """Answers of one sample, and its forecast."""
    answers, ahead = torch.empty_like(x), torch.empty(*x.shape[:1], block.num_strides, F).double()
    for n in range(x.shape[0]):
        state, memory = torch.zeros(D).double(), []
        for t in range(x.shape[1]):
            state = recur(block.cell, x[n, t], state)
            memory.append(state + position(t, D))
        for t in range(x.shape[1]):
            answers[n, t] = attended(block.attention, memory[t], memory)
        answer = answers[n, -1]
        for s in range(block.num_strides):
            ahead[n, s] = weighted(block.forecast, answer)
            state = recur(block.cell, answer, state)
            memory.append(state + position(x.shape[1] + s, D))
            answer = attended(block.attention, memory[-1], memory)
    return answers, ahead


# -- the whole network --------------------------------------------------------------------------------------------


def peeled(layer: DecoupledLayer, x: Tensor, matrices: list[Tensor], times: Tensor, places: Tensor) -> Any:
    """One layer on one sample: the inherent series, its states and the two forecasts."""
    spread, spread_ahead = diffused(layer.diffusion, gated(layer.gate, x, times, places), matrices)
    own = rest(layer.decomposition, x, spread)
    states, own_ahead = inherent(layer.inherent, own)
    return own, states, spread_ahead + own_ahead


def marked(tables: TimeVectors, clock: Tensor) -> Tensor:
    """Vectors of the day of the week and of the hour of every step, from the encodings of one sample."""
    vectors = []
    for sine, cosine, *week in clock.tolist():
        hour = round(math.atan2(sine, cosine) / (2 * math.pi) * 24) % 24
        day = round(math.atan2(*week) / (2 * math.pi) * 7) % 7
        vectors.append(torch.cat([tables.tables[0][day], tables.tables[1][hour]]))
    return torch.stack(vectors)
