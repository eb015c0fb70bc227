"""Attention over a beginning that all rows of a batch share: once for all of them, beside that over each row's own.

As in Hydragen (arXiv 2402.05099): the queries of all rows go together through one copy of the beginning's keys and
values, all of which they may see. What they find there and what they find in their own row is weighed by what each
softmax sums to. So the copy is read once for a batch rather than once a row, and products are of matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

_NAME = "preceptor_shared"
_TRIED = 16
"""Tokens of the text on which a model is tried."""


def forward(model: PreTrainedModel, beginning: Sequence[tuple[Tensor, Tensor]] | None, **given: Any) -> Tensor:
    """Logits of rows that go on from a beginning, if any, whose keys and values by layer have the shape of one row.

    The cache, the mask and what else is given are of the rows' own tokens; positions count from the beginning's start.
    """
    if beginning is None:
        logits: Tensor = model(**given).logits
        return logits
    config = model.config.get_text_config()
    usual = config._attn_implementation  # noqa: SLF001  the one place where the library looks
    config._attn_implementation = _NAME  # noqa: SLF001  its own setter looks through all modules, and speaks up
    try:
        logits = model(**given, beginning=beginning).logits
    finally:
        config._attn_implementation = usual  # noqa: SLF001  as above
    return logits


@torch.inference_mode()
def served(model: PreTrainedModel) -> bool:
    """Whether it works with a model: no version of the library and no model's code promises it, so it is tried."""
    config = model.config.get_text_config()
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":  # noqa: SLF001  as above
        return False
    half = _TRIED // 2
    ids = torch.arange(_TRIED)[None] * (config.vocab_size // _TRIED)
    own = {"input_ids": ids[:, half:], "position_ids": torch.arange(half, _TRIED)[None], "logits_to_keep": 1}
    try:
        kept = model(input_ids=ids[:, :half], use_cache=True).past_key_values
        whole, alone = model(input_ids=ids, logits_to_keep=1).logits, model(**own).logits
        ours = forward(model, [(layer.keys, layer.values) for layer in kept.layers], **own)
    except Exception:  # noqa: BLE001  whatever it is, it says no
        return False
    # In half precision the two differ a little; a model that overlooks the beginning differs as much as without it.
    return bool((whole - ours).float().norm() < (whole - alone).float().norm() / 4)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    beginning: Sequence[tuple[Tensor, Tensor]],
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """The library's form of attention; `beginning` comes down to it from the model's call."""
    # What `scaled_dot_product_attention` comes to on a CPU; called so, it also tells the log of the softmax's sum.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  its name
    keys, values = beginning[module.layer_idx]
    rows, _, length, width = query.shape
    together = query.transpose(0, 1).reshape(1, keys.shape[1], -1, width)
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    own, own_sum = (
        tensor.unflatten(1, (keys.shape[1], -1))
        for tensor in attention(query, key, value, attn_mask=mask, is_causal=mask is None and length > 1, scale=scaling)
    )
    shared, shared_sum = (
        tensor[0].unflatten(1, (-1, rows, length)).movedim(2, 0)
        for tensor in attention(together, keys, values, scale=scaling)
    )
    weight = (shared_sum - own_sum).sigmoid().to(query.dtype)[..., None]
    return own.lerp(shared, weight).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
