"""How to train, apart from what trains: a recipe is checked without loading torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["lora", "qlora", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow", "swanlab"]

_DEFAULTS: dict[Method, dict[str, Any]] = {
    "lora": {"lr": 2e-4, "epochs": 3, "accumulation": 1},
    "qlora": {"lr": 2e-4, "epochs": 3, "accumulation": 1},
    "full": {"lr": 5e-6, "epochs": 1, "accumulation": 8},
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
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of an adapter's inputs."""
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
