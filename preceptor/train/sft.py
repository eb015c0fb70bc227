"""Supervised fine-tuning, of all weights or of an adapter, over the library's trainer with our loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Row
from preceptor.model import load, tokens
from preceptor.model.resolve import resolve
from preceptor.train import beginning, student, world
from preceptor.train.batches import Teaching, collate, pack
from preceptor.train.batches import rows as unpacked
from preceptor.train.config import Mix, SftConfig
from preceptor.train.dropout import residual_dropout
from preceptor.train.fit import NOBODY, On, arguments, fit, memory_lasts
from preceptor.train.trainer import Grade, SftTrainer, Validation, check_packing, learns
from preceptor.train.weights import token_weights


def train(
    base: str | Path,
    rows: Sequence[Row],
    out: Path,
    config: SftConfig,
    validation: tuple[Sequence[Row], Grade] | None = None,
    on: On = NOBODY,
    teaching: Teaching | None = None,
) -> dict[str, float]:
    """Train on the rows and write `out/adapter` or `out/model`, `out/metrics.jsonl` and `out/checkpoints`.

    With `teaching`, on what a teacher believed of their tokens too. Goes on from the last whole checkpoint. With
    `validation`, rows and what an answer to one is worth, the checkpoint with the best mean grade is written, of equals
    the latest; else the last. `base` is kept as given in the adapter's configuration, so a name stays valid on another
    machine. Returns what is told of the run.

    Raises:
        UserError: nothing fits, or what is asked for can't be had here.
        WorkError: memory ran out, the loss is no number, or no checkpoint is whole.
    """
    folder = resolve(base)
    compute = load.torch_dtype(folder)
    args = arguments(out / "checkpoints", config, compute, graded=validation is not None)
    if args.world_size == 1 and (gpus := torch.cuda.device_count()) > 1:
        on.note(
            f"1 of {gpus} GPUs is used; for all: torchrun --nproc_per_node {gpus} -m preceptor sft RECIPE, or distill"
        )
    set_seed(config.seed)
    tokenizer = load.load_tokenizer(folder)
    tokens.with_thinking(tokenizer, on=tokens.thinks(rows))
    examples = _examples(tokenizer, rows, config, on.refused, teaching)
    if not examples:
        raise UserError(f"nothing to train on: none of {len(rows)} rows fits {config.max_length} tokens")
    with memory_lasts():
        model = student.build(base, folder, tokenizer, config, compute)
        language_model = student.inner(model)
        if config.packing and not world.sharding():
            check_packing(language_model)
        # Where weights are shared among devices, or activations computed twice, a layer is called once a step.
        once = config.compile or config.gradient_checkpointing or config.packing or world.sharding()
        share = not once and beginning.works(language_model.base_model)
        learns(language_model, teaching.mix if teaching else Mix(), share=share)
        if config.method == "full" and config.dropout:
            residual_dropout(language_model, config.dropout)
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
            teaching=teaching,
        )
        told = fit(trainer, tokenizer, out, compute, on)
    del language_model.forward, language_model.get_output_embeddings().forward
    return {
        "rows": float(len(examples)),
        "refused": float(len(rows) - len(examples)),
        "cut": float(sum(example.cut for example in examples)),
        **told,
    }


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: SftConfig,
    refuse: Callable[[Row, str], None],
    teaching: Teaching | None = None,
) -> list[tokens.Example]:
    """The rows' tokens, with what each counts and where a teacher's beliefs about it stand."""
    made = []
    for row in rows:
        try:
            example = tokens.example(tokenizer, row, config.max_length)
        except tokens.TooLongError as error:
            refuse(row, str(error))
        else:
            weights = token_weights(tokenizer, row, example, config.weights)
            made.append(replace(example, weights=weights, places=_places(row, example, teaching)))
    return made


def _places(row: Row, example: tokens.Example, teaching: Teaching | None) -> list[int] | None:
    """Where the store has the answer's tokens; None where it has none of this row.

    Raises:
        WorkError: it has another answer, or is damaged.
    """
    key = row.case_id, row.sample
    if not teaching or key not in teaching.store:
        return None
    learnt = [label for label in example.labels if label != tokens.IGNORED]
    if teaching.store[key].written.tolist() != learnt:
        raise WorkError(f"{teaching.store.folder}: it has another answer than row {row.id}; start over with --fresh")
    return [-1] * (len(example.ids) - len(learnt)) + list(teaching.store.places(key))
