"""How to train, apart from what trains: a recipe is checked without loading torch."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["lora", "qlora", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow", "swanlab"]
DivergenceName = Literal["renormalised", "bucket", "decoupled", "reverse", "sampled"]
"""By name in `preceptor.train.divergence`, which says what they are."""

_DEFAULTS: dict[Method, dict[str, Any]] = {
    "lora": {"lr": 2e-4, "epochs": 3, "accumulation": 1, "dropout": 0.1},
    "qlora": {"lr": 2e-4, "epochs": 3, "accumulation": 1, "dropout": 0.1},
    "full": {"lr": 5e-6, "epochs": 1, "accumulation": 8, "dropout": 0.0},
}


SETTLED = ("rank", "alpha", "dropout")
"""What an adapter that goes on learning has decided before."""


class TokenWeights(BaseModel):
    """How much a token of each field of an answer counts in the loss, which is divided by the weights' sum.

    A field is its list, brackets included: where a list ends is as much an answer as what stands in it. An answer
    without these fields is syntax throughout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    diseases: float = Field(default=1.0, ge=0)
    evidence: float = Field(default=1.0, ge=0)
    syntax: float = Field(default=1.0, gt=0)


class Mix(BaseModel):
    """How a teacher's probabilities and the label make one loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    divergence: DivergenceName | Callable[..., Any] = "bucket"
    """One of ours, or a function like those of `preceptor.train.divergence`."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Of the divergence, where the teacher's mass is known; the rest is cross-entropy's."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens teacher and student alike; the loss is multiplied by its square, so that gradients stay as large (Hinton
    et al. 2015)."""


class SftConfig(BaseModel):
    """How to train. What depends on the method has the method's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "lora"
    """An adapter (LoRA, Hu et al. 2021), one over a base in 4 bits (QLoRA, Dettmers et al. 2023), or all weights."""
    lr: float = Field(gt=0)
    """By default 2e-4; 5e-6 of all weights."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Of the token embeddings, and of a head that shares them, by default `lr`. A small model whose tokens are
    phrases learns what they speak for mostly there."""
    epochs: float = Field(gt=0)
    """By default 3; 1 of all weights."""
    batch_size: int = Field(default=16, gt=0)
    """Rows that a device takes at once; with packing, on average."""
    accumulation: int = Field(gt=0)
    """Batches whose gradients make one step, on all devices together: a step is the same on one device as on eight.
    By default 1; 8 of all weights."""
    devices: int | None = Field(default=None, gt=0)
    """Processes, each with a device, that a launcher must have started; by default as many as it did."""
    max_length: int = Field(default=2048, gt=0)
    """Tokens of a row; a longer one is cut inside its record, or refused."""
    packing: bool = False
    """Several rows in one sequence, which pays where their lengths differ much."""
    optimizer: Optimizer = "adamw"
    """In 8 bits its state takes a quarter of the memory; paged, it leaves the GPU's memory when that is short."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""
    weights: TokenWeights = TokenWeights()
    rank: int = Field(default=64, gt=0)
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(ge=0, lt=1)
    """Of an adapter's inputs, by default 0.1; of all weights, of what each half of a layer adds, by default none."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Compile the model first: takes a minute or two and a C++ compiler, and pays in runs much longer than that."""
    checkpoint_steps: int = Field(default=200, gt=0)
    """Steps between two checkpoints, at each of which the validation rows are answered and graded."""
    checkpoints: int | None = Field(default=2, ge=2)
    """How many are kept, the best and the last among them; null: all."""
    patience: int | None = Field(default=None, gt=0)
    """Checkpoints in a row that may be no better than the best before training stops; by default it never does."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that are told the metrics, by default none. They are told no text."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**_DEFAULTS.get(values.get("method", "lora"), {}), **values}

    @model_validator(mode="after")
    def _moved(self) -> "SftConfig":
        if self.embedding_lr is not None and self.method != "full":
            raise ValueError("embedding_lr: an adapter leaves the embeddings as they are; use method: full, or drop it")
        return self

    def adapter(self) -> Any:
        """What the library is told of a fresh adapter."""
        from peft import LoraConfig  # a second to import

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )


class OnPolicyConfig(SftConfig):
    """How to train on what the student writes itself. An epoch is one answer to each prompt."""

    temperature: float = Field(default=1.0, gt=0)
    """At which the student answers, and at which its probabilities are held against the teacher's."""
    max_tokens: int = Field(default=512, gt=0)
    """Of an answer; what is longer is learned from as far as it went."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """Which divergence: 1 is KL(student || teacher), 0 is KL(teacher || student), and what is between them is
    Jensen and Shannon's generalised one."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        return {"dropout": 0.0, **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dropout:
            raise ValueError("dropout: with it another student would write than learns; leave it out")
        for name in ("packing", "compile", "weights"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: doesn't go with answers that are written while training; leave it out")
        if self.max_tokens >= self.max_length:
            raise ValueError(f"max_tokens: {self.max_tokens} leave a prompt no room in max_length {self.max_length}")
        return self
