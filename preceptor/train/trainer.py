"""The library's loop over our batches and our loss, what watches it, and how a model is graded on the way."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Reply, Request, Row, Sampling
from preceptor.model.generate import generate
from preceptor.model.load import Loaded
from preceptor.train import checkpoints
from preceptor.train.batches import Batches, Loader, Packed
from preceptor.train.config import SftConfig
from preceptor.train.loss import chunked_cross_entropy

Watch = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with its number, the number of all steps, and what was measured since: `loss`, `lr`,
`tokens_per_second` and `memory` (GiB at most so far) every few steps, `grade` at checkpoints."""
Grade = Callable[[Row, Reply], float]
"""What an answer to a validation row is worth, in [0, 1]."""

GRADE = "eval_grade"
_GIB = 2**30


class Validation:
    """Rows that a model is graded on as it learns: it answers them, as it will when it serves."""

    def __init__(self, rows: Sequence[Row], grade: Grade, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self._rows, self._grade, self._tokenizer, self._folder = rows, grade, tokenizer, folder
        longest = max(len(tokenizer.encode(row.answer, add_special_tokens=False)) for row in rows)
        sampling = Sampling(max_tokens=2 * longest + 8)  # what doesn't end by then has gone astray
        self._requests = [Request(messages=row.messages, sampling=sampling) for row in rows]

    def __call__(self, model: Any) -> float:
        """The mean grade of the model's answers."""
        learning = model.training
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # each length of a cache would be compiled anew
            replies = generate(Loaded(model, self._tokenizer, self._folder), self._requests)
        model.train(learning)
        return math.fsum(self._grade(row, reply) for row, reply in zip(self._rows, replies, strict=True)) / len(replies)


class SftTrainer(Trainer):  # type: ignore[misc]  # its types aren't read
    """Our batches, our loss, and a grade for each checkpoint."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, config: SftConfig, validation: Validation | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config, self._validation = config, validation
        self.model_accepts_loss_kwargs = True  # so the loss is divided by what all of a step's batches weigh
        self.tokens = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, with a group of their own for the embeddings where they have a rate of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._config.embedding_lr is not None:
            embedding = self.model.get_input_embeddings().weight
            group = next(g for g in optimizer.param_groups if any(p is embedding for p in g["params"]))
            group["params"] = [p for p in group["params"] if p is not embedding]
            optimizer.add_param_group({**group, "params": [embedding], "lr": self._config.embedding_lr})
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Packed]:
        """This device's batches, the same after a resume."""
        size, rank, devices = self.args.per_device_train_batch_size, self.args.process_index, self.args.world_size
        return Loader(self.train_dataset, Batches(self.train_dataset, size, self.args.seed, rank, devices))

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

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """The grade of the model as it stands: each device answers all rows, and the first one's grade counts."""
        assert self._validation is not None
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        grade = torch.tensor(self._validation(model), dtype=torch.float64, device=self.args.device)
        metrics = {GRADE: float(self.accelerator.gather(grade).flatten()[0])}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _run_epoch(self, **kwargs: Any) -> None:
        """A run that had stopped early, and was killed before its model was written, learns no more."""
        control: TrainerControl = self.control
        if not control.should_training_stop:
            super()._run_epoch(**kwargs)

    def floating_point_ops(self, _inputs: dict[str, Any]) -> int:
        """Not reported, so not counted at every step."""
        return 0


class Watching(TrainerCallback):  # type: ignore[misc]  # as above
    """Passes the numbers on, stops at a loss that is none before it is saved, seals checkpoints, and stops early."""

    def __init__(
        self, trainer: SftTrainer, config: SftConfig, watch: Watch, metrics: Path, finish: Callable[[Path], None]
    ) -> None:
        """`metrics` is the file of what is measured; `finish` is called on each checkpoint before it is sealed."""
        self._trainer, self._config, self._finish = trainer, config, finish
        self._watch, self._metrics = watch, metrics
        self._since, self._tokens = time.perf_counter(), 0
        self.loss = math.nan
        self.begun = False

    def on_train_begin(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """What was stopped stays so; what was measured after the checkpoint that is gone on from is measured again."""
        self.begun = True
        control.should_training_stop = self._enough(state)
        if self._trainer.is_world_process_zero():
            _trim(self._metrics, state.global_step)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Log before each checkpoint."""
        control.should_log = control.should_log or control.should_save
        self._tell(state, {})

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Stop where patience is at its end."""
        control.should_training_stop = control.should_training_stop or self._enough(state)

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_kwargs: Any
    ) -> None:
        """Called every few steps with the loss since the last call, at checkpoints with the grade, and at the end."""
        if logs and GRADE in logs:
            self._tell(state, {"grade": logs[GRADE]})
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise WorkError(
                f"the loss is {logs['loss']:g} and its gradient {logs.get('grad_norm', math.nan):g} at step "
                f"{state.global_step}: lower the learning rate (lr) and start over with --fresh, or look at the rows"
            )
        self.loss = logs["loss"]
        now = time.perf_counter()
        tokens_here = self._trainer.tokens - self._tokens
        values = {
            "loss": self.loss,
            "lr": logs["learning_rate"],
            "tokens_per_second": tokens_here * self._trainer.args.world_size / max(now - self._since, 1e-9),
            "memory": peak_memory(),
        }
        self._tell(state, values)
        self._since, self._tokens = time.perf_counter(), self._trainer.tokens

    def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Seal the checkpoint, and only then delete older ones."""
        if self._trainer.is_world_process_zero():
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            self._finish(checkpoint)
            checkpoints.seal(checkpoint)
            checkpoints.rotate(folder, self._config.checkpoints, state.best_model_checkpoint)
        self._trainer.accelerator.wait_for_everyone()
        self._since = time.perf_counter()

    def _tell(self, state: Any, values: Mapping[str, float]) -> None:
        if not self._trainer.is_world_process_zero():
            return
        if values:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")
        self._watch(state.global_step, state.max_steps, values)

    def _enough(self, state: Any) -> bool:
        """Whether as many grades in a row as patience allows are no better than the best before them."""
        grades = [entry[GRADE] for entry in state.log_history if GRADE in entry]
        patience = self._config.patience
        return bool(patience and grades) and len(grades) - 1 - grades.index(max(grades)) >= (patience or 0)


def learns(model: PreTrainedModel) -> None:
    """Make the model's forward give the training loss, without logits, where labels come; else it is as before.

    It happens inside the model's own call, as several devices need it.

    Raises:
        UserError: the model does something to its logits that our loss doesn't know.
    """
    _check_head(model)
    plain = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        weights: Tensor | None = None,
        divisor: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)
        return loss(self, input_ids, labels, position_ids, weights, divisor)

    model.forward = MethodType(forward, model)


def loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """The loss of a batch. The model is never given a mask."""
    states = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return chunked_cross_entropy(states, model.get_output_embeddings().weight, labels, divisor, weights)


def _check_head(model: PreTrainedModel) -> None:
    """Some models scale or cap their logits, or add a bias: our loss would be another one, silently."""
    ids = torch.arange(8, device=model.device)[None]
    model.eval()  # dropout would make two passes differ
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        ours = model.base_model(input_ids=ids).last_hidden_state @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits.float(), ours.float(), atol=0.05, rtol=0.05, equal_nan=True):
        raise UserError(f"{model.config.model_type}: a model that changes its logits after the head can't be trained")


def peak_memory() -> float:
    """GiB: the most that this process had, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def _trim(metrics: Path, step: int) -> None:
    """Leave the lines up to a step; one that a kill cut short goes."""
    if not metrics.exists():
        return
    whole = [line for line in metrics.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), "utf-8")
