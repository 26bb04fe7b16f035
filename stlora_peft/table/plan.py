"""What a table compares and what all of its rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stlora_peft.backbones import BACKBONES, new_backbone
from stlora_peft.data import City, CityData, Windows, prepare, pretraining_split
from stlora_peft.data.city import hash_with_city
from stlora_peft.data.windows import TimeFeatures
from stlora_peft.errors import message
from stlora_peft.training import TrainingOptions
from stlora_peft.tuner.config import PredictorConfig, STLoraConfig
from stlora_peft.tuner.identity import num_base_parameters

PAPER_BACKBONES = ("lstm", "stgcn", "gwnet", "agcrn", "staeformer", "d2stgnn")
"""Backbones of the paper's table, in its order."""
BASELINES = ("ha", "var", "svr")
REGIMES = ("joint", "adapt")

PAPER_SIZES: Mapping[str, Mapping[str, int]] = {
    "lstm": {"hidden_size": 64, "num_layers": 2},
    "stgcn": {"hidden_channels": 64},
    "agcrn": {"hidden_channels": 64},
}
"""Sizes of the paper's table, where they are not the defaults of a backbone."""
SMALL_SIZES: Mapping[str, Mapping[str, int]] = {
    "lstm": {"hidden_size": 32},
    "stgcn": {"hidden_channels": 16, "head_channels": 32},
    "gwnet": {"hidden_channels": 8, "skip_channels": 32, "end_channels": 64, "num_blocks": 2},
    "agcrn": {"hidden_channels": 16, "num_layers": 1},
    "staeformer": {"hidden_channels": 8, "emb_size": 16, "feed_forward_channels": 64, "num_layers": 1, "heads": 2},
    "d2stgnn": {
        "hidden_channels": 8,
        "forecast_channels": 32,
        "head_channels": 64,
        "gate_channels": 16,
        "num_layers": 1,
    },
}
"""Narrow networks, for a first look."""
# Options that the rows of one table may differ in.
_NOT_SHARED = (
    "seed",
    "progress",
    "eval_batch_size",
    "cache_frozen",
)


@dataclass(frozen=True)
class Plan:
    """Rows of a table, and how each is made.

    Args:
        backbones: Names of :data:`stlora_peft.backbones.BACKBONES`.
        baselines: Names of :data:`BASELINES`.
        regimes: ``"joint"``: backbone and adapter are trained from scratch together, as in the paper; ``"adapt"``:
            the backbone is trained first and frozen then.
        seeds: One training of everything for each.
        sizes: Arguments of the backbones, by name; a backbone's own defaults where it is absent.
        shares: Shares of the record that train and validate; the rest is forecast. 0.6 and 0.2 in the paper.
        window: Input steps.
        horizon: Forecast steps.
        time_features: Clock that the backbones read: ``"none"``, ``"day"`` or ``"week"``.
        stride: Only every ``stride``-th window trains and validates; all test windows are forecast.
        options: How everything is trained; ``seed`` is not used.

    Raises:
        ValueError: If a name is unknown or a number out of range.

    Example:
        >>> Plan(backbones=("lstm",), seeds=(0, 1)).regimes
        ('joint', 'adapt')
    """

    backbones: Sequence[str] = PAPER_BACKBONES
    baselines: Sequence[str] = BASELINES
    regimes: Sequence[str] = REGIMES
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: PAPER_SIZES)
    shares: tuple[float, float] = (0.6, 0.2)
    window: int = 12
    horizon: int = 12
    time_features: TimeFeatures = "week"
    stride: int = 1
    options: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        """Check every name and number."""
        for kind, names, known in (
            ("backbone", self.backbones, BACKBONES),
            ("baseline", self.baselines, BASELINES),
            ("regime", self.regimes, REGIMES),
        ):
            unknown = [name for name in names if name not in known]
            self._require(not unknown, f"{kind} in a table", f"of {', '.join(known)}", ", ".join(unknown))
            self._require(len(set(names)) == len(names), f"{kind} in a table", "each once", ", ".join(names))
        self._require(len(set(self.seeds)) == len(self.seeds), "seed in a table", "each once", str(list(self.seeds)))
        unknown = [name for name in self.sizes if name not in BACKBONES]
        self._require(not unknown, "sizes in a table", f"of {', '.join(BACKBONES)}", ", ".join(unknown))
        self._require(bool(self.backbones), "table", "at least one backbone", "none")
        self._require(bool(self.regimes), "table", f"at least one regime of {', '.join(REGIMES)}", "none")
        self._require(bool(self.seeds), "table", "at least one seed", "none")
        self._require(self.stride >= 1, "stride of a table", "stride >= 1", f"stride = {self.stride}")

    def data(self, city: City) -> CityData:
        """Prepare a city: its parts, its scaler, its windows.

        Args:
            city: The city.

        Returns:
            Its windows, of the training and validation parts only every ``stride``-th.
        """
        split = pretraining_split(city.num_steps, *self.shares)
        data = prepare(city, split, self.window, self.horizon, self.time_features)
        return replace(data, train=self._thinned(data.train), val=self._thinned(data.val))

    def settings(self, data: CityData, model: str) -> str:
        """Hash everything that a row depends on but its seed: rows of one hash can stand in one table.

        Args:
            data: The city, as :meth:`data` prepares it.
            model: Name of the backbone or of the baseline.

        Raises:
            ValueError: If the backbone does not fit the city or the plan.
            ImportError: If the backbone needs a package that is not installed.
        """
        return hash_with_city([model, self._description(model, data)], data.city)

    def configuration(self) -> dict[str, Any]:
        """Return everything that was chosen, for JSON."""
        options = self.options.chosen(*_NOT_SHARED)
        return {
            "backbones": {name: dict(self.sizes.get(name, {})) for name in self.backbones},
            "baselines": list(self.baselines),
            "regimes": list(self.regimes),
            "seeds": list(self.seeds),
            **self._preparation(),
            "stride": self.stride,
            "training": options,
        }

    def _description(self, model: str, data: CityData) -> dict[str, Any]:
        """What rows of a model depend on."""
        if model in BASELINES:
            return self._preparation()
        known = self.configuration()
        chosen = {name: known[name] for name in (*self._preparation(), "stride", "training")}
        backbone = new_backbone(model, data, seed=0, **self.sizes.get(model, {}))
        config = STLoraConfig(predictor=PredictorConfig())
        config.resolve(num_base_parameters(backbone))
        adapter = {name: value for name, value in asdict(config).items() if name != "peft_version"}
        return chosen | {
            "sizes": backbone.hyperparameters,
            "adapter": adapter,
            "layers": asdict(backbone.stlora_spec),
        }

    def _preparation(self) -> dict[str, Any]:
        """How a city is prepared."""
        return {
            "shares": list(self.shares),
            "window": self.window,
            "horizon": self.horizon,
            "time_features": self.time_features,
        }

    def _thinned(self, windows: Windows) -> Windows:
        """Every ``stride``-th window."""
        return windows.at(windows.starts[:: self.stride])

    @staticmethod
    def _require(holds: bool, where: str, expected: str, got: str) -> None:
        """Raise unless a condition holds."""
        if not holds:
            raise ValueError(
                message(f"{where} cannot be used", expected=expected, got=got, fix="correct the plan of the table")
            )
