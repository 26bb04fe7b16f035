import io

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from stlora_peft.callbacks import KeepBest, ProgressBar
from stlora_peft.checkpoints import copy_state


def evaluated(best: KeepBest, model: nn.Module, errors: list[float]) -> TrainerControl:
    control = TrainerControl()
    for epoch, mae in enumerate(errors):
        with torch.no_grad():
            model.bias.fill_(epoch)
        best.on_evaluate(None, TrainerState(epoch=epoch), control, model=model, metrics={"eval_mae": mae})
    return control


def test_keep_best_restores_the_state_of_the_lowest_error() -> None:
    best, model = KeepBest(patience=5), nn.Linear(1, 1)
    control = evaluated(best, model, [3.0, 2.0, 2.5])
    copy_state(best.tensors, model)
    assert (model.bias.item(), best.best_mae, best.best_epoch, best.waited) == (1.0, 2.0, 1, 1)
    assert not control.should_training_stop


def test_keep_best_stops_when_patience_runs_out_and_counts_anew_after_an_improvement() -> None:
    assert not evaluated(KeepBest(patience=2), nn.Linear(1, 1), [3.0, 4.0, 2.0, 4.0]).should_training_stop
    assert evaluated(KeepBest(patience=2), nn.Linear(1, 1), [3.0, 4.0, 3.0]).should_training_stop


def test_keep_best_takes_any_number_after_nan_and_never_a_nan() -> None:
    best, model = KeepBest(patience=5), nn.Linear(1, 1)
    evaluated(best, model, [float("nan"), 7.0, float("nan")])
    copy_state(best.tensors, model)
    assert (model.bias.item(), best.best_mae) == (1.0, 7.0)


def test_progress_bar_on_a_shared_display_leaves_it_running(tmp_path: object) -> None:
    console = Console(file=io.StringIO())
    with Progress(TextColumn("{task.fields[note]}"), console=console) as display:
        with ProgressBar("adapt", display) as bar:
            arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
            bar.on_train_begin(arguments, TrainerState(max_steps=4), TrainerControl())
            bar.on_step_end(arguments, TrainerState(global_step=3), TrainerControl())
            bar.on_evaluate(arguments, TrainerState(epoch=1), TrainerControl(), metrics={"eval_mae": 2.0})
            (task,) = display.tasks
            assert (task.description, task.completed, task.total) == ("adapt", 3, 4)
            assert task.fields["note"] == "epoch 1, validation MAE 2 (best 2)"
        assert display.tasks == []
        assert display.live.is_started
