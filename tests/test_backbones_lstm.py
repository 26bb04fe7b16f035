"""The LSTM backbone against its formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlora_peft.backbones import LSTMForecaster

RING = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])


def lstm_of_one_node(lstm: nn.LSTM, window: Tensor) -> Tensor:
    """Last hidden state of the top layer for one window ``[t c]``, from the formulas of an LSTM."""
    steps = list(window)
    for layer in range(lstm.num_layers):
        w_x, w_h, b_x, b_h = (
            getattr(lstm, f"{key}_l{layer}") for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = window.new_zeros(lstm.hidden_size)
        for t, x in enumerate(steps):
            i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps[t] = h
    return steps[-1]


def test_forward_equals_a_loop_over_samples_and_nodes() -> None:
    model = LSTMForecaster(in_channels=3, out_channels=2, window=4, horizon=3, hidden_size=6, num_layers=2).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    expected = torch.empty(2, 3, 5, 2, dtype=torch.float64)
    for b in range(2):
        for n in range(5):
            change = model.head.weight @ lstm_of_one_node(model.lstm, x[b, :, n]) + model.head.bias
            for h in range(3):
                expected[b, h, n] = x[b, -1, n, :2] + change[2 * h : 2 * h + 2]
    torch.testing.assert_close(model(x, RING), expected, rtol=0, atol=1e-12)


def test_forward_ignores_the_graph() -> None:
    model = LSTMForecaster(in_channels=3)
    x = torch.randn(2, 12, 5, 3)
    assert torch.equal(model(x, RING), model(x, torch.empty(2, 0, dtype=torch.long), torch.empty(0)))


def test_forward_fits_any_number_of_nodes_and_keeps_them_apart() -> None:
    model = LSTMForecaster(in_channels=3)
    x = torch.randn(2, 12, 7, 3)
    changed = x.clone()
    changed[:, :, 4] += 1
    moved = (model(x, RING) - model(changed, RING)).abs().amax((0, 1, 3))
    assert [bool(value > 1e-4) for value in moved] == [n == 4 for n in range(7)]


def test_backward_reaches_every_parameter() -> None:
    model = LSTMForecaster(in_channels=3, num_layers=2)
    model(torch.randn(2, 12, 5, 3), RING).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())


def test_stlora_spec_adapts_the_lstm_and_the_head() -> None:
    spec = LSTMForecaster.stlora_spec
    assert spec.target_modules == ("lstm", "head")
    assert dict(spec.node_layout) == {"lstm": "(b n) t c", "head": "b n c"}
    assert (spec.node_bound, spec.head) == ((), ("head",))
