"""A model of a given shape without contents, as it would be trained: to count, to go through, to time."""

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from preceptor.core.errors import UserError
from preceptor.train.config import SftConfig
from preceptor.train.dropout import residual_dropout


def shape(said: Path | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a model's folder, or of its values.

    Raises:
        OSError, ValueError: there is none that can be read.
    """
    if isinstance(said, Path):
        return AutoConfig.from_pretrained(said, trust_remote_code=False, local_files_only=True)
    return AutoConfig.for_model(**said)


def parameters(config: PretrainedConfig) -> int:
    """Parameters of a model of this shape; shared ones count once."""
    return sum(p.numel() for p in _build(config, torch.float32).parameters())


def student(config: PretrainedConfig, how: SftConfig, compute: torch.dtype) -> Any:
    """The model that `how` would train, without contents, on the device `meta`."""
    model = _build(config, torch.float32 if how.method == "full" else compute)
    student = model
    if how.method != "full":
        from peft import get_peft_model  # a second to import

        if how.method == "qlora":
            _quantise(model, compute)
        with torch.device("meta"):
            student = get_peft_model(model, how.adapter())
    elif how.dropout:
        residual_dropout(model, how.dropout)
    if how.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return student.train()


def furnish(model: nn.Module, device: torch.device) -> None:
    """Give a model of `meta` tensors some of its own on the device, all of the same small number."""
    made: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.full_like(tensor, 0.01, device=device)
        return made[id(tensor)]

    for module in model.modules():
        for name, old in module._parameters.items():  # noqa: SLF001  `to_empty` can't make fake ones
            if old is None:
                continue
            if id(old) not in made:
                new = nn.Parameter(real(old), requires_grad=old.requires_grad)
                new.__dict__.update(old.__dict__)
                made[id(old)] = new
                if state := getattr(new, "quant_state", None):
                    for part in (state, state.state2):
                        part.absmax, part.code = real(part.absmax), real(part.code)
                    state.offset = real(state.offset)
            module._parameters[name] = made[id(old)]  # type: ignore[assignment]  # noqa: SLF001  as above
        for name, buffer in module._buffers.items():  # noqa: SLF001  as above
            module._buffers[name] = None if buffer is None else real(buffer)  # noqa: SLF001  as above


def with_layers(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The shape with another number of layers."""
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = number
    if kinds := getattr(config, "layer_types", None):
        fewer.layer_types = [kinds[at % len(kinds)] for at in range(number)]
    return fewer


def _build(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
            model.tie_weights()
            return model
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{config.model_type}: no such model can be built: {str(error).splitlines()[0]}") from error


def _quantise(model: Any, compute: torch.dtype) -> None:
    """Linear layers but the head in nf4 with quantised scales, as bitsandbytes packs them."""
    try:
        functions: Any = importlib.import_module("bitsandbytes.autograd._functions")
        state_of: Any = importlib.import_module("bitsandbytes.functional").QuantState
        base: Any = importlib.import_module("bitsandbytes.nn").Linear4bit
    except ImportError as error:
        raise UserError("method: qlora needs bitsandbytes, which is not installed: pip install bitsandbytes") from error

    class Packed(base):  # type: ignore[misc]  # its types aren't read
        """Its own parameters can't be fake tensors, so they are plain ones here."""

        def __init__(self, linear: nn.Linear) -> None:
            nn.Module.__init__(self)
            values = linear.weight.numel()
            blocks = -(-values // 64)
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
            self.compute_dtype = compute
            packed: Any = nn.Parameter(torch.empty((values + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
            packed.compress_statistics, packed.quant_type = True, "nf4"
            outer = {"absmax": torch.empty(-(-blocks // 256)), "code": torch.empty(256), "blocksize": 256}
            packed.quant_state = state_of(
                absmax=torch.empty(blocks, dtype=torch.uint8),
                shape=linear.weight.shape,
                code=torch.empty(16),
                blocksize=64,
                quant_type="nf4",
                dtype=compute,
                offset=torch.empty(()),
                state2=state_of(**outer, dtype=torch.float32),
            )
            self.weight = packed

        def forward(self, x: Tensor) -> Tensor:
            state = self.weight.quant_state
            product: Tensor = functions.MatMul4Bit.apply(x.to(compute), self.weight, None, self.bias, state)
            return product.to(x.dtype)

    head = model.get_output_embeddings()
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                model.set_submodule(name, Packed(module))
    model.is_loaded_in_4bit = True
