"""--compile: larger kernels, and on a GPU a single launch for all of them.

A training step of the model is some thousand small kernels. Where the processor starts them more slowly than the GPU
works them off, the GPU waits. torch.compile joins many of them. CUDA graphs, one of the forward and one of the backward
pass, start all the rest at once.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model import NUM_REGIONS, LAMMLoss, LAMMViT
from training.run import Run
from training.step import start_training_mode

TOLERANCE = 0.05  # of the norm of a tensor: both sides run the same kernels, at the most in another order of sums
LEAST = 1e-7  # of the norm of all gradients: what is smaller may be rounding alone


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
        part.forward = compiled_with_gradients(part.forward)


def compiled_with_gradients(forward: Callable) -> Callable:
    """Compiled in training alone: what validation computes, and hence the threshold, is what inference.py computes."""
    compiled = torch.compile(forward)

    @functools.wraps(forward)
    def either(*args):
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    return either


def capture(model: LAMMViT, batch_size: int, dtype: torch.dtype) -> bool:
    """Makes CUDA graphs of the model's forward and backward pass in training mode, for batches of this size.

    They are tried on two batches, against the passes without them. Where they fail or disagree, one warning says so,
    and the model stays as it was. From here on the next batch overwrites the outputs of one. Gradients have to stay
    where they are, zeroed and not set to None: else autograd takes the graph's own tensor as the gradient, and that is
    overwritten, too.

    Args:
        model: in training mode, on a GPU, without hooks.
        dtype: of autocast; float32: none.

    Returns:
        Whether the model runs as graphs.
    """
    device, side, grid = next(model.parameters()).device, model.config.img_size, model.config.grid_size
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side, side, generator=drawn).to(device, memory_format=torch.channels_last)
    masks = torch.rand(batch_size, NUM_REGIONS, grid, grid, generator=drawn).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        expected = of_two_batches(model, images, masks, dtype)  # compiles; what fails here is no matter of graphs
        try:
            with autocast(device, dtype), as_it_was(device):
                # Copies: graphs write into what they were made with
                torch.cuda.make_graphed_callables(model, (images.clone(), masks.clone()), allow_unused_input=True)
            problem = disagreement(of_two_batches(model, images, masks, dtype), expected)
        except Exception as error:  # whatever Triton and the driver raise
            problem = cause(error)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if problem:
        vars(model).pop("forward", None)  # the graphs', which stands before the class's own
        warnings.warn(
            f"training runs without CUDA graphs: {problem}; the same numbers, slower. Please report this",
            RuntimeWarning,
            stacklevel=2,
        )
    else:  # autograd waits for the graphs' stream by itself, and says so
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)
    return not problem


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """As in a step of training, but for the casts of weights, which a graph may not keep from one pass to the next."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


@contextlib.contextmanager
def as_it_was(device: torch.device) -> Iterator[None]:
    """A capture is on this device, and where it fails, its stream does not stay the current one."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        yield


def cause(error: BaseException) -> str:
    """The end of a capture raises for whatever went wrong in it: that is told, too."""
    lines = [f"{type(one).__name__}: {one}".splitlines()[0] for one in (error, error.__context__) if one]
    return ", after ".join(lines)


def of_two_batches(model: nn.Module, images: Tensor, masks: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The logits of a batch, and all gradients of it and of one with the images in another order, added up as a step
    of training does.
    """
    torch.manual_seed(0)  # the same units are dropped each time
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    labels = torch.arange(len(images), device=images.device) % model.config.num_classes
    for pictures in (images.flip(0), images):
        with autocast(images.device, dtype):
            outputs = model(pictures, masks)
        LAMMLoss()(outputs, labels)["total"].backward()
    gradients = {f"the gradient of {name}": parameter.grad for name, parameter in trained.items()}
    return {"the logits": outputs["logits"].detach().clone()} | gradients


def disagreement(values: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """The tensor that differs the most; "" where rounding explains all."""
    norms = torch.stack([right.float().norm() for right in expected.values()])
    errors = torch.stack([(values[name] - right).float().norm() for name, right in expected.items()])
    errors = (errors / norms.clamp(min=LEAST * float(norms[1:].norm()))).tolist()
    # What is not a number stands before all numbers
    error, name = max(zip(errors, expected), key=lambda pair: (pair[0] != pair[0], pair[0]))
    return "" if error <= TOLERANCE else f"{name} differs by {error:.1%}"
