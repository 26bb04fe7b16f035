import json
import math

import numpy as np
import pytest
import torch

from stlora_peft.data import Scaler


def readings(seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal([50.0, 3.0], [10.0, 0.5], size=(40, 6, 2)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    return values


def test_fit_matches_loop_over_finite_readings():
    values = readings()
    scaler = Scaler.fit(values)
    for channel in range(2):
        known = [float(x) for x in values[..., channel].ravel() if not math.isnan(x)]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((x - mean) ** 2 for x in known) / len(known))
        assert scaler.mean[channel] == pytest.approx(mean, rel=1e-12)
        assert scaler.std[channel] == pytest.approx(std, rel=1e-12)


def test_fit_tensor_equals_fit_array():
    assert Scaler.fit(torch.from_numpy(readings())) == Scaler.fit(readings())


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("name", ["transform", "inverse"])
def test_transform_and_inverse_match_formula_and_keep_type(kind, name):
    scaler = Scaler(mean=(50.0, 3.0), std=(10.0, 0.5))
    values = readings()
    result = getattr(scaler, name)(kind(values))
    exact = values.astype(np.float64)
    mean, std = np.array(scaler.mean), np.array(scaler.std)
    expected = (exact - mean) / std if name == "transform" else exact * std + mean
    assert type(result) is type(kind(values))
    assert result.dtype == kind(values).dtype
    np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-5, atol=1e-6)


def test_inverse_passes_gradients():
    scaled = torch.zeros(3, 1, requires_grad=True)
    Scaler(mean=(5.0,), std=(2.0,)).inverse(scaled).sum().backward()
    torch.testing.assert_close(scaled.grad, torch.full((3, 1), 2.0))


def test_to_dict_through_json_returns_the_same_numbers():
    scaler = Scaler.fit(readings())
    assert Scaler.from_dict(json.loads(json.dumps(scaler.to_dict()))) == scaler


@pytest.mark.parametrize(
    ("values", "got"),
    [(np.full((5, 1), 0.1, dtype=np.float32), "0.1 everywhere"), (np.full((5, 1), np.nan), "no reading")],
)
def test_fit_channel_without_spread_names_it(values, got):
    two = np.concatenate([np.arange(5.0)[:, None], values], axis=1)
    with pytest.raises(ValueError, match="cannot be scaled") as error:
        Scaler.fit(two)
    assert str(error.value).split("\n") == [
        "channel 1 cannot be scaled.",
        "  expected: at least two different readings in the given days",
        f"  got:      {got}",
        "  to fix:   give more days, or leave this channel out",
    ]


@pytest.mark.parametrize("name", ["transform", "inverse"])
def test_transform_wrong_channels_names_the_shape(name):
    with pytest.raises(ValueError, match="does not fit") as error:
        getattr(Scaler(mean=(1.0,), std=(1.0,)), name)(torch.zeros(4, 3))
    assert str(error.value).split("\n")[1:3] == [
        "  expected: 1 channel(s) on the last axis",
        "  got:      shape (4, 3)",
    ]


@pytest.mark.parametrize(
    ("mean", "std"), [((), ()), ((1.0,), (1.0, 2.0)), ((1.0,), (0.0,)), ((math.nan,), (1.0,)), ((1.0,), (math.inf,))]
)
def test_scaler_unusable_numbers_raise(mean, std):
    with pytest.raises(ValueError, match="not usable") as error:
        Scaler(mean=mean, std=std)
    assert str(error.value).split("\n")[2] == f"  got:      mean={mean}, std={std}"


@pytest.mark.parametrize("content", [{}, {"mean": [1.0]}, {"mean": 1.0, "std": 2.0}, {"mean": "12", "std": "34"}])
def test_from_dict_unreadable_content_raises(content):
    with pytest.raises(ValueError, match="cannot be read") as error:
        Scaler.from_dict(content)
    assert str(error.value).split("\n")[1:3] == [
        "  expected: lists of numbers under 'mean' and 'std'",
        f"  got:      {content!r}",
    ]
