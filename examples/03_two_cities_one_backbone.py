"""Two cities' adapters on one backbone, switched.

Run:       python examples/03_two_cities_one_backbone.py
Expected:  one adapter per city, each with its own number of nodes; switching back gives the same forecast:
           porto: forecast (1, 12, 14, 1)
           lisbon: forecast (1, 12, 22, 1)
           porto again, bit for bit: True
           adapters on disk: ['lisbon', 'porto']
           loaded into a pristine backbone, bit for bit: True
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from stlora_peft import STLoraConfig, check_nodes
from stlora_peft.backbones import build_backbone
from stlora_peft.data import adaptation_split, prepare, simulate_city
from stlora_peft.storage import save_adapter
from stlora_peft.training import TrainingOptions, train

cities = {"porto": simulate_city(14, days=10, seed=1), "lisbon": simulate_city(22, days=10, seed=2)}
data = {}
for name, city in cities.items():
    split = adaptation_split(city.num_steps, city.steps_per_day, days=2)
    data[name] = prepare(city, split, window=12, horizon=12)

torch.manual_seed(0)
settings = {"in_channels": 3, "hidden_size": 16}
backbone = build_backbone("lstm", **settings)  # a pretrained one in real life
pristine = build_backbone("lstm", **settings)
pristine.load_state_dict(backbone.state_dict())

model = None
for name, city in cities.items():
    config = STLoraConfig(num_nodes=city.num_nodes, node_ids=list(city.node_ids), scaler=data[name].scaler.to_dict())
    if model is None:
        model = get_peft_model(backbone, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    model.set_adapter(name)
    train(model, data[name], TrainingOptions(max_epochs=2, learning_rate=3e-3, progress=False))


def forecast(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Forecast the first test window of a city with its adapter."""
    model.set_adapter(name)
    check_nodes(model, cities[name].node_ids)
    x = data[name].test[0]["x"].unsqueeze(0)  # [b t n c]
    with torch.no_grad():
        return model.eval()(x, data[name].edge_index, data[name].edge_weight)


first = forecast(model, "porto")
print(f"porto: forecast {tuple(first.shape)}")
print(f"lisbon: forecast {tuple(forecast(model, 'lisbon').shape)}")
print(f"porto again, bit for bit: {torch.equal(forecast(model, 'porto'), first)}")

with tempfile.TemporaryDirectory() as folder:
    for name in cities:
        model.set_adapter(name)
        save_adapter(Path(folder) / name, model)
    print(f"adapters on disk: {sorted(path.name for path in Path(folder).iterdir())}")
    loaded = PeftModel.from_pretrained(pristine, Path(folder) / "porto", adapter_name="porto")
    loaded.load_adapter(Path(folder) / "lisbon", adapter_name="lisbon")
    print(f"loaded into a pristine backbone, bit for bit: {torch.equal(forecast(loaded, 'porto'), first)}")
