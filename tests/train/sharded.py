"""The command on CPUs that pass for GPUs: weights are shared as among GPUs, through gloo.

accelerate shares weights among GPUs alone, and on CPUs goes on with whole copies, in silence. All that is
changed is what it takes the CPUs for; what shares the weights is the libraries' own.
"""

import os

import torch.distributed
from accelerate import DistributedType, PartialState

from preceptor.__main__ import main


def _as_gpus(*_: object) -> tuple[str, DistributedType]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, for minutes
    PartialState._prepare_backend = _as_gpus
    main()
