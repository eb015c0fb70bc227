"""Supervised fine-tuning, of all weights or of an adapter, over the library's trainer with our loss."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Row
from preceptor.model import load, tokens
from preceptor.model.resolve import digest, resolve
from preceptor.train.batches import Batches, collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.config import SftConfig
from preceptor.train.loss import chunked_cross_entropy
from preceptor.train.weights import token_weights

CURVE = "curve.jsonl"
OnLog = Callable[[int, int, dict[str, float]], None]
"""Called with step, total steps and loss, lr, tokens_per_second (validation_loss at checkpoints)."""
OnRefused = Callable[[Row, str], None]
"""Called with a row that can't be made to fit, and why."""


def train(
    base: str | Path,
    rows: Sequence[Row],
    out: Path,
    config: SftConfig,
    on_log: OnLog | None = None,
    validation: Sequence[Row] = (),
    on_refused: OnRefused | None = None,
) -> dict[str, float]:
    """Train on the rows and write `out/adapter` or `out/model`; goes on from the last whole checkpoint.

    `base` is kept as given in the adapter's configuration, so a name stays valid on another machine.
    """
    set_seed(config.seed)
    folder = resolve(base)
    tokenizer = load.load_tokenizer(folder)
    examples, cut = _examples(tokenizer, rows, config, on_refused)
    held_out, _ = _examples(tokenizer, validation, config, on_refused)
    if not examples:
        raise UserError(f"nothing to train on: none of {len(rows)} rows fits {config.max_length} tokens")
    compute = load.torch_dtype(folder)
    model = _student(folder, config, compute)
    with_loss = _language_model(model)
    _check_head(with_loss)
    if config.compile:
        with_loss.base_model.compile(dynamic=True)
    with_loss.forward = MethodType(_loss, with_loss)  # inside the model's own call, as several GPUs need it
    trainer = _Trainer(
        model=model,
        args=_arguments(out / "checkpoints", config, bf16=compute == torch.bfloat16),
        train_dataset=pack(examples) if config.packing else unpacked(examples),
        data_collator=collate,
        embedding_lr=config.embedding_lr,
    )
    trainer.remove_callback(PrinterCallback)
    progress = _Progress(trainer, on_log, lambda: _held_out_loss(trainer, held_out))
    trainer.add_callback(progress)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(out / "checkpoints"))
    except torch.OutOfMemoryError as error:
        raise WorkError(
            "out of memory: lower sft.batch_size (and raise accumulation), or set gradient_checkpointing"
        ) from error
    seconds = time.perf_counter() - start
    metrics = {
        "rows": float(len(examples)),
        "refused": float(len(rows) - len(examples)),
        "cut": float(cut),
        "steps": float(trainer.state.global_step),
        "loss": progress.loss,
        "seconds": seconds,
        "tokens_per_second": trainer.tokens / seconds,
    }
    if held_out:
        metrics["validation_loss"] = _held_out_loss(trainer, held_out)
    del with_loss.forward
    if trainer.is_world_process_zero():
        _write_curve(trainer.state.log_history, out / CURVE)
        _write(model, tokenizer, base, out, compute)
    return metrics


class _Trainer(Trainer):  # type: ignore[misc]  # its types aren't read
    """The library's loop over our batches and our loss."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, embedding_lr: float | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding_lr = embedding_lr
        self.model_accepts_loss_kwargs = True  # so the loss is divided by what all of a step's batches weigh
        self.tokens = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, with a group of their own for the embeddings where they have a rate of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.embedding_lr is not None:
            embedding = self.model.get_input_embeddings().weight
            group = next(g for g in optimizer.param_groups if any(p is embedding for p in g["params"]))
            group["params"] = [p for p in group["params"] if p is not embedding]
            optimizer.add_param_group({**group, "params": [embedding], "lr": self.embedding_lr})
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of like length, the same after a resume."""
        batches = Batches(self.train_dataset, self.args.per_device_train_batch_size, self.args.seed)
        data = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(data)
        return prepared

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """The weighted mean over the step's answer tokens; devices' gradients are averaged, hence the factor."""
        self.tokens += inputs.pop("tokens")
        loss: Tensor = model(**inputs, divisor=num_items_in_batch)
        scaled: Tensor = loss * self.accelerator.num_processes
        return scaled

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """What the answer tokens of a step weigh, on all devices; the library would count them."""
        total = torch.stack([batch["weights"][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        weighed: Tensor = self.accelerator.gather(total).sum()
        return weighed

    def floating_point_ops(self, _inputs: dict[str, Any]) -> int:
        """Not reported, so not counted at every step."""
        return 0


class _Progress(TrainerCallback):  # type: ignore[misc]  # as above
    """Passes the numbers on, and stops at a loss that is none, before it is saved."""

    def __init__(self, trainer: _Trainer, on_log: OnLog | None, held_out_loss: Callable[[], float]) -> None:
        self.loss = math.nan
        self._trainer, self._on_log, self._held_out_loss = trainer, on_log, held_out_loss
        self._since, self._tokens = time.perf_counter(), 0

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
        """Log before each checkpoint."""
        control.should_log = control.should_log or control.should_save

    def on_log(
        self, _args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_kwargs: Any
    ) -> None:
        """Called every few steps, with the loss since the last call, and once at the end without."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise WorkError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower the learning rate (lr), "
                "or look at the rows"
            )
        self.loss = logs["loss"]
        now = time.perf_counter()
        values = {
            "loss": self.loss,
            "lr": logs["learning_rate"],
            "tokens_per_second": (self._trainer.tokens - self._tokens) / max(now - self._since, 1e-9),
        }
        if control.should_save and not math.isnan(held_out := self._held_out_loss()):
            values["validation_loss"] = state.log_history[-1]["validation_loss"] = held_out
        if self._on_log is not None and self._trainer.is_world_process_zero():
            self._on_log(state.global_step, state.max_steps, values)
        self._since, self._tokens = time.perf_counter(), self._trainer.tokens


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: SftConfig,
    refuse: OnRefused | None,
) -> tuple[list[tokens.Example], int]:
    """The rows' tokens, and how many were cut."""
    made = []
    for row in rows:
        try:
            example = tokens.example(tokenizer, row, config.max_length)
        except tokens.TooLongError as error:
            if refuse is not None:
                refuse(row, str(error))
        else:
            made.append(replace(example, weights=token_weights(tokenizer, row, example, config.weights)))
    return made, sum(example.cut for example in made)


def _student(folder: Path, config: SftConfig, compute: torch.dtype) -> Any:
    """The model to train. Weights that learn are single precision: half loses small steps."""
    if config.method == "full":
        return load.load(folder, dtype="float32").model
    if (folder / "adapter_config.json").is_file():  # goes on learning
        base = load.base_of(folder)
        return load.load_adapter(load.load_model(base, compute), base, folder, trainable=True)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(load.load_model(folder, compute), lora)


def _language_model(model: Any) -> PreTrainedModel:
    """The model itself, out of its adapter's wrapping."""
    inner: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return inner


def _check_head(model: PreTrainedModel) -> None:
    """Some models scale or cap their logits, or add a bias: our loss would be another one, silently."""
    ids = torch.arange(8, device=model.device)[None]
    model.eval()  # dropout would make two passes differ
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        ours = model.base_model(input_ids=ids).last_hidden_state @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits.float(), ours.float(), atol=0.05, rtol=0.05, equal_nan=True):
        raise UserError(f"{model.config.model_type}: a model that changes its logits after the head can't be trained")


def _loss(
    self: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
    **_: Any,
) -> Tensor:
    """What the model's forward does while it is trained: the loss, without logits. Never given a mask."""
    states = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return chunked_cross_entropy(states, self.get_output_embeddings().weight, labels, divisor, weights)


def _arguments(folder: Path, config: SftConfig, *, bf16: bool) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        activation_checkpointing=config.gradient_checkpointing,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,  # below 1 a share
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        seed=config.seed,
        bf16=bf16,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
    )


def _held_out_loss(trainer: _Trainer, examples: Sequence[tokens.Example]) -> float:
    """Mean loss of the answer tokens of other rows; not a number without any."""
    total, count = 0.0, 0
    model = trainer.model_wrapped
    model.eval()
    rows = sorted(unpacked(examples), key=lambda row: len(row.ids))
    size = trainer.args.per_device_train_batch_size
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size])
            ids, labels = (batch[name].to(trainer.args.device) for name in ("input_ids", "labels"))
            total += model(input_ids=ids, labels=labels, divisor=1.0).item()
            count += int((labels != tokens.IGNORED).sum())
    model.train()
    return total / count if count else math.nan


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. Its state is written last, so one without was being written at a kill."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


def _write_curve(history: Sequence[dict[str, float]], path: Path) -> None:
    """The losses by step, those before a resume too."""
    kept = ("step", "loss", "validation_loss")
    lines = [{name: entry[name] for name in kept if name in entry} for entry in history if "loss" in entry]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, base: str | Path, out: Path, compute: torch.dtype) -> None:
    """Write the result beside its place, then rename it."""
    full = isinstance(model, PreTrainedModel)
    final = out / ("model" if full else "adapter")
    beside = final.with_name(f"{final.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    if full:
        model.generation_config.eos_token_id = tokens.end_of_turn(tokenizer)
        model.to(compute).save_pretrained(beside)
    else:
        folder = resolve(base)
        name = str(folder.resolve()) if Path(base).expanduser().is_dir() else str(base)
        if (folder / "adapter_config.json").is_file():  # its base is ours
            name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(beside, save_embedding_layers=False)  # deciding it would ask the hub
        (beside / load.BASE_FILE).write_text(json.dumps({"digest": digest(resolve(name))}) + "\n")
    tokenizer.save_pretrained(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
