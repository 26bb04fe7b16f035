"""What ``transformers.Trainer`` is told."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from stlora_peft.training import TrainingOptions


def trainer_arguments(options: TrainingOptions, folder: Path, keep: bool, batch_size: int) -> TrainingArguments:
    """Translate the options; whatever is not said here would be slow, noisy or sent somewhere.

    Args:
        options: How to train.
        folder: Folder for checkpoints.
        keep: Write checkpoints.
        batch_size: Items of the data set in a batch.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.max_epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),  # says so aloud, or bf16 would be refused
        bf16=options.mixed_precision == "bf16",
        fp16=options.mixed_precision == "fp16",
        eval_strategy="no" if options.patience is None else "epoch",
        eval_on_start=options.patience is not None,
        save_strategy="epoch" if keep else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # it waits for the device at every step
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["y"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would split the edges along with the batch
    return arguments
