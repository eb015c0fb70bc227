"""How much each token of an answer counts."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from preceptor.core.errors import UserError
from preceptor.core.records import Row
from preceptor.model import tokens
from preceptor.tasks.diagnosis import fields
from preceptor.train.config import TokenWeights


def token_weights(
    tokenizer: PreTrainedTokenizerBase, row: Row, example: tokens.Example, by: TokenWeights
) -> list[float]:
    """One weight for each token of the example, zero on the prompt.

    A token that stands across a field's border belongs to the field.
    """
    learnt = sum(label != tokens.IGNORED for label in example.labels)
    prompt = [0.0] * (len(example.ids) - learnt)
    if by == TokenWeights():
        return prompt + [1.0] * learnt
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: a tokenizer that can't say where tokens stand; leave out weights")
    text = tokens.learnt(tokenizer, row)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = [(start, end, getattr(by, field)) for field, start, end in fields(text)]
    return [*prompt, *(_weight(place, spans, by.syntax) for place in places), by.syntax]


def _weight(place: Sequence[int], spans: Sequence[tuple[int, int, float]], otherwise: float) -> float:
    start, end = place
    return next((weight for first, last, weight in spans if start < last and first < end), otherwise)
