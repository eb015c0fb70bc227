"""On-policy distillation (arXiv 2306.13649), over TRL's loop: the student answers, and learns from a teacher's view.

A teacher on this machine says what it would have written in place of each token of the answer. What a student never
writes it learns nothing of, so it begins where supervised training ended.
"""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from trl import DistillationConfig, DistillationTrainer

from preceptor.core.errors import UserError
from preceptor.core.records import Row
from preceptor.model import load, tokens
from preceptor.model.load import Loaded
from preceptor.model.resolve import resolve
from preceptor.train import student
from preceptor.train.config import OnPolicyConfig
from preceptor.train.fit import NOBODY, On, arguments, fit, memory_lasts
from preceptor.train.scorer import check_tokens
from preceptor.train.trainer import Grade, SftTrainer, Validation


def train(
    base: str | Path,
    teacher: Loaded,
    rows: Sequence[Row],
    out: Path,
    config: OnPolicyConfig,
    validation: tuple[Sequence[Row], Grade] | None = None,
    on: On = NOBODY,
) -> dict[str, float]:
    """Train on the rows' prompts, whose answers are not looked at, and write and return what `sft.train` does.

    Raises:
        UserError: the teacher's tokens are not the student's, nothing fits, or what is asked for can't be had here.
        WorkError: memory ran out, the loss is no number, or no checkpoint is whole.
    """
    folder = resolve(base)
    compute = load.torch_dtype(folder)
    args = _told(arguments(out / "checkpoints", config, compute, graded=validation is not None), config)
    set_seed(config.seed)
    tokenizer = load.load_tokenizer(folder)
    check_tokens(teacher, tokenizer, base)
    tokens.with_thinking(tokenizer, on=tokens.thinks(rows))
    prompts = _prompts(tokenizer, rows, min(config.max_length, teacher.context) - config.max_tokens, on.refused)
    if not prompts:
        raise UserError(f"nothing to train on: none of {len(rows)} prompts fits {config.max_length} tokens")
    a_step = config.batch_size * config.accumulation
    args.max_steps = max(1, round(config.epochs * len(prompts) / a_step))
    with memory_lasts(), warnings.catch_warnings(action="ignore", category=FutureWarning):  # libraries to one another
        model = student.build(base, folder, tokenizer, config, compute)
        language_model = student.inner(model)
        language_model.generation_config.eos_token_id = tokens.end_of_turn(tokenizer)
        trainer = OnPolicyTrainer(
            model=model,
            teacher_model=_as_wide(teacher, language_model.config.get_text_config().vocab_size),
            args=args,
            train_dataset=[{"prompt": ids} for ids in _order(prompts, args.max_steps * a_step, config.seed)],
            eval_dataset=validation[0] if validation else None,
            processing_class=load.load_tokenizer(folder),  # to which a token of padding is given
            config=config,
            validation=Validation(*validation, tokenizer, folder) if validation else None,
            teaching=None,
        )
        told = fit(trainer, tokenizer, out, compute, on)
    return {"rows": float(len(prompts)), "refused": float(len(rows) - len(prompts)), **told}


class OnPolicyTrainer(SftTrainer, DistillationTrainer):  # type: ignore[misc]  # its types aren't read
    """TRL's loop and loss, with our tokens, checkpoints and grades."""

    get_train_dataloader = DistillationTrainer.get_train_dataloader

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """They are tokens already."""
        return prompts, None, {}

    def _get_num_items_in_batch(self, *_args: Any) -> Any:
        """Known only when the answers are."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, and what it is made from counted."""
        self.tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        loss: Tensor = DistillationTrainer.compute_loss(self, model, inputs, *args, **kwargs)
        return loss

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """The stage writes one."""


def _told(args: TrainingArguments, config: OnPolicyConfig) -> DistillationConfig:
    """What the library is told, beside what every training is."""
    known = {field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init}
    told = DistillationConfig(
        **known,
        beta=config.beta,
        temperature=config.temperature,
        max_completion_length=config.max_tokens,
        disable_dropout=True,  # or it would be another student that writes
        shuffle_dataset=False,
        log_completions=False,  # they are patients' words
    )
    told._n_gpu = args._n_gpu  # noqa: SLF001  as `arguments` has it
    return told


def _prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], limit: int, refuse: Callable[[Row, str], None]
) -> list[list[int]]:
    """The prompts' tokens."""
    made = []
    for row in rows:
        try:
            made.append(tokens.prompt_ids(tokenizer, row.messages, limit))
        except tokens.TooLongError as error:
            refuse(row, str(error))
    return made


def _order(prompts: Sequence[list[int]], count: int, seed: int) -> list[list[int]]:
    """So many prompts, each pass over all of them in an order of its own: what a resumed run sees too."""
    order: list[list[int]] = []
    epoch = 0
    while len(order) < count:
        order += random.Random(f"{seed} {epoch}").sample(prompts, len(prompts))
        epoch += 1
    return order[:count]


def _as_wide(teacher: Loaded, width: int) -> Any:
    """The teacher with a head of that width: beyond the vocabulary nothing is lost.

    Raises:
        UserError: it would have to be widened, with words that it never learned.
    """
    model = teacher.model
    own = model.config.get_text_config().vocab_size
    if own < width:
        raise UserError(
            f"{teacher.folder}: a head of {own} tokens, where the student's has {width}; distil from what it says of "
            "given answers (distill), or take a teacher whose head is as wide"
        )
    if own > width:
        model.resize_token_embeddings(width)
    return model
