"""Several processes that a launcher started for one run: the first decides and speaks, the others follow.

They meet in the launcher's store, so nothing is agreed over devices before training begins, and it outlives them.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any

from preceptor.core.errors import UserError

if TYPE_CHECKING:  # it loads pydantic, and `preceptor --help` loads this
    from preceptor.train.config import SftConfig

_PATIENCE = timedelta(days=1)
"""The launcher ends those who wait for one that is gone, so this is never waited for."""
_numbers = count()


def size() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; the first is 0."""
    return int(os.environ.get("RANK", "0"))


def sharding() -> str:
    """How the launcher wants the weights to be shared among the devices: `FSDP2`, `ZeRO-2`; nothing where each has all.

    Raises:
        UserError: in a way that isn't known here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("the launcher's configuration: set fsdp_version: 2, as recipes/launch/fsdp2.yaml does")
        return "FSDP2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        if find_spec("deepspeed") is None:
            raise UserError("the launcher's configuration needs DeepSpeed: pip install 'preceptor[deepspeed]'")
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return ""


def check(config: "SftConfig") -> None:
    """Hold a configuration against how weights are shared.

    Raises:
        UserError: they don't go together.
    """
    how = sharding()
    split = how in ("FSDP2", "ZeRO-3")
    if split and config.method == "qlora":
        raise UserError(f"method: qlora: {how} would copy the 4-bit weights to each GPU; use method: lora, or ddp.yaml")
    if how and config.optimizer != "adamw":
        raise UserError(f"optimizer: {config.optimizer} doesn't know shared weights, as {how} has them; use adamw")
    if split and config.compile:
        raise UserError(f"compile: was not made for weights that {how} gathers layer by layer; leave it out")
    if config.gradient_checkpointing and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        raise UserError(
            "gradient_checkpointing: the launcher's configuration sets fsdp_activation_checkpointing too; drop one"
        )


def agree(decide: Callable[[], str]) -> str:
    """What the first process decides. Where it can't, it raises, and the others end with its exit code, in silence."""
    if size() == 1:
        return decide()
    key = f"decision {next(_numbers)}"
    if rank():
        told = json.loads(_store().get(key))
        if "exit" in told:
            raise SystemExit(told["exit"])
        return str(told["decision"])
    try:
        decision = decide()
    except Exception as error:
        _store().set(key, json.dumps({"exit": 2 if isinstance(error, UserError) else 1}))
        raise
    _store().set(key, json.dumps({"decision": decision}))
    return decision


def fails_first() -> bool:
    """Whether no other process has failed before: the first failure is the cause of those that follow."""
    if size() == 1:
        return True
    try:
        return bool(_store().add("failures", 1) == 1)
    except RuntimeError:  # the launcher is gone
        return rank() == 0


def leave() -> None:
    """Take leave of the others after work that went well."""
    if size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@cache
def _store() -> Any:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return PrefixStore("preceptor", store)
