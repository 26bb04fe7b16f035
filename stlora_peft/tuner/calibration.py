r"""A start for the node-specific predictor from a city's own history, in closed form: forecasts without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from einops import rearrange
from peft import PeftModel
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.nodes import TABLE_ATTRIBUTE, NodeTable
from stlora_peft.tuner.predictor import ATTRIBUTE, NodePredictor, PredictorLayer

Batch = tuple[Mapping[str, Any], Tensor]
ITERATIONS, SMALLEST, ROWS = 15, 0.02, 100_000


def calibrate(model: PeftModel, batches: Iterable[Batch], ridge: float = 1e-3) -> None:
    r"""Fit the output layer of the active adapter's predictor to a city's history; nothing else changes.

    With the features :math:`z` that the untrained predictor makes of window and forecast, least absolute deviations

    .. math:: \min_{W, b} \sum |y - \hat y - W z - b| + \lambda n \lVert W \rVert^2

    over all nodes, by iteratively reweighted least squares. What is left over at a node, its median :math:`m_i` over
    time, becomes a node bias of the adapter's rank, :math:`\tfrac{\alpha}{r} B h_i \approx m_i`, by a singular value
    decomposition; ``conditioning="embedding"`` writes :math:`h_i` into the node vectors.

    Args:
        model: PEFT model whose active adapter has an untrained predictor.
        batches: Arguments of the model's forward, and the truth in the units of its forecast, NaN where missing.
            Of very long records every k-th batch will do.
        ridge: :math:`\lambda`.

    Raises:
        ValueError: If the adapter has no predictor, or no truth was given.

    References:
        Reweighting: Holland and Welsch, Communications in Statistics A6(9), 1977. Random features for the regression:
        Rahimi and Recht, NeurIPS 2007.
    """
    name, layer, predictor = _predictor(model)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            z, missing = _collect(model, layer, predictor, batches)
            weight, bias = _regression(z, missing, ridge)
            residual = missing - (torch.einsum("bnd,od->bno", z, weight) + bias)
            _write(model, name, predictor, weight, bias, residual.nanmedian(dim=0).values.nan_to_num())
    finally:
        model.train(mode)


def _predictor(model: PeftModel) -> tuple[str, PredictorLayer, NodePredictor]:
    """Name of the active adapter, and its predictor."""
    layer = cast(PredictorLayer, getattr(model.get_base_model(), ATTRIBUTE, None))
    names = [name for name in model.active_adapters if layer is not None and name in layer.nall_predictor]
    if len(names) != 1:
        raise ValueError(
            message(
                "there is no predictor to calibrate",
                expected="one active adapter with a node-specific predictor",
                got=f"active {', '.join(model.active_adapters)}, with a predictor {', '.join(names) or 'none'}",
                fix="make the adapter with predictor='auto' or a PredictorConfig, and make it the active one",
            )
        )
    return names[0], layer, cast(NodePredictor, layer.nall_predictor[names[0]])


def _collect(
    model: PeftModel, layer: PredictorLayer, predictor: NodePredictor, batches: Iterable[Batch]
) -> tuple[Tensor, Tensor]:
    """Features ``[b n d]`` and what the backbone's forecast misses ``[b n o]``, both in float64."""
    calls: list[Any] = []
    hook = predictor.register_forward_pre_hook(lambda module, args: calls.append(args))
    features, missing = [], []
    try:
        for arguments, truth in batches:
            model(**arguments)
            window, forecast, embedding = calls.pop()
            features.append(predictor.features(window, forecast, embedding).double())
            pattern = f"{predictor.predictor.output_layout} -> b n (t c)"
            missing.append(rearrange((truth - forecast).double(), pattern))
    finally:
        hook.remove()
    if not missing or not any(bool(part.isfinite().any()) for part in missing):
        raise ValueError(
            message(
                "there is nothing to calibrate with",
                expected="batches with at least one measured truth",
                got=f"{len(missing)} batches without any",
                fix="give more days",
            )
        )
    return torch.cat(features), torch.cat(missing)


def _regression(z: Tensor, missing: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Least absolute deviations of all nodes together: weight ``[o d]`` and bias ``[o]``."""
    rows, truth = z.flatten(0, 1), missing.flatten(0, 1)
    step = -(-len(rows) // ROWS)
    rows, truth = rows[::step], truth[::step]
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    known = truth.isfinite()
    truth = truth.nan_to_num()
    penalty = ridge * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    penalty[-1, -1] = 1e-9  # the bias is free
    solution = rows.new_zeros(rows.shape[1], truth.shape[1])
    for _ in range(ITERATIONS):
        weights = known / (truth - rows @ solution).abs().clamp(min=SMALLEST)
        for out in range(truth.shape[1]):
            weighted = rows * weights[:, out, None]
            matrix = rows.T @ weighted + known[:, out].sum().clamp(min=1) * penalty
            solution[:, out] = torch.linalg.solve(matrix, weighted.T @ truth[:, out])
    return solution[:-1].T, solution[-1]


def _write(
    model: PeftModel, name: str, predictor: NodePredictor, weight: Tensor, bias: Tensor, medians: Tensor
) -> None:
    """Put the regression and the nodes' medians ``[n o]`` into the predictor's output layer."""
    _copy(predictor.weight_out, weight)
    _copy(predictor.bias_out, bias)
    if not {"node_bias", "node_bias_map", "node_vector"} & set(predictor.factor_names):
        return  # the form has no node bias
    left, sizes, right = torch.linalg.svd(medians, full_matrices=False)
    rank = min(predictor.r, len(sizes))
    if "node_bias_map" in predictor.factor_names:
        table = cast(NodeTable, getattr(model.get_base_model(), TABLE_ATTRIBUTE)).nall_emb[name]
        rank = min(rank, table.shape[1])
    scale = len(medians) ** 0.5  # vectors of unit size, as the others start
    vectors, up = left[:, :rank] * scale, right[:rank].T * sizes[:rank] / scale / predictor.scaling
    _copy(cast(nn.Parameter, predictor.B_out).zero_()[:, :rank], up)
    if "A_out" in dict(predictor.named_parameters()):
        cast(nn.Parameter, predictor.A_out).zero_()
    if "node_bias_map" in predictor.factor_names:
        _copy(table[:, :rank], vectors)
        _copy(cast(nn.Parameter, predictor.node_bias_map_out).zero_()[:rank, :rank], torch.eye(rank))
    else:
        target = predictor.node_bias_out if "node_bias" in predictor.factor_names else predictor.node_vector_out
        _copy(cast(nn.Parameter, target).zero_()[:, :rank], vectors)


def _copy(target: Any, value: Tensor) -> None:
    """Write values in the target's own precision."""
    target.copy_(value.to(target.dtype))
