"""Los Angeles to Shenzhen through the Python API: pretrain, adapt with three days of data, measure, save, load.

Run:       python examples/02_la_to_shenzhen.py [--data ../shared/data] [--epochs 30]
Expected:  a few minutes and, on the real cities, something like
           persistence   MAE 0.90 vehicles per step
           zero-shot     MAE 1.86 vehicles per step
           st-lora       MAE 0.72 vehicles per step
           adapter file: 172 KB, loaded again: same forecasts True
           Two simulated cities take their place where the data files are absent.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from stlora_peft import rebuild
from stlora_peft.backbones import build_backbone
from stlora_peft.data import City, adaptation_split, load_city, prepare, pretraining_split, simulate_city
from stlora_peft.evaluation import evaluate, evaluate_persistence
from stlora_peft.methods import build_adapter
from stlora_peft.storage import load_adapter, save_adapter
from stlora_peft.training import TrainingOptions, train

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
parser.add_argument("--epochs", type=int, default=30)
arguments = parser.parse_args()


def city(file: str, num_nodes: int, days: int) -> City:
    """Read a real city, or simulate one."""
    path = arguments.data / file
    return load_city(path) if path.exists() else simulate_city(num_nodes, days=days, seed=num_nodes)


source, target = city("la-loop.npz", 40, 7), city("shenzhen-flow.npz", 24, 10)
options = TrainingOptions(max_epochs=arguments.epochs)

torch.manual_seed(0)
data = prepare(source, pretraining_split(source.num_steps), window=12, horizon=12)
backbone = build_backbone("stgcn", num_nodes=source.num_nodes, in_channels=data.train[0]["x"].shape[-1])
train(backbone, data, options)

split = adaptation_split(target.num_steps, target.steps_per_day, days=3)
data = prepare(target, split, window=12, horizon=12)
model = build_adapter(backbone, data)  # get_peft_model with the city's nodes, scaler, window and horizon noted
train(model, data, options)

scores = {
    "persistence": evaluate_persistence(data.test, data),
    "zero-shot": evaluate(rebuild(backbone, target.num_nodes), data.test, data),
    "st-lora": evaluate(model, data.test, data),
}
for name, metrics in scores.items():
    print(f"{name:13} MAE {metrics.average.mae:.2f} {target.quantity or 'vehicles per step'}")

with tempfile.TemporaryDirectory() as folder:
    save_adapter(Path(folder) / "shenzhen", model)
    size = (Path(folder) / "shenzhen" / "adapter_model.safetensors").stat().st_size
    loaded = load_adapter(backbone, Path(folder) / "shenzhen", target)
x = data.test[0]["x"].unsqueeze(0)
with torch.no_grad():
    same = torch.equal(
        loaded.eval()(x, data.edge_index, data.edge_weight), model.eval()(x, data.edge_index, data.edge_weight)
    )
print(f"adapter file: {size / 1024:.0f} KB, loaded again: same forecasts {same}")
