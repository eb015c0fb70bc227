"""An adapter becomes part of its base, and what comes of it says what the adapter said, or is refused.

Two ways are known to end silently in another model: a merge into weights in 4 bits, and an adapter of an embedding
that the head shares, which would move the head too. The first is refused, the second is untied first, and whatever
else goes wrong shows in what the model says.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preceptor.core.errors import UserError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""Largest divergence, in nats a token, by the dtype of the merged weights.

Measured on both embedded students, with adapters that moved what they say by .15 to 5.3: float32 gives at most 1e-8;
bfloat16, in which the last bits of W + BA are lost, .0002 to .003, and .005 with activations in bfloat16 too. A base in
4 bits gives .12 to .7, an adapter counted half or twice .07 to 3.6, one left out .15 to 5.3. Where an adapter moved so
little that leaving it out would pass, nothing is lost by it.
"""

_PROBE = (
    "性别：男\n年龄：58岁\n主诉：发热3天，咳嗽，无胸痛。\n既往史：高血压10年。\n"
    '{"diseases": ["肺炎"], "reason": ["发热3天", "咳嗽"]}\n'
    "A 58-year-old man has had a fever of 38.6 for 3 days with a dry cough; no chest pain. High blood pressure.\n"
    '{"diseases": ["pneumonia"], "reason": ["a fever of 38.6 for 3 days", "a dry cough"]}\n'
)
"""What models are compared on: both languages, records and answers."""


@dataclass(frozen=True)
class Merged:
    """A base with its adapter in its weights."""

    model: PreTrainedModel
    reference: Tensor
    """What base and adapter said apart, as `log_probs`."""
    divergence: float


def check_base(base: Path, adapter: Path) -> None:
    """Refuse a base that is stored in few bits: an adapter merged into such weights would be rounded as they are."""
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise UserError(
            f"{adapter}: its base {base} is quantised, and an adapter merged into that would answer otherwise; name "
            "the full-precision model as base_model_name_or_path in adapter_config.json"
        )


def merge(model: Any, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> Merged:
    """The model under its adapter (a `PeftModel`) as one; each weight is added up in float32 and rounded once.

    Raises:
        UserError: the kind of adapter has no weights to add, they are damaged, or the result says something else.
    """
    kind = model.active_peft_config.peft_type.value
    if model.active_peft_config.is_prompt_learning:
        raise UserError(f"{adapter}: an adapter of the kind {kind} has no weights to merge; train a LoRA instead")
    reference = log_probs(model.eval(), tokenizer)
    if not reference.isfinite().all():
        raise UserError(f"{adapter}: what it says is no number: its weights are damaged; fetch or train it again")
    _untie(model.get_base_model())
    try:
        with warnings.catch_warnings(action="ignore"):  # of what was just mended
            merged = model.merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{adapter}: this {kind} adapter can't be merged ({why}); train one that can") from error
    return Merged(merged, reference, check(reference, merged, tokenizer, adapter))


def check(reference: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> float:
    """The divergence of a merged model from its adapter.

    Raises:
        UserError: it is above the tolerance of the model's dtype.
    """
    found, most = divergence(reference, log_probs(model, tokenizer)), TOLERANCE[model.dtype]
    if not found <= most:  # nor is a NaN
        raise UserError(
            f"{adapter}: merged into its base it says something else: {found:.2g} nats a token apart, where at most "
            f"{most:g} is rounding; use base and adapter apart, or train an adapter of the linear layers alone"
        )
    return found


def log_probs(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What a model says of a text in both languages: log-probabilities, (tokens, vocabulary), in float32."""
    ids = tokenizer(_PROBE, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)


def divergence(left: Tensor, right: Tensor) -> float:
    """Kullback-Leibler divergence of `right` from `left`, both from `log_probs`: the mean over tokens, in nats."""
    return max(0.0, float((left.exp() * (left - right)).sum(-1).mean())) if right.isfinite().all() else float("nan")


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own where an adapter changes those that it shares with the embedding.

    Unmerged, the adapter of one leaves the other as it was; the configuration follows when they are merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # a second to import

    layers = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    embedding, head = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
