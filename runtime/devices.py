"""Where a model runs: the device of a process, its memory, and its precision."""

import contextlib
import ctypes
import os
import time

import psutil
import torch
import torch.nn.functional as F

LEAST_WIDTH_FOR_BF16 = 384  # of a model on a CPU: in narrower ones the casts cost what the products save
LEAST_GAIN = 1.3  # of speed, for which bf16's coarser numbers are taken on a CPU
# glibc's malloc.h: no block of memory apart from the heap, which is never trimmed, and grows by 64 MB
M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = (-4, 0), (-1, -1), (-2, 64 * 2**20)


def pick_device(name: str) -> torch.device:
    """ "auto" -> the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: this machine has no GPU that torch can use; leave the option away to use the CPU"
        )
    return device


def pick_process_device(name: str) -> torch.device:
    """The device of this process: under torchrun, a GPU of its own."""
    device = pick_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {device.index + 1} processes or more, but there are {torch.cuda.device_count()}"
                " GPUs; lower --nproc_per_node, or give --device cpu"
            )
        torch.cuda.set_device(device)
    return device


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, this process keeps the memory of tensors that it frees, for the next ones.

    Else the memory of each large tensor goes back to the system, and the next one's comes page by page, filled with
    zeros: a twentieth to a third of a training step. The process takes a few percent more at its peak. Without glibc
    all stays as it is.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD):
            libc.mallopt(option, value)


def backend_for(device: torch.device) -> str:
    """What the processes of torchrun talk through. Votes and text go over the CPU, whatever the device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def pick_precision(name: str, device: torch.device, width: int) -> torch.dtype:
    """ "auto" -> bf16 on a GPU that has it, else fp16; on a CPU bf16 where that pays for a model of this width."""
    if name == "auto" and device.type == "cpu":
        name = "bf16" if bf16_pays(width) else "fp32"
    elif name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@torch.inference_mode()
def bf16_pays(width: int) -> bool:
    """Whether this CPU multiplies matrices of a model of this width clearly faster in bfloat16, and rightly.

    CPUs with AMX or AVX512_BF16 do; others take many times as long as in single precision. It is tried once, on the
    first matrix of an MLP and four images, in a few hundredths of a second.
    """
    has_onednn = torch.backends.mkldnn.is_available()
    if width < LEAST_WIDTH_FOR_BF16 or not has_onednn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    tokens, matrix = (torch.randn(rows, width, generator=generator) for rows in (800, 4 * width))

    def seconds(dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        x, w, best = tokens.to(dtype), matrix.to(dtype), float("inf")
        for _ in range(4):
            started = time.perf_counter()
            product = F.linear(x, w)
            best = min(best, time.perf_counter() - started)
        return best, product.float()

    (single, right), (half, product) = seconds(torch.float32), seconds(torch.bfloat16)
    error = (product - right).norm() / right.norm()
    return bool(half < single / LEAST_GAIN and error < 0.01)


def memory_gb(device: torch.device) -> float:
    """The most that this process took of the GPU, or what it has now of the machine's memory; in 10⁹ bytes."""
    return (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    ) / 1e9
