"""Rows of a batch that begin alike, as those of one prompt do: their beginning goes through the model once.

Its keys and values serve all rows, and their gradients add up in it, so the loss is what it would be row by row. Where
there is dropout, all rows have the beginning's in common.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from preceptor.train.loss import IGNORED

_WORTH, _LONG = 1 / 8, 8192
"""Share of a batch's tokens that must be saved: two passes make twice the calls, and the second attends under a mask,
which costs the more the longer rows are: of rows of a quarter of the tokens in `_LONG` a quarter must be saved."""
_TRIED = 16
"""Tokens of the text on which a model is tried."""


def common(ids: Tensor, labels: Tensor) -> int:
    """How many tokens all rows begin with, none of which a label follows; 0 where to share them would save little."""
    rows, length = ids.shape
    ends = (ids != ids[0]) | torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=True)
    shared = int(ends.any(0).int().argmax())
    return shared if shared * (rows - 1) >= rows * length * max(_WORTH, length / _LONG) else 0


def states(model: PreTrainedModel, ids: Tensor, shared: int) -> Tensor:
    """The last layer's states (rows, length - shared, width) of what follows the first `shared` tokens of each row."""
    if not shared:
        whole: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return whole
    cache = DynamicCache()
    model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (each.expand(len(ids), -1, -1, -1) for each in (layer.keys, layer.values))
    after: Tensor = model(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
    return after


@torch.no_grad()
def works(model: PreTrainedModel) -> bool:
    """Whether a model's states are the same so: one that keeps more than keys and values may differ, so it is tried.

    Where positions are turned by how long the text of a call is, they differ beyond some length, so that isn't tried.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return False
    learning, half = model.training, _TRIED // 2
    ids = (torch.arange(2 * _TRIED) % model.config.get_text_config().vocab_size).reshape(2, -1).to(model.device)
    ids[1, :half] = ids[0, :half]
    model.eval()
    try:
        whole, alone, ours = states(model, ids, 0)[:, half:], states(model, ids[:, half:], 0), states(model, ids, half)
    except Exception:  # noqa: BLE001  whatever a model's own code says, the answer is no
        return False
    finally:
        model.train(learning)
    # In half precision the two differ a little; a model that overlooks the beginning differs as much as without it.
    return bool((whole - ours).float().norm() < (whole - alone).float().norm() / 4)
