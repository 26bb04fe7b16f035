"""Configuration of an ST-LoRA adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from peft import PeftConfig

from stlora_peft.errors import message
from stlora_peft.tuner.adapter_file import check_adapter_file, describe_tensors, drop_other_adapters
from stlora_peft.tuner.conditioning import CONDITIONINGS
from stlora_peft.tuner.layout import parse_layout
from stlora_peft.tuner.ranges import check_at_least_one, check_finite, check_not_negative, check_probability
from stlora_peft.tuner.registration import stlora_type

RANK, LARGE_RANK, LARGE = 8, 2, 250_000
WIDTH, LARGE_WIDTH, DROPOUT = 64, 48, 0.1
CHOOSING = "choose by stlora_peft.selection.choose_conditioning, or adapt by 'stlora adapt --conditioning auto'"


@dataclass
class PredictorConfig:
    r"""Settings of the node-specific predictor that corrects the backbone's forecast.

    Sizes that are None are taken from the backbone's attributes of the same name.

    Args:
        width: Hidden width :math:`d`. None takes 64, and 48 on a backbone of 250,000 parameters or more.
        num_layers: Number of node-adaptive layers :math:`L`.
        r: Rank of the node-adaptive layers; None takes the adapter's.
        dropout: Dropout probability between layers; None takes the adapter's ``lora_dropout``.
        input_layout: Axis pattern of the backbone's first argument, some order of ``b t n c``.
        output_layout: Axis pattern of the forecast, some order of ``b t n c``.
        window: Input steps :math:`T`.
        horizon: Forecast steps :math:`H`.
        in_channels: Input channels.
        out_channels: Forecast channels.
        history_channels: The first so many input channels are read at every step of the window. Of the others, such as
            time encodings, the predictor reads the last step: with the whole course of the clock it learns a daily
            course by heart from a few days. None takes ``out_channels``, or ``in_channels`` where there are fewer.

    Raises:
        ValueError: If a number is out of range or a layout is not an order of ``b t n c``.
    """

    width: int | None = None
    num_layers: int = 2
    r: int | None = None
    dropout: float | None = None
    input_layout: str = "b t n c"
    output_layout: str = "b t n c"
    window: int | None = None
    horizon: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    history_channels: int | None = None

    def __post_init__(self) -> None:
        """Check every range."""
        check_at_least_one("PredictorConfig.num_layers", self.num_layers)
        for name in ("width", "r", "window", "horizon", "in_channels", "out_channels", "history_channels"):
            check_at_least_one(f"PredictorConfig.{name}", getattr(self, name), optional=True)
        check_probability("PredictorConfig.dropout", self.dropout, optional=True)
        for name in ("input_layout", "output_layout"):
            if sorted(getattr(self, name).split()) != ["b", "c", "n", "t"]:
                raise ValueError(
                    message(
                        f"PredictorConfig.{name} cannot be read",
                        expected="some order of the four axes 'b t n c'",
                        got=repr(getattr(self, name)),
                        fix="write e.g. 'b t n c' or 'b n c t'",
                    )
                )


@dataclass
class STLoraConfig(PeftConfig):
    r"""Configuration of an ST-LoRA adapter: node-conditioned low-rank updates and a node-specific predictor.

    .. math:: y_i = W x_i + b + \tfrac{\alpha}{r} B A_i x_i

    Args:
        num_nodes: Number of nodes :math:`N` of the city. Needed by every conditioning but ``"shared"``.
        r: Rank :math:`r` of the update. None takes 8, and 2 on a backbone of 250,000 parameters or more, whose many or
            wide layers would otherwise need more than a tenth of them.
        lora_alpha: Numerator :math:`\alpha` of the scale; None takes twice the rank.
        lora_dropout: Dropout probability on the update's input, and in the predictor. None takes 0.1, and 0 where
            ``emb_noise`` does the same better.
        use_rslora: Scale by :math:`\alpha / \sqrt{r}` instead of :math:`\alpha / r`.
        target_modules: Names (or a regular expression) of the layers to adapt, or ``"all-linear"``. None takes
            the backbone's own default where it has one; an empty list none: the predictor alone.
        exclude_modules: Names (or a regular expression) of layers to leave out.
        layers_to_transform: Indices of the layers to adapt, in a numbered list of layers.
        layers_pattern: Name of that list.
        rank_pattern: Layer name or regular expression to a rank that differs from ``r``.
        alpha_pattern: Layer name or regular expression to an alpha that differs from ``lora_alpha``.
        modules_to_save: Names of modules that are trained whole and saved with the adapter.
        conditioning: How a node takes part: ``"gate"``, ``"core"``, ``"full"``, ``"embedding"``,
            ``"bias"`` or ``"shared"``.
        emb_size: Width of the node vectors of ``conditioning="embedding"``.
        emb_noise: Standard deviation of the noise that training adds to these vectors, which start with one of 1.
        predictor: Node-specific predictor behind the backbone: ``"auto"`` (on where the backbone's output layout is
            known), a :class:`PredictorConfig`, or None.
        node_layout: Layer name to the axis pattern of its input, e.g. ``{"lstm": "(b n) t c"}``. What is not said is
            taken from the backbone, from a table of known layers, or read off the first input.
        node_bound: Names of modules whose tensors have one entry for each node. None takes the backbone's own.
        freeze_node_bound: Train no copy of a node-bound module. Running statistics are re-estimated all the same.
        freeze_backbone: Train the adapter alone. Otherwise the backbone trains too and must be saved beside it.
        init_weights: Start without effect. False starts from random factors, for tests.
        node_ids: Names of the nodes in the order of the adapter's rows.
        scaler: Statistics that scale this city's readings.
        window: Input steps that the city's data are cut into.
        horizon: Forecast steps.
        base_fingerprint: Hash of the frozen backbone's weights; filled in when the adapter is made, and checked
            when it is loaded.
        tensors: Shape of each tensor of the saved file; filled in by saving.
        host_layers: Layer classes of the user's that are adapted, as :func:`stlora_peft.register_host_layer`
            described them; filled in when the adapter is made.

    Raises:
        ValueError: If a value or combination is not allowed.

    Example:
        >>> STLoraConfig(num_nodes=207, target_modules=["lstm"]).conditioning
        'embedding'

    References:
        Ruan et al., ST-LoRA, ECML-PKDD 2025, arXiv:2404.07919, Eq. 2 and 3. Differs: see docs/method.md.
    """

    num_nodes: int | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    conditioning: str = "embedding"
    emb_size: int = 16
    emb_noise: float = 0.8
    predictor: PredictorConfig | dict[str, Any] | str | None = "auto"
    node_layout: dict[str, str] = field(default_factory=dict)
    node_bound: list[str] | None = None
    freeze_node_bound: bool = False
    freeze_backbone: bool = True
    init_weights: bool = True
    node_ids: list[str] | None = None
    scaler: dict[str, Any] | None = None
    window: int | None = None
    horizon: int | None = None
    base_fingerprint: str | None = None
    tensors: dict[str, list[int]] | None = None
    host_layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every range and combination."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type: Any = stlora_type()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.predictor, Mapping):
            self.predictor = PredictorConfig(**self.predictor)
        self._check_numbers()
        self._check_choices()
        for pattern in self.node_layout.values():
            parse_layout(pattern)

    def _check_numbers(self) -> None:
        check_at_least_one("STLoraConfig.emb_size", self.emb_size)
        for name in ("r", "num_nodes", "window", "horizon"):
            check_at_least_one(f"STLoraConfig.{name}", getattr(self, name), optional=True)
        for key, rank in self.rank_pattern.items():
            check_at_least_one(f"STLoraConfig.rank_pattern['{key}']", rank)
        if self.lora_alpha is not None:
            check_finite("STLoraConfig.lora_alpha", self.lora_alpha)
        for key, alpha in self.alpha_pattern.items():
            check_finite(f"STLoraConfig.alpha_pattern['{key}']", alpha)
        check_probability("STLoraConfig.lora_dropout", self.lora_dropout, optional=True)
        check_not_negative("STLoraConfig.emb_noise", self.emb_noise)

    def _check_choices(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            auto = self.conditioning == "auto"
            _refuse(
                f"STLoraConfig.conditioning {'cannot be chosen without data' if auto else 'is unknown'}",
                expected=", ".join(repr(c) for c in CONDITIONINGS),
                got=repr(self.conditioning),
                fix=CHOOSING if auto else "choose one of them; 'embedding' is the default",
            )
        if not (self.predictor is None or self.predictor == "auto" or isinstance(self.predictor, PredictorConfig)):
            _refuse(
                "STLoraConfig.predictor is unknown",
                expected="'auto', a PredictorConfig or None",
                got=repr(self.predictor),
                fix="leave it out for the default, or pass None to switch the predictor off",
            )
        for name in ("node_bound", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                _refuse(
                    f"STLoraConfig.{name} is no list",
                    expected="a list of names",
                    got=repr(getattr(self, name)),
                    fix=f"write {name}=[{getattr(self, name)!r}]",
                )
        if self.layers_pattern and self.layers_to_transform is None:
            _refuse(
                "STLoraConfig.layers_pattern has no effect alone",
                expected="layers_to_transform beside layers_pattern",
                got=f"layers_pattern={self.layers_pattern!r} and no layers_to_transform",
                fix="pass layers_to_transform=[<indices>] as well",
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            _refuse(
                "STLoraConfig.layers_to_transform cannot be used here",
                expected="target_modules as a list of names",
                got=f"the expression {self.target_modules!r}",
                fix="write the layer numbers into the expression, or list the names",
            )
        if self.node_ids is not None and self.num_nodes is not None and len(self.node_ids) != self.num_nodes:
            _refuse(
                "STLoraConfig.node_ids does not fit num_nodes",
                expected=f"{self.num_nodes} names",
                got=f"{len(self.node_ids)} names",
                fix="pass the city's node ids in the order of its readings",
            )

    def resolve(self, num_parameters: int) -> None:
        """Fill in rank, alpha, dropout and the predictor's width where they are None.

        Args:
            num_parameters: Number of the backbone's parameters.
        """
        if self.r is None:
            self.r = RANK if num_parameters < LARGE else LARGE_RANK
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.lora_dropout is None:
            self.lora_dropout = 0.0 if self.conditioning == "embedding" and self.emb_noise else DROPOUT
        if isinstance(self.predictor, PredictorConfig) and self.predictor.width is None:
            self.predictor.width = WIDTH if num_parameters < LARGE else LARGE_WIDTH

    @property
    def rank(self) -> int:
        """The rank, once it is known."""
        return self.r or RANK

    def scaling(self, r: int, lora_alpha: float | None) -> float:
        r"""Scale of an update of rank ``r``: :math:`\alpha / r`, or :math:`\alpha / \sqrt r` if rank-stabilised."""
        lora_alpha = 2 * self.rank if lora_alpha is None else lora_alpha
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` with the shapes of the tensors that PEFT saved beside it."""
        drop_other_adapters(Path(save_directory))
        self.tensors = describe_tensors(Path(save_directory))
        try:
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            self.tensors = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a saved configuration and check the adapter file beside it, before any model is touched.

        Args:
            pretrained_model_name_or_path: Folder of the adapter, or its name on the hub.
            subfolder: Folder inside it.
            kwargs: Passed on to PEFT.

        Returns:
            The configuration.

        Raises:
            ValueError: If the adapter file is truncated, lacks a tensor or holds values that are not finite.
        """
        path = str(pretrained_model_name_or_path)
        config: PeftConfig = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        folder = Path(path) / (subfolder or "")
        if folder.is_dir() and isinstance(config, STLoraConfig) and config.tensors is not None:
            check_adapter_file(folder, config.tensors)
        return config


def _refuse(where: str, expected: str, got: str, fix: str) -> NoReturn:
    """Raise the error of a choice that is not allowed."""
    raise ValueError(message(where, expected=expected, got=got, fix=fix))
