import numpy as np
import pytest
import torch
from small_city import small_data
from test_metrics import loop
from torch import nn

from stlora_peft.backbones import build_backbone
from stlora_peft.data import CityData
from stlora_peft.evaluation import check_fit, evaluate, evaluate_persistence, forecast_batches, persistence_batches


@pytest.fixture
def data() -> CityData:
    return small_data()


class Echo(nn.Module):
    """Repeats the last scaled reading; what a loop can follow."""

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
        return x[:, -1:, :, :1].expand(-1, 12, -1, -1)


def test_evaluate_matches_loop_over_the_original_readings(data: CityData) -> None:
    values, mean = np.asarray(data.city.values, dtype=np.float64), data.scaler.mean[0]
    forecast, truth = [], []
    for start in data.test.starts.tolist():
        window = values[start : start + 12, :, 0].T
        last = [row[~np.isnan(row)][-1] if (~np.isnan(row)).any() else mean for row in window]
        forecast.append(np.repeat(np.array(last)[None, :, None], 12, axis=0))
        truth.append(values[start + 12 : start + 24])
    metrics = evaluate(Echo(), data.test, data, batch_size=7)
    expected = loop(np.stack(forecast), np.stack(truth))
    assert (metrics.mae, metrics.rmse, metrics.mape) == pytest.approx(expected, rel=1e-5)


def test_evaluate_does_not_depend_on_the_batch_size(data: CityData) -> None:
    model = build_backbone("lstm", in_channels=3, hidden_size=4)
    one, many = (evaluate(model, data.val, data, batch_size=size) for size in (1, 64))
    assert one.mae == pytest.approx(many.mae, rel=1e-6)


def test_evaluate_leaves_modes_and_gradients_as_they_were(data: CityData) -> None:
    model = build_backbone("lstm", in_channels=3, hidden_size=4).train()
    model.head.eval()
    evaluate(model, data.val, data)
    assert (model.training, model.lstm.training, model.head.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_uses_evaluation_mode(data: CityData) -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    seen = []
    model.forward = lambda x, *edges: (seen.append(model[0].training), x[:, :, :, :1])[1]
    evaluate(model, data.val, data)
    assert seen == [False] * len(seen)
    assert seen


def test_forecast_batches_gives_every_window_in_order(data: CityData) -> None:
    truth = torch.cat([truth for _, truth in forecast_batches(Echo(), data.test, data, batch_size=5)])
    expected = data.test.__getitems__(list(range(len(data.test))))["y"]
    torch.testing.assert_close(truth, expected, rtol=0, atol=0, equal_nan=True)


def test_persistence_matches_loop_with_missing_readings(data: CityData) -> None:
    data.test.targets[data.test.starts[0] : data.test.starts[0] + 14, 0] = torch.nan  # a window without readings
    values = data.test.targets.double().numpy()
    expected = []
    for start in data.test.starts.tolist():
        rows = np.full(values.shape[1:], data.scaler.mean[0])
        for node in range(values.shape[1]):
            for step in range(start, start + 12):
                if not np.isnan(values[step, node, 0]):
                    rows[node, 0] = values[step, node, 0]
        expected.append(np.repeat(rows[None], 12, axis=0))
    forecast = torch.cat([forecast for forecast, _ in persistence_batches(data.test, data, batch_size=5)])
    np.testing.assert_allclose(forecast.numpy(), np.stack(expected), rtol=1e-6)
    truth = np.stack([values[start + 12 : start + 24] for start in data.test.starts.tolist()])
    assert evaluate_persistence(data.test, data).mae == pytest.approx(loop(np.stack(expected), truth)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "expected", "got"),
    [
        ({"in_channels": 5}, "in_channels=5", "in_channels=3"),
        ({"in_channels": 3, "window": 6}, "window=6", "window=12"),
        ({"in_channels": 3, "horizon": 3}, "horizon=3", "horizon=12"),
        ({"in_channels": 5, "out_channels": 2}, "in_channels=5, out_channels=2", "in_channels=3, out_channels=1"),
    ],
)
def test_check_fit_names_what_differs(data: CityData, sizes: dict[str, int], expected: str, got: str) -> None:
    model = build_backbone("lstm", hidden_size=4, **sizes)
    with pytest.raises(ValueError, match="the data do not fit") as error:
        check_fit(model, data.train)
    assert str(error.value).splitlines() == [
        "the data do not fit the backbone 'lstm'.",
        f"  expected: {expected}",
        f"  got:      {got}",
        "  to fix:   prepare the city with the backbone's window, horizon and time_features, or take another backbone",
    ]


def test_check_fit_asks_nothing_of_a_module_that_says_nothing(data: CityData) -> None:
    check_fit(Echo(), data.train)
