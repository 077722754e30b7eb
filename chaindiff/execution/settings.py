"""What torch is told on CUDA, for training and sampling alike; said in the metadata of what was trained."""

from __future__ import annotations

import torch

SETTINGS = {
    "tf32": False,  # float32 is float32: samples agree with the CPU's; bf16 is the fast precision, and is asked for
    "cudnn_benchmark": True,  # batches have one shape, so that the fastest convolution is looked for once
}


def settle() -> None:
    """Tell torch; nothing changes on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = SETTINGS["tf32"]
    torch.backends.cudnn.benchmark = SETTINGS["cudnn_benchmark"]
