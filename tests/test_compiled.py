"""train.py --compile. Where CUDA graphs belong, a function stands that keeps its tensors as they do."""

import functools
import warnings

import pytest
import torch
from conftest import SMALL
from torch.utils._pytree import tree_flatten, tree_unflatten

import train
from attention import kernels, region_gated_attention, trial
from attention.textbook import textbook_attention
from model import NUM_REGIONS, LAMMViT, LAMMViTConfig
from training import compiled


def model_of(depth: int = 2, **options) -> LAMMViT:
    torch.manual_seed(0)
    return LAMMViT(LAMMViTConfig(img_size=32, patch_size=16, embed_dim=24, depth=depth, mlp_ratio=2.0, **options))


def compile_by(monkeypatch, backend) -> None:
    """module.compile() by this function of a graph, in place of a C++ compiler, which takes a minute."""
    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))


def as_graphs(factor: float = 1.0):
    """What torch.cuda.make_graphed_callables does, but for the graphs: gradients come in the same tensors each time.

    Args:
        factor: of the gradients; other than 1 they are wrong.
    """

    def make(model, inputs, allow_unused_input):
        own, parameters = model.forward, [p for p in model.parameters() if p.requires_grad]
        kept = [torch.empty_like(p) for p in parameters]
        spec = tree_flatten(own(*inputs))[1]

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, images, masks, *_):
                with torch.enable_grad():
                    ctx.outputs = tree_flatten(own(images, masks))[0]
                return tuple(output.detach() for output in ctx.outputs)

            @staticmethod
            def backward(ctx, *grads):
                found = torch.autograd.grad(ctx.outputs, parameters, grads, allow_unused=True)
                for to, gradient in zip(kept, found):
                    to.copy_(torch.zeros_like(to) if gradient is None else factor * gradient)
                return None, None, *(to.detach() for to in kept)

        def forward(images, masks):
            if not model.training:
                return own(images, masks)
            return tree_unflatten(Graphed.apply(images, masks, *parameters), spec)

        model.forward = forward

    return make


def captured(monkeypatch, model: LAMMViT, make) -> bool:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return compiled.capture(model.train(), 4, torch.float32)


@pytest.mark.slow
def test_all_blocks_are_compiled_once(monkeypatch):
    """However many there are; forward and backward give what they give without."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    counts = []
    for depth in (3, 6):
        compile_by(monkeypatch, count)
        graphs.clear()
        model, other = model_of(depth, dropout=0.0), model_of(depth, dropout=0.0)
        compiled.compile_parts(model)
        images, masks = torch.randn(4, 3, 32, 32), torch.rand(4, NUM_REGIONS, 2, 2)
        mine, right = (compiled.of_two_batches(one, images, masks, torch.float32) for one in (model, other))
        for values, expected in zip(mine, right):
            torch.testing.assert_close(values, expected)
        counts.append(len(graphs))
    assert counts[0] == counts[1] <= 4, "one of a block, and LAMM's in the first layer and in the others"


def test_graphs_serve_where_they_agree(monkeypatch):
    """Nothing is said, nothing drawn from the generator, and gradients add up over batches."""
    model, other = model_of(), model_of().train()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captured(monkeypatch, model, as_graphs())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not p.grad.any() for p in model.parameters())
    images, masks = torch.randn(3, 4, 3, 32, 32), torch.rand(3, 4, NUM_REGIONS, 2, 2)
    for one in (model, other):
        torch.manual_seed(1)  # dropout
        for batch in zip(images, masks):
            one(*batch)["logits"].logsumexp(-1).sum().backward()
    for mine, right in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine.grad, torch.zeros_like(right) if right.grad is None else right.grad)
    assert torch.equal(model.eval()(images[0], masks[0])["logits"], other.eval()(images[0], masks[0])["logits"])


def fail(*_, **__):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("make", "message"),
    [(as_graphs(2.0), "their gradients differ by 100.0%"), (fail, "RuntimeError: CUDA error: operation not permitted")],
)
def test_graphs_that_fail_or_differ_are_not_used(monkeypatch, make, message):
    model, other = model_of(), model_of().train()
    with pytest.warns(RuntimeWarning, match=f"^training runs without CUDA graphs: {message}.*Please report") as said:
        assert not captured(monkeypatch, model, make)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    images, masks = torch.randn(4, 3, 32, 32), torch.rand(4, NUM_REGIONS, 2, 2)
    mine, right = (compiled.of_two_batches(one, images, masks, torch.float32) for one in (model, other))
    assert all(map(torch.equal, mine, right))


@pytest.mark.slow
def test_a_run_in_graphs_is_the_run_without(features, tmp_path, monkeypatch):
    """Compiled, and with graphs that keep their gradients in the same tensors: the same log, to rounding. Validation
    is not compiled: its scores, and hence the threshold, are those of inference.py."""
    modes = []

    def note(graph, inputs):
        modes.append(torch.is_grad_enabled())
        return graph.forward

    def compile_run(run):
        compiled.compile_parts(run.model)
        train.start_training_mode(run)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", as_graphs())
        run.is_captured = compiled.capture(run.model, run.args.batch_size, run.dtype)

    def fit(name, *more):
        options = ("--features", features, *SMALL, "--output_dir", tmp_path / name, "--epochs", 2, "--seed", 3, *more)
        train.main(train.get_args_parser().parse_args(list(map(str, options))))
        return torch.load(tmp_path / name / "best_model.pth", weights_only=True)

    plain = fit("plain")
    compile_by(monkeypatch, note)
    monkeypatch.setattr(train, "compile_run", compile_run)
    in_graphs = fit("graphs", "--compile")
    assert modes and all(modes)
    for name, values in plain["model"].items():
        torch.testing.assert_close(in_graphs["model"][name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # torch's compiler is imported
def test_kernels_that_failed_their_trial_are_in_no_compiled_graph(monkeypatch):
    """Nothing can be tried while a graph is made: what is known from before decides."""
    monkeypatch.setattr(kernels, "takes", lambda q: True)
    monkeypatch.setattr(kernels, "forward", None)
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    gates = torch.rand(1, 2, 9), torch.rand(1, 2), torch.rand(1, 2)
    attend = torch.compile(region_gated_attention, backend="eager")
    failed = set()
    monkeypatch.setattr(trial, "FAILED", failed)
    monkeypatch.setattr("attention.FAILED", failed)
    trial.kernels_serve.cache_clear()
    with pytest.warns(RuntimeWarning, match="the attention kernels cannot be used"):
        assert not trial.kernels_serve(torch.device("cpu"), torch.float32)
    trial.kernels_serve.cache_clear()
    assert torch.equal(attend(q, k, v, *gates), textbook_attention(q, k, v, *gates))
