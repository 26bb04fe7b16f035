"""Vectors of the times of a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TimeVectors(nn.Module):
    r"""A vector for each slot of the day and for each day of the week, side by side.

    Args:
        rows: Number of rows of each table.
        emb_size: Width of a vector.

    Shapes:
        - **marks:** :math:`(B, T, W)`, the rows of :func:`stlora_peft.backbones.clock.time_rows`
        - **output:** :math:`(B, T, tables \cdot d)`, zeros for a day that is not known
    """

    def __init__(self, rows: Sequence[int], emb_size: int) -> None:
        super().__init__()
        self.rows = list(rows)
        self.size = len(self.rows) * emb_size
        self.tables = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(count, emb_size)) for count in rows)

    def forward(self, marks: Tensor) -> Tensor:
        """Look the vectors up."""
        parts = zip(marks.split(self.rows, 2), self.tables, strict=True)
        return torch.cat([part @ table.to(part.dtype) for part, table in parts], 2)
