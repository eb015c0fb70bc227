"""The memory that a training step takes, found by going through it on tensors without contents.

The model is built from its configuration, and forward, loss and backward pass run as they do in training, with
PyTorch's fake tensors: they have sizes, but hold nothing. What is allocated and freed on the way is written down, so
the peak is that of every architecture, and not of a formula for some.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from preceptor.train.blank import furnish, parameters, student, with_layers
from preceptor.train.config import SftConfig
from preceptor.train.loss import IGNORED, chunked_cross_entropy

GIB = 2**30

PARTS = ("weights", "copies", "gradients", "optimizer", "activations", "loss", "buckets", "rest")
"""What memory is for. Copies are weights in half precision, for the time of a pass; the loss has logits, a chunk at a
time, and the head's gradient; buckets are gradients on their way to other devices; the rest is what runs it."""

_STATE_BITS = {"adamw": 64.0, "adamw_8bit": 16 + 64 / 256, "paged_adamw_8bit": 16 + 64 / 256}
"""Adam's two moments of a parameter; in 8 bits, each block of 256 has a scale (Dettmers et al. 2022)."""
_FEW = (2, 4)
"""Layers that are gone through."""
_SMALL_STATE = 4096
"""Below so many values bitsandbytes keeps a state in 32 bits."""
_GPU_REST = GIB
"""CUDA's context, the libraries' workspaces, and what the allocator can't fill."""


@dataclass(frozen=True)
class Batch:
    """What a device takes at once."""

    rows: int
    length: int
    """Tokens of a row."""
    answers: int
    """Tokens in all that carry a loss."""
    packed: bool = False
    """A row holds several documents."""


@dataclass(frozen=True)
class Memory:
    """What a training step takes at its peak, on each device."""

    parameters: int
    trained: int
    saved: int
    """Bytes of the weights that a checkpoint holds."""
    state: int
    """Bytes of the optimizer's state that a checkpoint holds."""
    parts: dict[str, int]
    """Bytes by what they are for (see PARTS)."""
    paged: int = 0
    """Of the optimizer's state, what may leave the GPU."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def estimate(config: PretrainedConfig, how: SftConfig, batch: Batch, compute: torch.dtype, *, gpu: bool) -> Memory:
    """The memory of a step of `how` on a model of this shape, computing in `compute`.

    Layers are alike, so a few are gone through, and what each adds is added for the others. Each quarter of the way
    has its own peak, as which of them is the highest depends on how many layers there are. On a GPU a paged state is
    not in the sum, since it gives way.

    Raises:
        UserError: the model can't be built, or needs a library that is missing.
    """
    layers = int(config.num_hidden_layers)
    few, more = (_went(with_layers(config, n), how, batch, compute, gpu=gpu) for n in _FEW)
    each = (layers - _FEW[0]) / (_FEW[1] - _FEW[0])

    def at(first: float, second: float) -> int:
        return round(first + (second - first) * each)

    phases = [
        {part: at(first[part], second[part]) for part in first}
        for first, second in zip(few.phases, more.phases, strict=True)
    ]
    trained, state = at(few.trained, more.trained), at(few.state, more.state)
    paged = state if gpu and how.optimizer.startswith("paged") else 0
    highest = max(phases, key=lambda parts: sum(parts[part] for part in PARTS))
    return Memory(
        parameters=parameters(config),
        trained=trained,
        saved=trained * 4,
        state=state,
        parts={
            **dict.fromkeys(PARTS, 0),
            **highest,
            "weights": at(few.weights, more.weights),
            "optimizer": state - paged,
            "buckets": trained * 4 if (how.devices or 1) > 1 else 0,
            "rest": _GPU_REST if gpu else 0,
        },
        paged=paged,
    )


@dataclass(frozen=True)
class _Went:
    """A few layers' way through a step."""

    phases: list[dict[str, int]]
    weights: int
    trained: int
    state: int


def _went(config: PretrainedConfig, how: SftConfig, batch: Batch, compute: torch.dtype, *, gpu: bool) -> _Went:
    model = student(config, how, compute)
    with _like_a_gpu(model) if gpu else nullcontext(), FakeTensorMode(allow_non_fake_inputs=True):
        furnish(model, torch.device("cpu"))
        with _Allocations(batch.answers) as seen:
            for _ in range(1 if how.accumulation == 1 else 2):  # from the second batch on gradients are there already
                step(model, batch, compute, seen.begins)
    trained = [p for p in model.parameters() if p.requires_grad]
    return _Went(
        seen.peaks({_key(p.grad) for p in trained if p.grad is not None}),
        weights=sum(tensor.untyped_storage().nbytes() for tensor in _own(model)),
        trained=sum(p.numel() for p in trained),
        state=_state(model, how),
    )


class _ByteDropout(nn.Module):
    """Dropout as a GPU does it, which keeps a byte a value; a CPU keeps a float."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, train=True)[0]


@contextmanager
def _like_a_gpu(model: nn.Module) -> Iterator[None]:
    """Keep what a GPU would keep: PEFT asks for CUDA's autocast, whatever the device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout) and module.p:
            model.set_submodule(name, _ByteDropout(module.p))
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def step(model: Any, batch: Batch, compute: torch.dtype, begins: Callable[[str], None] | None = None) -> None:
    """Forward, loss and backward of one batch, on the model's device; `begins` is told what comes next."""
    tell = begins or (lambda _: None)
    tell("activations")
    device, shape = next(model.parameters()).device, (batch.rows, batch.length)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    labels = torch.full(shape, IGNORED, device=device)
    labels.view(-1)[-batch.answers :] = 0
    weights = torch.ones(shape, device=device)
    positions = torch.zeros(shape, dtype=torch.long, device=device) if batch.packed else None
    half = torch.autocast(device.type, compute) if compute == torch.bfloat16 else nullcontext()
    with half:
        states = inner.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        tell("loss")
        loss = chunked_cross_entropy(states, inner.get_output_embeddings().weight, labels, 1.0, weights)
    del states
    tell("backward")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's


@dataclass(frozen=True, slots=True)
class _Event:
    """Something allocated, or (of negative size) freed."""

    storage: int
    size: int
    what: str
    phase: int


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]  # torch's
    """Writes down what is allocated and freed, and for what.

    Answers for the values that fake tensors don't have: how many labels count, and that documents are packed.
    """

    def __init__(self, answers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._answers = answers
        self._now, self._phase = "", -1
        self._live: dict[int, tuple[int, Any]] = {}
        self._events: list[_Event] = []
        self._serial = count()

    def begins(self, what: str) -> None:
        """A phase: what is allocated from now on is for this."""
        self._now = what
        self._phase += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:  # noqa: SLF001  its name
            return False
        given = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            out = args[0].new_empty((self._answers, *args[0].shape[args[1][0].dim() :]))
        else:
            out = func(*args, **(kwargs or {}))
        is_copy = func is aten._to_copy.default and isinstance(args[0], nn.Parameter)  # noqa: SLF001  its name
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (key := _key(made)) not in given and key not in self._live:
                self._add(made, key, "copies" if is_copy else self._now)
        return out

    def _add(self, tensor: Tensor, key: int, what: str) -> None:
        storage = tensor.untyped_storage()
        serial, size = next(self._serial), storage.nbytes()

        def gone(_: Any) -> None:
            self._live.pop(key, None)
            self._events.append(_Event(serial, -size, what, self._phase))

        self._live[key] = (serial, weakref.ref(storage, gone))
        self._events.append(_Event(serial, size, what, self._phase))

    def peaks(self, gradients: set[int]) -> list[dict[str, int]]:
        """Bytes at the peak of each phase, of the backward ones of each half, by what they are for.

        `gradients` are the storages that stayed.
        """
        kept = {serial for key, (serial, _) in self._live.items() if key in gradients}
        halves: list[list[_Event]] = []
        for _, events in groupby(self._events, key=lambda event: event.phase):
            its = list(events)
            halves += [its[: len(its) // 2], its[len(its) // 2 :]]
        found, live, now = [], dict.fromkeys((*PARTS, "backward"), 0), 0
        for half in halves:
            most, peak = now, dict(live)
            for event in half:
                live["gradients" if event.storage in kept else event.what] += event.size
                now += event.size
                if now > most:
                    most, peak = now, dict(live)
            peak["activations"] += peak.pop("backward")
            found.append(peak)
        return found


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  its address: Python's own object may be made anew


def _own(model: nn.Module) -> Iterator[Tensor]:
    """All that a model holds, each once, with what bitsandbytes keeps beside its weights."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        beside = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ()
        for one in (tensor, *beside):
            if _key(one) not in seen:
                seen.add(_key(one))
                yield one


def _state(model: Any, how: SftConfig) -> int:
    """Bytes of the optimizer's state. In 8 bits, embeddings keep 32: their gradients are few and large."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    total = 0.0
    for p in model.parameters():
        if p.requires_grad:
            whole = id(p) in embeddings or p.numel() < _SMALL_STATE
            total += p.numel() * (_STATE_BITS["adamw"] if whole else _STATE_BITS[how.optimizer]) / 8
    return round(total)
