"""An adapter around a model written by hand from torch-geometric-temporal cells.

Run:       python examples/01_your_own_model.py
Expected:  untrained adapter changes nothing: True
           trainable params: 3,824 || all params: 5,555 || trainable%: 68.8389
           error below a third of what it was: True
           backbone unchanged: True
"""

import torch
from peft import get_peft_model
from torch import nn

from stlora_peft import STLoraConfig, fingerprint
from stlora_peft.backbones import tgt

torch.manual_seed(0)
TGCN2 = tgt.load().nn.TGCN2
NUM_NODES, WINDOW, HORIZON = 20, 12, 3


class Forecaster(nn.Module):
    """One T-GCN cell over the window, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = TGCN2(in_channels=1, out_channels=16, batch_size=1)
        self.head = nn.Linear(16, HORIZON)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Forecast from a window."""
        h = None
        for step in range(x.shape[1]):  # x [b t n c]
            h = self.cell(x[:, step], edge_index, H=h)
        return self.head(torch.relu(h)).movedim(-1, 1).unsqueeze(-1)  # [b t n c]


ring = torch.arange(NUM_NODES)
edge_index = torch.stack([ring, ring.roll(1)])
x, y = (
    torch.rand(8, WINDOW, NUM_NODES, 1),
    torch.linspace(-1, 1, NUM_NODES).view(1, 1, -1, 1).expand(8, HORIZON, -1, 1),
)

backbone = Forecaster()
forecast, weights = backbone(x, edge_index), fingerprint(backbone)
targets = ["linear_z", "linear_r", "linear_h", "conv_z", "conv_r", "conv_h", "head"]
model = get_peft_model(
    backbone, STLoraConfig(num_nodes=NUM_NODES, target_modules=targets, node_layout={"head": "b n c"})
)
print("untrained adapter changes nothing:", torch.equal(model(x, edge_index), forecast))
model.print_trainable_parameters()

optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
for _ in range(60):
    loss = (model(x, edge_index) - y).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
error = (model.eval()(x, edge_index) - y).abs().mean()
print(f"error below a third of what it was: {bool(error < (forecast - y).abs().mean() / 3)}")
print("backbone unchanged:", fingerprint(model) == weights)
