import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from stlora_peft.trainer import parameter_groups
from stlora_peft.training import TrainingOptions


def test_parameter_groups_decay_matrices_only_and_hold_no_frozen_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[2].requires_grad_(False)
    matrices, vectors = parameter_groups(model, TrainingOptions(weight_decay=0.1))
    assert [id(parameter) for parameter in matrices["params"]] == [id(model[0].weight)]
    assert matrices["weight_decay"] == 0.1
    assert {id(p) for p in vectors["params"]} == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias)}
    assert vectors["weight_decay"] == 0.0


def test_parameter_groups_of_an_adapter_hold_the_adapter() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    (group,) = parameter_groups(model, TrainingOptions())
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(8, 3), (2, 8)]
    torch.optim.AdamW(parameter_groups(model, TrainingOptions()))
