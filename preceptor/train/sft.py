"""Supervised fine-tuning, of all weights or of an adapter, over the library's trainer with our loss."""

import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Row
from preceptor.model import load, tokens
from preceptor.model.resolve import digest, resolve
from preceptor.train import checkpoints, world
from preceptor.train.batches import collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.config import SftConfig
from preceptor.train.trainer import Grade, SftTrainer, Validation, Watch, Watching, check_packing, grades, learns
from preceptor.train.weights import token_weights

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


_NOBODY = On()


def train(
    base: str | Path,
    rows: Sequence[Row],
    out: Path,
    config: SftConfig,
    validation: tuple[Sequence[Row], Grade] | None = None,
    on: On = _NOBODY,
) -> dict[str, float]:
    """Train on the rows and write `out/adapter` or `out/model`, `out/metrics.jsonl` and `out/checkpoints`.

    Goes on from the last whole checkpoint. With `validation`, rows and what an answer to one is worth, the checkpoint
    with the best mean grade is written, of equals the latest; else the last. `base` is kept as given in the
    adapter's configuration, so a name stays valid on another machine. Returns what is told of the run.

    Raises:
        UserError: nothing fits, or what is asked for can't be had here.
        WorkError: memory ran out, the loss is no number, or no checkpoint is whole.
    """
    folder = resolve(base)
    compute = load.torch_dtype(folder)
    args = _arguments(out / "checkpoints", config, compute, graded=validation is not None)
    if args.world_size == 1 and (gpus := torch.cuda.device_count()) > 1:
        on.note(f"1 of {gpus} GPUs is used; for all: torchrun --nproc_per_node {gpus} -m preceptor sft RECIPE")
    set_seed(config.seed)
    tokenizer = load.load_tokenizer(folder)
    tokens.with_thinking(tokenizer, on=tokens.thinks(rows))
    examples = _examples(tokenizer, rows, config, on.refused)
    if not examples:
        raise UserError(f"nothing to train on: none of {len(rows)} rows fits {config.max_length} tokens")
    with _memory():
        model = _student(base, folder, tokenizer, config, compute)
        language_model = _language_model(model)
        own = _own(model, config, on.note)
        under = _under(model)
        if config.packing and not world.sharding():
            check_packing(language_model)
        learns(language_model)
        if config.compile:
            language_model.base_model.compile(dynamic=True)
        trainer = SftTrainer(
            model=model,
            args=args,
            train_dataset=pack(examples) if config.packing else unpacked(examples),
            eval_dataset=validation[0] if validation else None,
            data_collator=collate,
            config=config,
            validation=Validation(*validation, tokenizer, folder) if validation else None,
        )
        trainer.remove_callback(PrinterCallback)
        watching = Watching(trainer, config, on.step, out / METRICS, partial(_finish, tokenizer, under))
        trainer.add_callback(watching)
        start = time.perf_counter()
        _learn(trainer, watching, under, on.note)
        chosen = _choose(trainer, on.note)
    seconds = time.perf_counter() - start
    del language_model.forward, language_model.get_output_embeddings().forward
    _write(trainer, tokenizer, under, out, compute)
    graded = grades(trainer.state)
    told = {"chosen_grade": graded[chosen], "last_grade": graded[max(graded)]} if graded else {}
    return {
        "rows": float(len(examples)),
        "refused": float(len(rows) - len(examples)),
        "cut": float(sum(example.cut for example in examples)),
        "steps": float(trainer.state.global_step),
        "planned_steps": float(trainer.state.max_steps),
        "loss": next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), math.nan),
        "seconds": seconds,
        "tokens": float(trainer.tokens * args.world_size),
        "tokens_per_second": trainer.tokens * args.world_size / seconds,
        "devices": float(args.world_size),
        **own,
        "chosen_step": float(chosen),
        **told,
    }


def _arguments(folder: Path, config: SftConfig, compute: torch.dtype, *, graded: bool) -> TrainingArguments:
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
            f"with: torchrun --nproc_per_node {config.devices} -m preceptor sft RECIPE"
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


def _examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], config: SftConfig, refuse: Callable[[Row, str], None]
) -> list[tokens.Example]:
    """The rows' tokens."""
    made = []
    for row in rows:
        try:
            example = tokens.example(tokenizer, row, config.max_length)
        except tokens.TooLongError as error:
            refuse(row, str(error))
        else:
            made.append(replace(example, weights=token_weights(tokenizer, row, example, config.weights)))
    return made


def _student(
    base: str | Path, folder: Path, tokenizer: PreTrainedTokenizerBase, config: SftConfig, compute: torch.dtype
) -> Any:
    """The model to train. Weights that learn are single precision: half loses small steps."""
    earlier = (folder / "adapter_config.json").is_file()
    if earlier and config.method == "full" and world.sharding() in ("FSDP2", "ZeRO-3"):
        raise UserError(
            f"{folder}: an adapter can't be merged where weights are shared; export it merged, and train that"
        )
    where = "cpu" if world.sharding() == "FSDP2" else None  # each GPU gets its share alone
    if config.method == "full":
        if earlier:
            model = load.load(folder, dtype="float32").model.requires_grad_(True)  # merged, it was frozen
        else:
            model = load.load_model(folder, torch.float32, device=where)
        model.generation_config.eos_token_id = tokens.end_of_turn(tokenizer)
        return model
    under = load.base_of(folder) if earlier else folder
    beneath = load.load_model(under, compute, four_bit=config.method == "qlora", device=where)
    if earlier:  # goes on learning
        student = load.load_adapter(beneath, under, folder, trainable=True)
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    else:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        student = get_peft_model(beneath, lora)
        name = str(folder.resolve()) if Path(base).expanduser().is_dir() else str(base)
    student.peft_config["default"].base_model_name_or_path = name
    student.save_pretrained = partial(student.save_pretrained, save_embedding_layers=False)  # to decide asks the hub
    return student


def _language_model(model: Any) -> PreTrainedModel:
    """The model itself, out of its adapter's wrapping."""
    inner: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return inner


def _own(model: Any, config: SftConfig, note: Callable[[str], None]) -> dict[str, float]:
    """Rank, alpha and dropout that an adapter has; where an earlier one's differ from the recipe's, it is said."""
    if isinstance(model, PreTrainedModel):
        return {}
    lora = model.peft_config["default"]
    own = {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
    if any(getattr(config, name) != value for name, value in own.items()):
        told = ", ".join(f"{name} {value:g}" for name, value in own.items())
        note(f"the adapter that goes on learning keeps its own {told}")
    return own


def _under(model: Any) -> str | None:
    """The digest of the base under an adapter; None for a whole model."""
    if isinstance(model, PreTrainedModel):
        return None
    return digest(resolve(model.peft_config["default"].base_model_name_or_path))


def _learn(trainer: SftTrainer, watching: Watching, under: str | None, note: Callable[[str], None]) -> None:
    folder = Path(trainer.args.output_dir)
    first = trainer.is_world_process_zero()
    start = checkpoints.last(folder, note) if first else None
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
def _memory() -> Iterator[None]:
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


def _finish(tokenizer: PreTrainedTokenizerBase, under: str | None, folder: Path) -> None:
    """What a folder holds beside the weights: the tokenizer, and of an adapter which base it was trained over."""
    tokenizer.save_pretrained(folder)
    if under:
        (folder / load.BASE_FILE).write_text(json.dumps({"digest": under}) + "\n", "utf-8")


def _write(
    trainer: SftTrainer, tokenizer: PreTrainedTokenizerBase, under: str | None, out: Path, compute: torch.dtype
) -> None:
    """Write the result beside its place, then rename it."""
    state = trainer.weights()
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    full = isinstance(model, PreTrainedModel)
    final = out / ("model" if full else "adapter")
    beside = final.with_name(f"{final.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=_in_dtype(state, compute) if full else state)
    if full:
        config = json.loads((beside / "config.json").read_text("utf-8"))
        config["dtype"] = str(compute).removeprefix("torch.")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    _finish(tokenizer, under, beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype; what shared memory still does."""
    cast: dict[int, Tensor] = {}
    return {name: cast.setdefault(value.data_ptr(), value.to(dtype)) for name, value in state.items()}
