"""The library's loop over our batches and our loss, what watches it, and how a model is graded on the way."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.modeling_outputs import BaseModelOutputWithPast

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Reply, Request, Row, Sampling
from preceptor.model.generate import generate
from preceptor.model.load import Loaded
from preceptor.train import beginning, checkpoints, world
from preceptor.train.batches import Batches, Loader, Packed, Teaching
from preceptor.train.config import Mix, SftConfig
from preceptor.train.loss import Soft, chunked_cross_entropy

Watch = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with its number, the number of all steps, and what was measured since: `loss`, `lr`,
`tokens_per_second` and `memory` (GiB at most so far) every few steps, `grade` at checkpoints."""
Grade = Callable[[Row, Reply], float]
"""What an answer to a validation row is worth, in [0, 1]."""

GRADE = "eval_grade"
_GIB = 2**30
_HIGH = 100.0
"""Logits at which a model that caps them shows it."""


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
    control: TrainerControl
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self, *, config: SftConfig, validation: Validation | None, teaching: Teaching | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config, self._validation, self._teaching = config, validation, teaching
        if (
            self.is_fsdp_enabled and self.args.bf16
        ):  # the library's would sum gradients and give the loss in half precision
            half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = half
        self.model_accepts_loss_kwargs = True  # so the loss is divided by what all of a step's batches weigh
        self.tokens = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, with a group of their own for the embeddings where they have a rate of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.config.embedding_lr is not None:
            embedding = self.model.get_input_embeddings().weight
            group = next(g for g in optimizer.param_groups if any(p is embedding for p in g["params"]))
            group["params"] = [p for p in group["params"] if p is not embedding]
            optimizer.add_param_group({**group, "params": [embedding], "lr": self.config.embedding_lr})
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Packed]:
        """This device's batches, the same after a resume."""
        size, rank, devices = self.args.per_device_train_batch_size, self.args.process_index, self.args.world_size
        batches = Batches(self.train_dataset, size, self.args.seed, rank, devices)
        return Loader(self.train_dataset, batches, self._teaching)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint has the weights whole, beside the devices' shares, so that it can be predicted from."""
        self._save(output_dir, state_dict=self.weights())

    def weights(self) -> dict[str, Tensor]:
        """What learns, whole, on the first device. All devices must ask for it."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            state: Any = get_model_state_dict(model, options=options)
        elif self.is_deepspeed_enabled and self.deepspeed.zero_optimization_stage() == 3:  # noqa: PLR2004  ZeRO's number
            state = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) or {}  # noqa: SLF001  the library's own way
        else:
            state = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", {})  # shares of them are no longer known to be one
        return {name: value for name, value in state.items() if name not in tied}

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A rise, of which the first step already learns, then a cosine to none."""
        rise = int(self.config.warmup * num_training_steps)

        def share(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - rise) / (num_training_steps - rise)))

        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, **kwargs: Any) -> None:
        """A run that had stopped early, and was killed before its model was written, learns no more."""
        if not self.control.should_training_stop:
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
        self._trainer, self.config, self._finish = trainer, config, finish
        self._watch, self._metrics = watch, metrics
        self._since, self._tokens, self._ended = time.perf_counter(), 0, 0.0
        self.begun = False
        self.apart = 0.0
        """Seconds between steps, in which checkpoints are graded and written."""

    def on_train_begin(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """What was stopped stays so; what was measured after the checkpoint that is gone on from is measured again."""
        self.begun = True
        control.should_training_stop = self._enough(state)
        if self._trainer.is_world_process_zero():
            _trim(self._metrics, state.global_step)

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """What was done between steps is no training, and slows none."""
        if self._ended:
            between = time.perf_counter() - self._ended
            self.apart, self._since = self.apart + between, self._since + between

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Log before each checkpoint."""
        self._ended = time.perf_counter()
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
        now = time.perf_counter()
        tokens_here = self._trainer.tokens - self._tokens
        values = {
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "tokens_per_second": tokens_here * self._trainer.args.world_size / max(now - self._since, 1e-9),
            "memory": peak_memory(),
        }
        self._tell(state, values)
        self._since = self._ended = time.perf_counter()
        self._tokens = self._trainer.tokens

    def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Seal the checkpoint, once every device has written its part, and only then delete older ones."""
        self._trainer.accelerator.wait_for_everyone()
        if self._trainer.is_world_process_zero():
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            self._finish(checkpoint)
            checkpoints.seal(checkpoint)
            checkpoints.rotate(folder, self.config.checkpoints, grades(state))
        self._trainer.accelerator.wait_for_everyone()

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        """The last checkpoint is no training either."""
        self.on_step_begin()

    def _tell(self, state: Any, values: Mapping[str, float]) -> None:
        if not self._trainer.is_world_process_zero():
            return
        if values:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")
        self._watch(state.global_step, state.max_steps, values)

    def _enough(self, state: Any) -> bool:
        """Whether as many grades in a row as patience allows are no better than the best before them."""
        given, patience = list(grades(state).values()), self.config.patience
        return bool(patience and given) and len(given) - 1 - given.index(max(given)) >= (patience or 0)


def grades(state: Any) -> dict[int, float]:
    """The grades so far, by step."""
    return {entry["step"]: entry[GRADE] for entry in state.log_history if GRADE in entry}


def learns(model: PreTrainedModel, mix: Mix = Mix(), *, share: bool = False) -> None:
    """Make the model's forward give the training loss, without logits, where labels come; else it is as before.

    With `soft`, of the labels, it is the mixture `mix`; with `share`, rows' common beginning is computed once. It
    happens inside the model's own call and the head's: devices that share weights gather them there.

    Raises:
        UserError: the model does something to its logits that our loss doesn't know.
    """
    _check_head(model)
    head = model.get_output_embeddings()
    plain, scores = model.forward, head.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        weights: Tensor | None = None,
        divisor: Tensor | float | None = None,
        soft: tuple[Tensor, Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Training gives no mask, ever."""
        if labels is None:
            return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if position_ids is not None:  # packed
            states = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            return head(states, labels, divisor, weights, Soft(*soft) if soft else None)
        shared = beginning.common(input_ids, labels) if share else 0
        states = beginning.states(self.base_model, input_ids, shared)
        weights = None if weights is None else weights[:, shared:]
        believed = Soft(*(part[:, shared:] for part in soft)) if soft else None
        return head(states, labels[:, shared:], divisor, weights, believed)

    def learn(
        self: torch.nn.Linear,
        states: Tensor,
        labels: Tensor | None = None,
        divisor: Tensor | float | None = None,
        weights: Tensor | None = None,
        soft: Soft | None = None,
    ) -> Tensor:
        if labels is None:
            logits: Tensor = scores(states)
            return logits
        return chunked_cross_entropy(states, self.weight, labels, divisor, weights, soft, mix)

    model.forward, head.forward = MethodType(forward, model), MethodType(learn, head)


def _check_head(model: PreTrainedModel) -> None:
    """Some models scale or cap their logits, or add a bias: our loss would be another one, silently.

    Only what comes after the last layer is asked, for which shared weights need not be gathered.
    """
    if world.sharding() == "FSDP2" and world.rank():
        return  # only the first process has read the weights
    head, base = model.get_output_embeddings(), model.base_model
    with _whole(head.weight), torch.inference_mode():
        states = torch.randn(1, 8, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight)
        states = states * (_HIGH / (states @ head.weight.T).abs().max())  # where a cap would be felt
        plain, base.forward = base.forward, lambda *_, **__: _Told(last_hidden_state=states)
        try:
            logits = model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=states.device)).logits
        finally:
            base.forward = plain
        ours = states @ head.weight.T
    if not torch.allclose(logits.float(), ours.float(), atol=0.05, rtol=0.05, equal_nan=True):
        raise UserError(f"{model.config.model_type}: a model that changes its logits after the head can't be trained")


class _Told(BaseModelOutputWithPast):  # type: ignore[misc]  # its types aren't read
    """What a model tells, with None for whatever else this one would (experts' routers, images)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def check_packing(model: PreTrainedModel) -> None:
    """Attention keeps packed rows apart by their positions; convolutions and running states don't.

    Raises:
        UserError: what stands before it in a row changes a document.
    """

    def second(first: int) -> Tensor:
        ids = torch.tensor([[*range(first, first + 32), *range(8)]], device=model.device)
        positions = torch.tensor([[*range(32), *range(8)]], device=model.device)
        states: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return states[0, 32:].float()

    model.eval()
    with torch.inference_mode():
        apart = torch.allclose(second(8), second(40), rtol=1e-4, atol=1e-5, equal_nan=True)
    if not apart:
        raise UserError(f"packing: in a {model.config.model_type} packed rows would see one another; leave packing out")


def _whole(weight: Tensor) -> AbstractContextManager[Any]:
    """A weight of which each device has a share, whole on each."""
    if world.sharding() != "ZeRO-3":
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[Any] = GatheredParameters([weight])
    return gathered


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
