"""Adapted models as files of ``torch.export``."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import assert_same, graph, small_backbone, windows

from stlora_peft import STLoraConfig

N = 7  # the backbones were built for 5


def city_model(name: str) -> PeftModel:
    return get_peft_model(small_backbone(name), STLoraConfig(num_nodes=N, init_weights=False)).eval()


def exported(model: PeftModel, file: Path, *, free: bool) -> torch.export.ExportedProgram:
    """Export with a batch of 3 windows, save and load."""
    edge_index, edge_weight = graph(N)
    inputs = (windows(N, batch=3), edge_index, edge_weight.float())
    shapes = {"args": ({0: torch.export.Dim("batch", min=2)}, None, None)} if free else None
    with torch.no_grad():
        torch.export.save(torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False), file)
    return torch.export.load(file)


@pytest.fixture(scope="module", params=["lstm", "stgcn"])  # a recurrent layer; convolutions and node-bound norms
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PeftModel, torch.export.ExportedProgram]:
    model = city_model(request.param)
    return model, exported(model, tmp_path_factory.mktemp("export") / "model.pt2", free=True)


def test_adapted_model_from_a_file_forecasts_the_same_for_any_batch(
    pair: tuple[PeftModel, torch.export.ExportedProgram],
) -> None:
    model, forecaster = pair[0], pair[1].module()
    assert model.peft_config["default"].predictor is not None
    edge_index, edge_weight = graph(N)
    for batch in (2, 3, 8):
        inputs = (windows(N, batch=batch, seed=batch), edge_index, edge_weight.float())
        with torch.no_grad():
            assert_same(forecaster(*inputs), model(*inputs), tolerance=1e-5)


def test_exported_adapter_is_that_of_the_city_and_needs_no_package_but_torch(
    pair: tuple[PeftModel, torch.export.ExportedProgram],
) -> None:
    model, program = pair
    own = {name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "nall_" in name}
    names = {name.removeprefix("base_model.model.") for name in program.state_dict}
    assert own <= names  # adapters, node table, predictor and node-bound copies
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    spaces = {target.namespace for target in calls if isinstance(target, torch._ops.OpOverload)}
    assert spaces == {"aten"}
    assert {target.__module__ for target in calls if not isinstance(target, torch._ops.OpOverload)} <= {"_operator"}


def test_a_free_batch_is_refused_where_the_backbone_has_a_constant_one(tmp_path: Path) -> None:
    model = city_model("dygrencoder")
    with pytest.raises(torch._dynamo.exc.UserError, match=r"specialized it to be a constant \(3\)"):
        exported(model, tmp_path / "model.pt2", free=True)
    forecaster = exported(model, tmp_path / "model.pt2", free=False).module()
    edge_index, edge_weight = graph(N)
    inputs = (windows(N, batch=3, seed=5), edge_index, edge_weight.float())
    with torch.no_grad():
        assert_same(forecaster(*inputs), model(*inputs), tolerance=1e-5)
