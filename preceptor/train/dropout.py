"""Dropout for a model that learns in all its weights, of whose families most have none of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.core.errors import UserError

_LAST = ("o_proj", "down_proj")
"""What attention and the perceptron of a layer end in."""


def residual_dropout(model: PreTrainedModel, share: float) -> None:
    """As the model learns, leave out that share of what each half of a layer adds to the stream (Vaswani et al. 2017).

    Raises:
        UserError: its layers are built of other parts.
    """

    def drop(half: nn.Module, _given: Any, added: Tensor) -> Tensor:
        if not half.training:
            return added
        left: Tensor = torch.native_dropout(added, share, train=True)[0]  # keeps a byte a value, on every device
        return left

    ends = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _LAST]
    if len(ends) != len(_LAST) * model.config.get_text_config().num_hidden_layers:
        raise UserError(f"dropout: the layers of a {model.config.model_type} are built otherwise; leave it out")
    for half in ends:
        half.register_forward_hook(drop)
