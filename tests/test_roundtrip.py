"""Save in one process, load into the pristine backbone in another: the same forecasts, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_fresh_import import fresh
from toys import BACKBONES, CONDITIONINGS, call, graph, pristine, randomised, small_backbone, windows

from stlora_peft import STLoraConfig, reestimate

N = 7  # the backbones were built for 5

LOAD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from peft import PeftModel
import stlora_peft
from toys import BACKBONES, CONDITIONINGS, call, small_backbone

for name in BACKBONES:
    for conditioning in CONDITIONINGS:
        backbone = small_backbone(name)
        backbone.load_state_dict(torch.load(f"{folder}/{{name}}.pt", weights_only=True))
        model = PeftModel.from_pretrained(backbone, f"{folder}/{{name}}-{{conditioning}}").eval()
        with torch.no_grad():
            torch.save(call(model, {nodes}), f"{folder}/{{name}}-{{conditioning}}.forecast")
"""


def trained(name: str, conditioning: str) -> tuple[torch.nn.Module, PeftModel]:
    """A source backbone and a city's model after everything that a city's training changes."""
    backbone = small_backbone(name)
    options = {"modules_to_save": ["head"], "target_modules": ["lstm"]} if name == "lstm" else {}
    config = STLoraConfig(num_nodes=N, conditioning=conditioning, node_ids=[f"s{i}" for i in range(N)], **options)
    model = randomised(get_peft_model(pristine(backbone), config))
    edge_index, edge_weight = graph(N)
    batches = [{"x": windows(N, seed=s), "edge_index": edge_index, "edge_weight": edge_weight.float()} for s in (1, 2)]
    reestimate(model, batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for batch in batches:
        model(**batch).square().mean().backward()
        optimizer.step()
    return backbone, model.eval()


def forecast(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return call(model, N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every backbone and conditioning, the forecasts before saving and those of a fresh process."""
    path = tmp_path_factory.mktemp("roundtrip")
    for name in BACKBONES:
        for conditioning in CONDITIONINGS:
            backbone, model = trained(name, conditioning)
            torch.save(backbone.state_dict(), path / f"{name}.pt")
            model.save_pretrained(path / f"{name}-{conditioning}")
            torch.save(forecast(model), path / f"{name}-{conditioning}.expected")
    code = LOAD.format(tests=str(Path(__file__).parent), folder=str(path), nodes=N)
    result: subprocess.CompletedProcess[str] = fresh(code)
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", BACKBONES)
def test_forecasts_of_a_fresh_process_are_bit_identical(folder, name, conditioning):
    found = torch.load(folder / f"{name}-{conditioning}.forecast", weights_only=True)
    expected = torch.load(folder / f"{name}-{conditioning}.expected", weights_only=True)
    assert found.shape == (2, 4, N, 1)
    assert torch.equal(found, expected)


def test_forecasts_of_different_adapters_differ(folder):
    """The test above can fail: no two adapters forecast the same."""
    found = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.forecast"))]
    assert len(found) == len(BACKBONES) * len(CONDITIONINGS)
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[i + 1 :])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", BACKBONES)
def test_forecasts_do_not_depend_on_which_tensors_need_gradients(name, conditioning, tmp_path):
    # torch picks kernels by that, and they round differently: a loaded adapter would differ from the trained one.
    backbone, model = trained(name, conditioning)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pristine(backbone), tmp_path).eval()
    resumed = PeftModel.from_pretrained(pristine(backbone), tmp_path, is_trainable=True).eval()
    expected = forecast(model)
    for other in (loaded, resumed):
        assert torch.equal(forecast(other), expected)
        assert torch.equal(call(other, N), expected)
    assert torch.equal(call(model, N), expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_two_cities_on_one_backbone_keep_their_forecasts(name, tmp_path):
    backbone = small_backbone(name)
    expected = {}
    for city, num_nodes in (("a", 5), ("b", 8)):
        model = get_peft_model(pristine(backbone), STLoraConfig(num_nodes=num_nodes))
        randomised(model, seed=num_nodes).eval().save_pretrained(tmp_path / city)
        expected[city] = call(model, num_nodes)
    model = PeftModel.from_pretrained(pristine(backbone), tmp_path / "a", adapter_name="a").eval()
    model.load_adapter(tmp_path / "b", "b")
    for city, num_nodes in (("b", 8), ("a", 5), ("b", 8)):
        model.set_adapter(city)
        assert torch.equal(call(model, num_nodes), expected[city])
