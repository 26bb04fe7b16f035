"""AdamW whose step takes the time of the rows that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]
"""Numbers of rows, and the steps that each of them has made."""


class RowAdamW(torch.optim.AdamW):
    r"""AdamW that also takes sparse gradients: only the rows that they name make a step.

    Each row :math:`n` has a count :math:`t_n` of its own steps, for the corrections of its moments:

    .. math::
        m_n &\leftarrow \beta_1 m_n + (1 - \beta_1) g_n, \qquad
        v_n \leftarrow \beta_2 v_n + (1 - \beta_2) g_n^2, \qquad t_n \leftarrow t_n + 1 \\
        \theta_n &\leftarrow (1 - \eta\lambda)\,\theta_n
            - \eta\,\frac{m_n / (1 - \beta_1^{t_n})}{\sqrt{v_n / (1 - \beta_2^{t_n})} + \epsilon}

    A row without a gradient neither moves by its momentum nor decays. With gradients for all rows at every step this
    is AdamW. Parameters with dense gradients are AdamW's. A step on few rows takes no time for the others.

    Args:
        params: Parameters or groups of them.
        lr: Step size :math:`\eta`.

    Example:
        >>> table = torch.nn.Parameter(torch.ones(3, 1))
        >>> optimizer = RowAdamW([table], lr=0.1)
        >>> table.grad = torch.sparse_coo_tensor([[2]], [[5.0]], (3, 1), check_invariants=False)
        >>> optimizer.step()
        >>> [round(value, 3) for value in table.flatten().tolist()]
        [1.0, 1.0, 0.899]

    References:
        Loshchilov and Hutter (AdamW), ICLR 2019, arXiv:1711.05101. Differs from ``torch.optim.SparseAdam``: weight
        decay, and corrections by the row's own steps, without which the first steps of rarely seen rows are too long.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, lr=lr)
        self._stepped: dict[Tensor, Tensor] = {}

    def stepped(self, parameter: Tensor) -> Rows | None:
        """Rows of a parameter that the last step changed, with their counts; None where it makes steps as a whole."""
        count = self.state[parameter]["step"] if parameter in self.state else torch.zeros(())
        if count.ndim == 0:
            return None
        ids = self._stepped.get(parameter, torch.zeros(0, dtype=torch.long, device=parameter.device))
        return ids, count[ids]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step.

        Args:
            closure: Computes the loss anew.
        """
        loss = closure() if closure is not None else None
        self._stepped, sparse = {}, []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    sparse.append((parameter, parameter.grad))
                    self._row_step(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None  # AdamW refuses it
        super().step()
        for parameter, grad in sparse:
            parameter.grad = grad
        return loss

    def _row_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Let the rows of a gradient make a step, in the order of torch's own arithmetic."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(len(parameter), device=parameter.device)
        ids, rows = grad.indices()[0], grad.values()
        beta1, beta2 = group["betas"]
        steps = state["step"][ids] + 1
        mean = state["exp_avg"][ids].lerp_(rows, 1 - beta1)
        square = state["exp_avg_sq"][ids].mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
        count = steps.double().reshape(-1, *[1] * (rows.ndim - 1))
        length = (group["lr"] / (1 - beta1**count)).to(rows.dtype)
        spread = square.sqrt().div_((1 - beta2**count).sqrt().to(rows.dtype)).add_(group["eps"])
        moved = parameter[ids].mul_(1 - group["lr"] * group["weight_decay"]).sub_(length * mean / spread)
        for whole, part in (
            (parameter, moved),
            (state["exp_avg"], mean),
            (state["exp_avg_sq"], square),
            (state["step"], steps),
        ):
            whole[ids] = part
        self._stepped[parameter] = ids


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
    """Shorten gradients, some of which may be sparse, to a common norm; as ``torch.nn.utils.clip_grad_norm_``.

    Args:
        parameters: Parameters with gradients.
        max_norm: Longest norm.
        norm_type: Which norm.

    Returns:
        The norm before.
    """
    dense: list[Tensor] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            grad = parameter.grad = grad.coalesce()
        if grad is not None:
            dense.append(grad.values() if grad.is_sparse else grad)
    norm = torch.nn.utils.get_total_norm(dense, norm_type)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in dense:
        grad.mul_(factor.to(grad.device))
    return norm
