"""Where processors differ: the one place that asks what kind of device there is."""

import os
import shutil

import torch


def pick_device() -> torch.device:
    """The GPU if this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The type for mixed precision on `device`; float32 where a narrower one would only be emulated.

    Training in float16, which GPUs older than Ampere get, needs ``torch.amp.GradScaler``; bfloat16 does not.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Intel Cooper Lake, AMD Zen 4 and later; elsewhere bfloat16 is slower than float32.
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def ddp_backend(device: torch.device) -> str:
    """The ``torch.distributed`` backend for workers on such devices."""
    return "nccl" if device.type == "cuda" else "gloo"


def pins_memory(device: torch.device) -> bool:
    """Whether batches reach `device` sooner from page-locked memory."""
    return device.type == "cuda"


def frames_per_pass(device: torch.device, frames: int) -> int:
    """How many of `frames` to take through the network at a time.

    On a CPU one: the feature maps of eight ResNet-101 frames leave the caches and the allocator's free lists, and
    were measured to take 2.7 times as long a frame.
    """
    return 1 if device.type == "cpu" else max(frames, 1)


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` has what it needs: a C++ compiler for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return bool(torch.utils._triton.has_triton())
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
