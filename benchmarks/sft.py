"""Supervised training beside others' ways on the same rows: tokens a second of training steps, padding not counted.

The rows are the textbook's; the model is a random Qwen3, a quarter of it the head, as in a real small one. Each way
makes one pass over all weights with the same tokens, batch size, precision, optimizer and schedule. TRL's is the
trainer that `trl sft` drives, with loss on the answer and no gradient checkpointing. On a CPU, and not on a GPU, it
meets the prompt and the padding with the head too: budgets hold against TRL with answers alone, as on a GPU, and the
other is told beside it. The first document's is the library's plain trainer at batch 1, sixteen batches a step, with
loss on the prompt too (its gradient checkpointing is left out, in its favour). Ours is told beside itself without the
pass that a batch's rows share for their prompt. Then rows of mixed length, where an unsorted batch is mostly padding.

On a CPU the time is the processor's, of one thread: what else runs on the machine hardly changes it, while two threads
would wait for one another. The ways take turns and each ratio is of one turn; the median is told, and the range.
Loading, tokenising and writing are not timed. A first turn warms the machine up with one batch, of which all that
learn the answer alone must tell the same loss.
"""

import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import datasets
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from preceptor.clinical.textbook.sampler import sample
from preceptor.core.records import Diagnosis, Row
from preceptor.model import tokens
from preceptor.model.load import load_model, load_tokenizer, torch_dtype
from preceptor.model.resolve import resolve
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import canonical
from preceptor.train.config import SftConfig
from preceptor.train.sft import train

TURNS, ROWS = 3, 48
CHARACTERS, SPREAD, MOST = 300, 1.0, 3_000
"""Of records of mixed length: lognormal, with this median and deviation of the logarithm, none longer than the most."""
HOW = SftConfig(method="full", lr=1e-4, epochs=1, batch_size=16, accumulation=1)
ALONE, PACKED = 0.95, 2.0
TRL, STOCK, FIRST, ALL = "TRL", "TRL as it is on a CPU", "the first document's", "ours without"

Way = Callable[[Path, Sequence[Row], Path], int]
"""Trains the model of a folder on rows, with a folder to write to; the tokens that it trained on."""


_now = time.perf_counter if torch.cuda.is_available() else time.process_time


class _Clock(TrainerCallback):  # type: ignore[misc]  # its types aren't read
    """Seconds from the beginning of training to the end of its last step, and the loss that was last told."""

    start = seconds = loss = 0.0

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        _Clock.start = _now()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        _Clock.seconds = _now() - _Clock.start

    def on_log(self, *_args: Any, logs: dict[str, float], **_kwargs: Any) -> None:
        _Clock.loss = logs.get("loss", _Clock.loss)


def _model(folder: Path) -> None:
    """A random Qwen3 of 8 million parameters, a quarter of them in the head, with the tokenizer of `mini`."""
    tokenizer = load_tokenizer(resolve("mini"))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(*, mixed: bool) -> list[Row]:
    prompt, dice = prompts.load("diagnosis", "zero_shot", "en"), random.Random(0)
    cases = sample(ROWS, 0, "en")
    joined = "\n".join(case.text for case in cases)
    rows = []
    for case in cases:
        assert isinstance(case.gold, Diagnosis)
        text = case.text
        if mixed:
            length = min(MOST, round(CHARACTERS * dice.lognormvariate(0, SPREAD)))
            start = dice.randrange(len(joined) - length)
            text = joined[start : start + length]
        rows.append(Row(id=case.id, messages=prompt.render(text), answer=canonical(case.gold), case_id=case.id))
    return rows


def _examples(model: Path, rows: Iterable[Row]) -> list[tokens.Example]:
    tokenizer = load_tokenizer(model)
    return [tokens.example(tokenizer, row, HOW.max_length) for row in rows]


def _ours(*, packing: bool = False) -> Way:
    def run(model: Path, rows: Sequence[Row], out: Path) -> int:
        metrics = train(model, rows, out, HOW.model_copy(update={"packing": packing}))
        return round(metrics["tokens"])

    return run


def _row_by_row(model: Path, rows: Sequence[Row], out: Path) -> int:
    with patch("preceptor.train.beginning.works", lambda _model: False):
        return _ours()(model, rows, out)


def _trls(model: Path, rows: Sequence[Row], out: Path) -> int:
    examples = _examples(model, rows)
    columns = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    with warnings.catch_warnings(action="ignore"):  # its own option is deprecated below it
        config = SFTConfig(
            gradient_checkpointing=False, max_length=HOW.max_length, **_arguments(model, out, HOW.batch_size)
        )
    trainer = SFTTrainer(
        load_model(model, torch.float32),
        config,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=load_tokenizer(model),
    )
    return _trained(trainer)


def _trls_answers(model: Path, rows: Sequence[Row], out: Path) -> int:
    with patch("trl.trainer.utils._use_triton", lambda _device: True):  # asked whether to score answers alone
        return _trls(model, rows, out)


def _first_documents(model: Path, rows: Sequence[Row], out: Path) -> int:
    ids = [example.ids for example in _examples(model, rows)]
    trainer = Trainer(
        load_model(model, torch.float32),
        TrainingArguments(gradient_accumulation_steps=HOW.batch_size, **_arguments(model, out, 1)),
        DataCollatorForSeq2Seq(load_tokenizer(model)),
        datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    return _trained(trainer)


def _trained(trainer: Trainer) -> int:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return sum(map(len, trainer.train_dataset["input_ids"]))


def _arguments(model: Path, out: Path, batch_size: int) -> dict[str, Any]:
    """What ours has too."""
    return {
        "output_dir": str(out),
        "num_train_epochs": HOW.epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": HOW.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": HOW.warmup,
        "optim": "adamw_torch_fused",
        "bf16": torch_dtype(model) == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def _speeds(model: Path, rows: Sequence[Row], ways: dict[str, Way]) -> dict[str, list[float]]:
    """Tokens a second of each way in each turn but the first."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        some = rows if turn else rows[: HOW.batch_size]
        wanted, losses = sum(len(example.ids) for example in _examples(model, some)), {}
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as out:
                trained = way(model, some, Path(out))
            assert trained == wanted, f"{name} trained on {trained} tokens of {wanted}"
            losses[name] = _Clock.loss
            if turn:
                speeds[name].append(wanted / _Clock.seconds)
            elif way is not _first_documents:
                assert math.isclose(_Clock.loss, losses[TRL], rel_tol=1e-3), f"not the same work: {losses}"
    return speeds


def _row(speeds: dict[str, list[float]], ours: str, theirs: str, budget: float | None) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
    value = round(median(ratios), 2)
    fast, slow = median(speeds[ours]), median(speeds[theirs])
    unit = f"x {theirs} ({min(ratios):.2f} to {max(ratios):.2f}; {fast:,.0f} to {slow:,.0f} tokens/s)"
    return {"value": value, "unit": unit, "budget": budget, "ok": budget is None or value >= budget}


def measure() -> dict[str, dict[str, Any]]:
    """How many times as fast ours is as TRL's and as the first document's, and what packing makes of mixed lengths."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    DEFAULT_CALLBACKS.append(_Clock)  # the only way into every trainer alike
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    theirs: dict[str, Way] = {TRL: _trls_answers, FIRST: _first_documents}
    ours, packed = _ours(), _ours(packing=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        _model(model)
        alike = _speeds(model, _rows(mixed=False), {**theirs, STOCK: _trls, ALL: _row_by_row, "ours": ours})
        mixed = _speeds(model, _rows(mixed=True), {**theirs, "packed": packed, "sorted": ours})
    DEFAULT_CALLBACKS.remove(_Clock)
    torch.set_num_threads(threads)
    print(f"one of {os.cpu_count()} cores under a load of {os.getloadavg()[1]:.1f}, {TURNS} turns", file=sys.stderr)
    return {
        "sft": _row(alike, "ours", TRL, ALONE),
        "sft, TRL on a CPU": _row(alike, "ours", STOCK, None),
        "sft, first document": _row(alike, "ours", FIRST, None),
        "sft, the prompt once for a batch": _row(alike, "ours", ALL, None),
        "sft packing, mixed lengths": _row(mixed, "packed", TRL, PACKED),
        "sft packing, mixed lengths, first document": _row(mixed, "packed", FIRST, None),
        "sft no packing, mixed lengths": _row(mixed, "sorted", TRL, None),
    }


if __name__ == "__main__":
    print(measure())
