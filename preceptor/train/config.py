"""How to train, apart from what trains: a recipe is checked without loading torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    """How to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["lora", "full"] = "lora"
    lr: float = Field(default=2e-4, gt=0)
    embedding_lr: float | None = Field(default=None, gt=0)
    """Of the token embeddings, and of a head that shares them, by default `lr`. A small model whose tokens are
    phrases learns what they speak for mostly there."""
    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)
    """Rows a step and device, before accumulation; with packing, on average."""
    accumulation: int = Field(default=1, gt=0)
    """Batches whose gradients make one step."""
    max_length: int = Field(default=2048, gt=0)
    """Tokens of a row; a longer one is cut inside its record, or refused."""
    packing: bool = False
    """Several rows in one sequence. On a CPU padded batches of like length are the faster ones."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""
    weights: TokenWeights = TokenWeights()
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Compile the model first: takes a minute or two and a C++ compiler, and pays in runs much longer than that."""
    checkpoint_steps: int = Field(default=200, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _moved(self) -> "SftConfig":
        if self.embedding_lr is not None and self.method == "lora":
            raise ValueError("embedding_lr: an adapter leaves the embeddings as they are; use method: full, or drop it")
        return self
