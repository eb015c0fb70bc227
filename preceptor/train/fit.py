"""What every way of training shares: what the library is told, how a run goes on from a checkpoint and chooses one."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Row
from preceptor.model import load
from preceptor.train import checkpoints, student, world
from preceptor.train.config import SftConfig
from preceptor.train.trainer import SftTrainer, Watch, Watching, grades

METRICS = "metrics.jsonl"
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def _silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class On:
    """Who is told what."""

    step: Watch = _silent
    refused: Callable[[Row, str], None] = _silent
    """A row that can't be made to fit, and why."""
    note: Callable[[str], None] = _silent
    """A line that the user should know: what was found damaged, what goes otherwise than the settings say."""


NOBODY = On()


def arguments(folder: Path, config: SftConfig, compute: torch.dtype, *, graded: bool) -> TrainingArguments:
    """What the library is told.

    Raises:
        UserError: more or fewer devices than asked for, steps that they can't share, a library that is missing.
    """
    _check(config, graded=graded)
    gpu = torch.cuda.is_available()
    if not gpu:  # else DeepSpeed, where it is installed, tells stdout that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent / "tensorboard")
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        activation_checkpointing=config.gradient_checkpointing,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",  # this and the rise are told to trackers; the trainer makes its own
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim=_OPTIMIZERS[config.optimizer],
        seed=config.seed,
        use_cpu=not gpu,
        bf16=compute == torch.bfloat16,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        eval_strategy="steps" if graded else "no",
        eval_steps=config.checkpoint_steps,
        save_steps=config.checkpoint_steps,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=list(config.report_to) or "none",
        run_name=f"{folder.parents[1].name}/{folder.parent.name}",
    )
    if args.world_size == 1 and args.n_gpu > 1:
        args._n_gpu = 1  # noqa: SLF001  several in one process are an older way that our loss doesn't fit
    how = world.sharding()
    if how and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            f"the launcher's configuration: {how} shares weights among GPUs, and none is here; use torchrun"
        )
    devices = args.world_size
    if config.devices is not None and config.devices != devices:
        raise UserError(
            f"devices: {config.devices} were asked for, and {devices} {'is' if devices == 1 else 'are'} here; start "
            f"with: torchrun --nproc_per_node {config.devices} -m preceptor sft RECIPE, or distill"
        )
    if config.accumulation % devices:
        raise UserError(
            f"accumulation: {config.accumulation} batches a step can't be shared by {devices} devices; "
            f"set it to a multiple of {devices} (and lower batch_size, for a step of the same rows)"
        )
    args.gradient_accumulation_steps = config.accumulation // devices
    return args


def _check(config: SftConfig, *, graded: bool) -> None:
    world.check(config)
    if config.patience and not graded:
        raise UserError(
            "patience: stopping early goes by grades, and there are no validation_rows.jsonl; "
            "prepare a validation split, or leave patience out"
        )
    if config.method == "qlora" or config.optimizer != "adamw":
        _needs("bitsandbytes", "optimizer" if config.optimizer != "adamw" else "method")
    if config.optimizer == "paged_adamw_8bit" and not torch.cuda.is_available():
        raise UserError(
            "optimizer: paged_adamw_8bit moves between a GPU's memory and the machine's; use adamw_8bit here"
        )
    for tracker in config.report_to:
        _needs(tracker, "report_to")


def _needs(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{field}: needs {package}, which is not installed: pip install {package}")


def fit(
    trainer: SftTrainer, tokenizer: PreTrainedTokenizerBase, out: Path, compute: torch.dtype, on: On
) -> dict[str, float]:
    """Train from the last whole checkpoint on, write the best one or the last, and return what is told of it."""
    own = student.settled(trainer.model, trainer.config, on.note)
    under = student.base_digest(trainer.model)
    trainer.remove_callback(PrinterCallback)
    watching = Watching(trainer, trainer.config, on.step, out / METRICS, partial(student.finish, tokenizer, under))
    trainer.add_callback(watching)
    start = time.perf_counter()
    _learn(trainer, watching, under, on.note)
    chosen = _choose(trainer, on.note)
    seconds = time.perf_counter() - start
    student.write(trainer, tokenizer, under, out, compute)
    graded, devices = grades(trainer.state), trainer.args.world_size
    told = {"chosen_grade": graded[chosen], "last_grade": graded[max(graded)]} if graded else {}
    return {
        "steps": float(trainer.state.global_step),
        "planned_steps": float(trainer.state.max_steps),
        "loss": next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), math.nan),
        "seconds": seconds,
        "tokens": float(trainer.tokens * devices),
        "tokens_per_second": trainer.tokens * devices / max(seconds - watching.apart, 1e-9),
        "devices": float(devices),
        **own,
        "chosen_step": float(chosen),
        **told,
    }


def _learn(trainer: SftTrainer, watching: Watching, under: str | None, note: Callable[[str], None]) -> None:
    folder = Path(trainer.args.output_dir)
    first = trainer.is_world_process_zero()
    start = checkpoints.last(folder, note) if first else None
    if first and not start and (folder.parent / METRICS).exists():
        note(
            f"no checkpoint was reached before (they are {trainer.args.save_steps:.0f} steps apart): from the beginning"
        )
    trainer.accelerator.wait_for_everyone()
    start = start if first else checkpoints.newest(folder)
    if start and under and json.loads((start / load.BASE_FILE).read_text("utf-8"))["digest"] != under:
        raise WorkError(f"{start}: learned over another base than is there now; put that back, or start over (--fresh)")
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        if start and not watching.begun:
            first_line = str(error).strip().splitlines()[0]
            raise WorkError(
                f"{start}: can't be gone on from ({first_line}); it was made by other versions of the libraries, or "
                "for another number of devices: go back to them, or start over with --fresh"
            ) from error
        raise


def _choose(trainer: SftTrainer, note: Callable[[str], None]) -> int:
    """Take the weights of the best checkpoint; returns its step, which without grades is the last."""
    folder, graded = Path(trainer.args.output_dir), grades(trainer.state)
    last = int(trainer.state.global_step)
    chosen = int(world.agree(lambda: str(checkpoints.step(checkpoints.best(folder, graded, note))))) if graded else last
    if chosen != last:
        trainer.state.best_model_checkpoint = str(folder / f"checkpoint-{chosen}")
        trainer._load_best_model()  # noqa: SLF001  the library's own way, of each kind of model and of sharing it
    if trainer.is_world_process_zero():
        checkpoints.rotate(folder, trainer.config.checkpoints, graded)
    return chosen


@contextmanager
def memory_lasts() -> Iterator[None]:
    """What is to be done where memory ends, on one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if world.size() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise WorkError(
                f"one of the {world.size()} processes is gone, so the others end; the same command goes on from the "
                "last checkpoint"
            ) from error
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        ):
            raise
        raise WorkError(
            "out of memory: lower batch_size (and raise accumulation by as much), set gradient_checkpointing, or "
            "method: qlora; `preceptor plan` says what fits"
        ) from error
