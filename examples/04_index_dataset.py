"""An adapter trained from torch-geometric-temporal's IndexDataset, in one process or in several.

The loading is that of its index-batching examples: a loader with ``index=True``, ``get_index_dataset`` with the
number of this process, a ``DistributedSampler`` that is told the epoch, ``DistributedDataParallel``. METR-LA's loader
finds its files in a folder, so that it fetches nothing; here they hold a simulated city. IndexDataset imports dask.

Run:       python examples/04_index_dataset.py
           accelerate launch --multi_gpu --num_processes 2 examples/04_index_dataset.py
Expected:  the same in both, the windows of a step being shared out:
           windows: 392 to train, 56 to validate, 112 to test
           untrained adapter, validation MAE 5.19
           trained adapter, validation MAE 2.62
           backbone unchanged: True
"""

import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from stlora_peft import STLoraConfig, fingerprint
from stlora_peft.backbones import build_backbone, tgt
from stlora_peft.data import City, simulate_city
from stlora_peft.launch import process_count, process_index
from stlora_peft.metrics import ErrorSums, masked_mae
from stlora_peft.processes import measured, total

tgt.load()  # imports torch-geometric-temporal, also where torch_sparse is not installed
from torch_geometric_temporal.dataset import METRLADatasetLoader  # noqa: E402

WINDOW, BATCH = 12, 32


def write_like_metr_la(city: City, folder: Path) -> None:
    """Write a city as METR-LA comes: readings (0: missing) and time of day, ``[t n c]``, and an adjacency matrix."""
    minutes = np.arange(city.num_steps) * city.interval_minutes % 1440 / 1440
    clock = np.broadcast_to(minutes[:, None, None], (city.num_steps, city.num_nodes, 1))
    adjacency = np.zeros((city.num_nodes, city.num_nodes), dtype=np.float32)
    adjacency[tuple(city.edge_index)] = city.edge_weight
    np.save(folder / "node_values.npy", np.concatenate([np.nan_to_num(city.values), clock], axis=2))
    np.save(folder / "adj_mat.npy", adjacency)
    with zipfile.ZipFile(folder / "METR-LA.zip", "w") as archive:  # the loader looks for it before it downloads
        for name in ("node_values.npy", "adj_mat.npy"):
            archive.write(folder / name, name)


if process_count() > 1 and not dist.is_initialized():
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"

with tempfile.TemporaryDirectory() as folder:  # one for each process
    write_like_metr_la(simulate_city(num_nodes=16, days=2.025, seed=1), Path(folder))
    loader = METRLADatasetLoader(folder, index=True)
    train, val, test, edges, weights, means, stds = loader.get_index_dataset(
        lags=WINDOW,
        batch_size=BATCH // process_count(),
        shuffle=True,
        world_size=process_count(),
        ddp_rank=process_index(),
    )
edges, weights, mean, std = edges.to(device), weights.float().to(device), float(means[0]), float(stds[0])
sizes = [len(part.dataset) for part in (train, val, test)]

torch.manual_seed(0)
backbone = build_backbone("tgcn2", in_channels=2, hidden_channels=8)  # a pretrained one in real life
before = fingerprint(backbone)
config = STLoraConfig(num_nodes=16, lora_dropout=0.0, emb_noise=0.0, scaler={"mean": [mean], "std": [std]})
model = get_peft_model(backbone, config).to(device)
shared = nn.parallel.DistributedDataParallel(model) if process_count() > 1 else model
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def truth_of(y: torch.Tensor) -> torch.Tensor:
    """Speed in km/h, NaN where it is missing, which the file says by a zero."""
    speed = y[..., :1].to(device) * std + mean
    return torch.where(speed.abs() < 1e-3, torch.nan, speed)


@torch.no_grad()
def mae(part: DataLoader) -> float:
    """Mean absolute error over a part; its sampler shares it out, and repeats a window where the number is odd."""
    sums = ErrorSums(WINDOW)
    model.eval()
    for x, y in part:
        sums.add(model(x.to(device).float(), edges, weights).cpu() * std + mean, truth_of(y.float()).cpu())
    model.train()
    sums.sums = total(sums.sums, torch.device(device))
    return sums.metrics().mae


untrained = mae(val)
for epoch in range(3):
    train.sampler.set_epoch(epoch)
    for x, y in train:
        forecast = shared(x.to(device).float(), edges, weights) * std + mean
        truth = truth_of(y.float())
        loss = masked_mae(forecast, truth, measured(truth))  # the mean over the truths of all processes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
trained = mae(val)

if process_index() == 0:
    print(f"windows: {sizes[0]} to train, {sizes[1]} to validate, {sizes[2]} to test")
    print(f"untrained adapter, validation MAE {untrained:.2f}")
    print(f"trained adapter, validation MAE {trained:.2f}")
    print("backbone unchanged:", fingerprint(model.get_base_model()) == before)
