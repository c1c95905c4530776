"""--compile: larger kernels, and on a GPU a single launch for all of them.

A training step of the model is some thousand small kernels. Where the processor starts them more slowly than the GPU
works them off, the GPU waits. torch.compile joins many of them. CUDA graphs, one of the forward and one of the backward
pass, start all the rest at once.
"""

import warnings

import torch
from torch import Tensor, nn

from model import NUM_REGIONS, LAMMLoss, LAMMViT
from training.run import Run
from training.step import start_training_mode

TOLERANCE = 0.05  # of the norm: what another order of sums in bfloat16 does over all blocks


def compile_run(run: Run) -> None:
    """--compile. CUDA graphs are for one process: DistributedDataParallel has to see each gradient when it is there."""
    compile_parts(run.model)
    if run.world == 1 and run.device.type == "cuda" and run.fed is run.model:
        start_training_mode(run)
        run.is_captured = capture(run.model, run.args.batch_size, run.dtype)


def compile_parts(model: LAMMViT) -> None:
    """Each block, and LAMM, compiled for itself.

    All blocks are one code, which is compiled once: seconds, where the whole model takes minutes.
    """
    for part in filter(None, (*model.blocks, model.lamm)):
        part.compile()


def capture(model: LAMMViT, batch_size: int, dtype: torch.dtype) -> bool:
    """Makes CUDA graphs of the model's forward and backward pass in training mode, for batches of this size.

    They are tried on one batch, against the passes without them. Where they fail or disagree, one warning says so, and
    the model stays as it was. From here on gradients have to stay where they are, zeroed and not set to None: autograd
    would take over the graph's own tensor as the gradient, which the next batch overwrites.

    Args:
        model: in training mode, on a GPU, without hooks.
        dtype: of autocast; float32: none.

    Returns:
        Whether the model runs as graphs.
    """
    device, side, grid = next(model.parameters()).device, model.config.img_size, model.config.grid_size
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side, side, generator=drawn).to(device)
    masks = torch.rand(batch_size, NUM_REGIONS, grid, grid, generator=drawn).to(device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            expected = of_two_batches(model, images, masks, dtype)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                # Copies: graphs write into what they were made with
                torch.cuda.make_graphed_callables(model, (images.clone(), masks.clone()), allow_unused_input=True)
            problem = disagreement(of_two_batches(model, images, masks, dtype), expected)
    except Exception as error:  # whatever torch's compiler, Triton and the driver raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if problem:
        vars(model).pop("forward", None)  # the graphs', which stands before the class's own
        warnings.warn(
            f"training runs without CUDA graphs: {problem}; the same numbers, slower. Please report this",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


def of_two_batches(model: nn.Module, images: Tensor, masks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits of a batch, and all gradients in a row, of this batch and of one with the images in another order,
    added up as a step of training does.
    """
    torch.manual_seed(0)  # the same units are dropped each time
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    labels = torch.arange(len(images), device=images.device) % model.config.num_classes
    for pictures in (images.flip(0), images):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(pictures, masks)
        LAMMLoss()(outputs, labels)["total"].backward()
    return outputs["logits"].detach().float(), torch.cat([parameter.grad.flatten() for parameter in trained])


def disagreement(values: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """How far logits and gradients are from others; "" where rounding explains it."""
    for name, mine, right in zip(("logits", "gradients"), values, expected):
        error = float((mine - right).norm() / right.norm())
        if not error <= TOLERANCE:  # not a number, too
            return f"their {name} differ by {error:.1%}"
    return ""
