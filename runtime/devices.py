"""Where a model runs: the device of a process, and its precision."""

import os

import psutil
import torch


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


def backend_for(device: torch.device) -> str:
    """What the processes of torchrun talk through. Votes and text go over the CPU, whatever the device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def memory_gb(device: torch.device) -> float:
    """The most that this process took of the GPU, or what it has now of the machine's memory; in 10⁹ bytes."""
    return (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    ) / 1e9
