"""What every backbone shares: building by name, hyperparameters, input checks, the residual."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
import toys
from torch import Tensor

import stlora_peft.backbones as backbones
from stlora_peft.backbones import BACKBONES, Forecaster, attention, backbone_class, build_backbone, recurrent

SIZES = {name: {"in_channels": 3, "window": 12, "horizon": 3} | sizes for name, sizes in toys.SIZES.items()}
RING = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
OWN = ("lstm", "stgcn", "heterogclstm", "gwnet", "staeformer", "d2stgnn")
every = pytest.mark.parametrize("name", BACKBONES)


class Counter(Forecaster):
    """Forecasts step * 100 + channel * 10 + node, so that a mixed-up axis shows."""

    name = "counter"

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        step, channel = torch.arange(self.horizon)[:, None], torch.arange(self.out_channels)
        numbers = (step * 100 + channel * 10).flatten() + torch.arange(x.shape[2])[:, None]
        return numbers.float().expand(x.shape[0], -1, -1)


def test_backbones_lists_every_name_that_builds() -> None:
    assert set(BACKBONES) == {*OWN, *recurrent.CLASSES, *attention.CLASSES}
    assert [backbone_class(name).name for name in BACKBONES] == list(BACKBONES)


def test_build_backbone_unknown_name_lists_the_known_ones() -> None:
    expected = (
        "backbone 'wavenet' is unknown.\n"
        f"  expected: one of {', '.join(BACKBONES)}\n"
        "  got:      'wavenet'\n"
        "  to fix:   take a name of the list, or hand your own nn.Module to get_peft_model directly"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone("wavenet", in_channels=3)


def test_package_unknown_attribute_raises() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'WaveNet'"):
        _ = backbones.WaveNet


@every
def test_hyperparameters_after_json_rebuild_the_same_network(name: str) -> None:
    model = build_backbone(name, **SIZES[name], out_channels=2, residual=False).eval()
    copy = build_backbone(model.name, **json.loads(json.dumps(model.hyperparameters))).eval()
    copy.load_state_dict(model.state_dict())
    x = torch.randn(2, 12, 5, 3)
    assert copy.hyperparameters == model.hyperparameters
    assert torch.equal(copy(x, RING), model(x, RING))


@every
def test_hyperparameters_hold_every_argument_of_the_class(name: str) -> None:
    arguments = inspect.signature(backbone_class(name)).parameters
    assert set(build_backbone(name, **SIZES[name]).hyperparameters) == set(arguments)


def test_forward_puts_steps_channels_and_nodes_on_their_axes() -> None:
    model = Counter(window=2, horizon=3, in_channels=2, out_channels=2, residual=False)
    forecast = model(torch.zeros(2, 2, 4, 2), torch.empty(2, 0, dtype=torch.long))
    for t in range(3):
        for n in range(4):
            for c in range(2):
                assert forecast[:, t, n, c].tolist() == [t * 100 + c * 10 + n] * 2
    assert forecast.shape == (2, 3, 4, 2)


def test_forward_residual_adds_the_first_channels_of_the_last_step() -> None:
    plain = Counter(window=2, horizon=3, in_channels=5, out_channels=2, residual=False)
    residual = Counter(window=2, horizon=3, in_channels=5, out_channels=2, residual=True)
    x = torch.randn(2, 2, 4, 5)
    expected = plain(x, torch.empty(2, 0, dtype=torch.long)) + x[:, 1, :, :2].unsqueeze(1).expand(2, 3, 4, 2)
    assert torch.equal(residual(x, torch.empty(2, 0, dtype=torch.long)), expected)


def test_residual_without_enough_input_channels_names_both() -> None:
    expected = (
        "backbone 'lstm': too few input channels for residual=True.\n"
        "  expected: in_channels >= out_channels = 2\n"
        "  got:      in_channels = 1\n"
        "  to fix:   give the network the values that it forecasts as its first channels, or set residual=False"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone("lstm", in_channels=1, out_channels=2)
    assert build_backbone("lstm", in_channels=1, out_channels=2, residual=False).out_channels == 2


@pytest.mark.parametrize(
    ("name", "key"), [(n, k) for n, sizes in SIZES.items() for k in (*sizes, "out_channels")] + [("stgcn", "K")]
)
def test_build_backbone_size_below_one_is_refused(name: str, key: str) -> None:
    expected = (
        f"backbone '{name}': {key} out of range.\n"
        f"  expected: {key} >= 1\n"
        f"  got:      {key} = 0\n"
        f"  to fix:   give a larger {key}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone(name, **{**SIZES[name], key: 0})


@every
def test_forward_wrong_number_of_axes_shows_the_shape(name: str) -> None:
    expected = (
        f"backbone '{name}': wrong number of axes.\n"
        "  expected: 4 axes 'b t n c'\n"
        "  got:      3 axes: (12, 5, 3)\n"
        "  to fix:   give x one axis for each of batch, steps, nodes and channels, also where its length is 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone(name, **SIZES[name])(torch.zeros(12, 5, 3), RING)


@every
def test_forward_wrong_window_names_axis_and_fix(name: str) -> None:
    expected = (
        f"backbone '{name}': wrong number of input steps.\n"
        "  expected: window=12 on axis 't' of 'b t n c'\n"
        "  got:      11 steps from an input of shape (2, 11, 5, 3)\n"
        "  to fix:   give 12 steps, or build the backbone with window=11"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone(name, **SIZES[name])(torch.zeros(2, 11, 5, 3), RING)


@every
def test_forward_wrong_channels_names_axis_and_fix(name: str) -> None:
    expected = (
        f"backbone '{name}': wrong number of channels.\n"
        "  expected: in_channels=3 on axis 'c' of 'b t n c'\n"
        "  got:      4 channels from an input of shape (2, 12, 5, 4)\n"
        "  to fix:   give the channels of the training data, or build the backbone with in_channels=4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_backbone(name, **SIZES[name])(torch.zeros(2, 12, 5, 4), RING)


@every
def test_stlora_spec_names_layers_that_exist_and_gives_each_target_a_layout(name: str) -> None:
    model = build_backbone(name, **SIZES[name])
    names = [module for module, _ in model.named_modules()]
    spec = model.stlora_spec
    for wanted in (*spec.target_modules, *spec.node_bound, *spec.head):
        assert any(module == wanted or module.endswith(f".{wanted}") for module in names), wanted
    assert set(spec.node_layout) == set(spec.target_modules)
    assert (spec.input_layout, spec.output_layout) == ("b t n c", "b t n c")
