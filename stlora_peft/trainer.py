"""``transformers.Trainer`` with this package's loss, validation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState

from stlora_peft import processes
from stlora_peft.callbacks import KeepBest, KeepNewest, MovingAverage
from stlora_peft.checkpoints import (
    TRAINER_STATE,
    copy_state,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    signature,
)
from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message
from stlora_peft.evaluation import Replaying, evaluate, evaluation_mode, no_replay
from stlora_peft.frozen import FrozenActivations
from stlora_peft.launch import process_count, process_index
from stlora_peft.metrics import masked_mae
from stlora_peft.shared_norms import sharing_norms
from stlora_peft.trainer_arguments import trainer_arguments
from stlora_peft.training import TrainingOptions

TRACED = 3
"""Windows that the frozen part is found with."""

_PREPARED = "_is_accelerate_prepared"
"""Mark of accelerate on a model that it has put autocast and the exchange of gradients around, once and for all."""

_SEED_STEP = 1_000_003
"""Between the seeds of two processes."""


def parameter_groups(model: nn.Module, options: TrainingOptions) -> list[dict[str, Any]]:
    """Group the trainable parameters for the optimiser: matrices decay, vectors and scalars do not.

    Args:
        model: The model to train.
        options: How to train.

    Returns:
        Parameter groups as ``torch.optim`` takes them.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), TrainingOptions())]
        [1, 1]
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class CityTrainer(Trainer):
    """The Trainer of a forecaster; :func:`stlora_peft.training.train` is its use.

    Args:
        model: The model to train.
        data: The city to train it on.
        options: How to train.
        folder: Folder for checkpoints.
        keep: Write checkpoints, and go on from those that are there.
        average: Callback that holds the moving average, which is what is validated.
        best: Callback that holds the best state.
        watchers: Every callback, ``average`` and ``best`` among them.
    """

    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def __init__(
        self,
        model: nn.Module,
        data: CityData,
        options: TrainingOptions,
        folder: Path,
        *,
        keep: bool,
        average: MovingAverage,
        best: KeepBest,
        watchers: list[TrainerCallback],
    ) -> None:
        batches, batch_size = self._batches(data, options)
        arguments = trainer_arguments(options, folder, keep, batch_size)
        processes.check_processes(arguments.world_size, options.batch_size)
        arguments.ddp_find_unused_parameters = process_count() > 1 and _leaves_unused(model, data)
        optimizer = self.optimizer_class(parameter_groups(model, options), lr=options.learning_rate)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=_as_it_is,
            train_dataset=batches,
            eval_dataset=None if options.patience is None else data.val,
            callbacks=[*watchers, KeepNewest()],
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)
        self._forecaster = model
        self._folder, self._keep = folder, keep
        self._data = data
        self._options = options
        self._average = average
        self._best = best
        self._edges = (data.edge_index.to(self.args.device), data.edge_weight.to(self.args.device))
        self._still = _frozen_norms(model)
        self._replaying: Replaying = no_replay
        self._signature = signature(model, data, options)

    def run(self) -> None:
        """Train, going on from a checkpoint where there is one, and leave the model in its best state."""
        newest = newest_checkpoint(self._folder)
        if self._keep:
            processes.check_same_start(0 if newest is None else int(newest.name.rpartition("-")[2]))
        if newest is None:
            self._guarded_train(None)
        else:
            load_checkpoint(newest, self._forecaster, self._average, self._best, self._signature)
            self.state = TrainerState.load_from_json(str(newest / TRAINER_STATE))
            self.args.eval_on_start = False
            if not (self._best.exhausted or self._complete()):
                self._guarded_train(str(newest))
        final = self._average.tensors if self._options.patience is None else self._best.tensors
        _check_finite(final, self._options)
        copy_state(final, self._forecaster)
        self._forecaster.eval()
        self.accelerator.wait_for_everyone()  # or the main process might delete checkpoints that others still read

    def _batches(self, data: CityData, options: TrainingOptions) -> tuple[Dataset[Any], int]:
        """What is trained on, and how many of its items are in a batch."""
        return processes.Share(options.windows(data)), options.batch_size

    def _complete(self) -> bool:
        """Whether the checkpoint was written after the last step."""
        if self._options.max_steps is not None:
            return self.state.global_step >= self._options.max_steps
        return (self.state.epoch or 0) >= self._options.max_epochs

    def _keep_frozen(self) -> None:
        """Find the frozen part, whose dropout is off from here on, and compute it once for every window."""
        validation = [] if self._options.patience is None else [self._data.val]
        parts = [self._options.windows(self._data), *validation]
        starts = torch.cat([part.starts for part in parts]).unique()
        if len(starts) < TRACED:
            return
        self._forecaster.train()
        self._set_still()
        frozen = FrozenActivations(self._forecaster, self._forecast_scaled, parts[0].inputs(spread(starts, TRACED)))
        self._still += frozen.still
        if self._options.cache_frozen:
            frozen.fill(starts, parts[0].inputs)
            self._replaying = frozen.replaying

    def _forecast_scaled(self, x: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            scaled: torch.Tensor = self._forecaster(x.to(self.args.device), *self._edges)
        return scaled

    def _set_still(self) -> None:
        """Take what is frozen out of training mode: statistics must not drift, activations not change."""
        for module in self._still:
            module.training = False

    def _guarded_train(self, checkpoint: str | None) -> None:
        """Run the Trainer's loop and take off what accelerate put around the model."""
        own_forward = "forward" in vars(self._forecaster)
        self._keep_frozen()
        if process_index() > 0:  # dropout: equal masks in all processes would average out less
            torch.manual_seed(self._options.seed + _SEED_STEP * process_index())
        vars(self._forecaster)[_PREPARED] = False  # or a backbone's mark, found through PEFT, would stand for it
        try:
            self.train(resume_from_checkpoint=checkpoint)
        finally:
            self.accelerator.unwrap_model(self._forecaster, keep_fp32_wrapper=False)
            del vars(self._forecaster)[_PREPARED]
            if not own_forward:
                vars(self._forecaster).pop("forward", None)  # autocast leaves the class's method on the instance

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the masked MAE of a batch in the city's units."""
        self._set_still()
        with sharing_norms(self._forecaster, counts="idle" not in inputs):
            forecast = self._data.scaler.inverse(self._forecast_batch(model, inputs).float())
        loss = masked_mae(forecast, inputs["y"], processes.measured(inputs["y"]))
        return (loss, forecast) if return_outputs else loss

    def _forecast_batch(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forecast a batch, scaled."""
        with self._replaying(inputs["start"]):
            scaled: torch.Tensor = model(inputs["x"], *self._edges)
        return scaled

    def _validation_mae(self, windows: Windows) -> float:
        """Masked MAE over all windows."""
        return evaluate(
            self._forecaster,
            processes.share_of(windows),
            self._data,
            batch_size=self._options.eval_batch_size,
            replaying=self._replaying,
            combine=partial(processes.total, device=self.args.device),
        ).mae

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the masked MAE over all windows; the Trainer's own loop would average over batches."""
        windows = eval_dataset or self._data.val
        with self._average.applied(self._forecaster):
            metrics = {f"{metric_key_prefix}_mae": self._validation_mae(windows)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of one process, of each of which the data set gathers this process's share."""
        loader = super().get_train_dataloader()
        shards = loader.batch_sampler
        if isinstance(shards, BatchSamplerShard):
            shards.num_processes, shards.process_index = 1, 0
            shards.even_batches = False  # otherwise windows are repeated until the last batch is full
        return loader

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the state of the random numbers; a checkpoint is complete when every process has written its own."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what training changes, the best state and the progress, as safetensors and JSON."""
        if self.args.should_save:
            folder = output_dir or self._folder
            save_checkpoint(folder, self._forecaster, self._average, self._best, self._signature)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Leave the model as it is: :meth:`run` has loaded what :meth:`save_model` wrote."""


def spread(starts: torch.Tensor, count: int) -> torch.Tensor:
    """So many of the starts, evenly over all of them."""
    return starts[torch.linspace(0, len(starts) - 1, count).long()]


def _check_finite(tensors: dict[str, torch.Tensor], options: TrainingOptions) -> None:
    """Refuse a training that has diverged; one that validates falls back on its best state, which may be the start."""
    wrong = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(
            message(
                "the training has diverged",
                expected="finite numbers in everything that was trained",
                got=f"NaN or infinity in '{wrong}' with learning_rate={options.learning_rate:g}",
                fix="give a smaller learning rate, or look for readings that are out of scale",
            )
        )


def _as_it_is(batch: Any) -> Any:
    """Take the batch as the windows have gathered it."""
    return batch


def _leaves_unused(model: nn.Module, data: CityData) -> bool:
    """Whether a trained parameter does nothing; what averages the gradients must know, and is slower then."""
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.enable_grad():
        x = data.train.inputs(data.train.starts[:1]).to(device)
        output = model(x, data.edge_index.to(device), data.edge_weight.to(device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return not processes.reaches(output, trained)


def _frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Batch normalisations whose weights are frozen: their running statistics must not drift either."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]
