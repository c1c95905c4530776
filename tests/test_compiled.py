"""train.py --compile. Where CUDA graphs belong, a function stands that keeps its tensors as they do."""

import functools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, error_line, run_script
from test_train import NOT_FINITE, spoil
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
    """torch.compile with this function of a graph, in place of a C++ compiler, which takes a minute."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def as_graphs(**wrong: float):
    """What torch.cuda.make_graphed_callables does, but for the graphs: inputs, outputs and gradients lie in the same
    tensors each time.

    Args:
        wrong: factors of gradients, by the end of a parameter's name.
    """

    def make(model, inputs, allow_unused_input):
        assert allow_unused_input and not torch.is_autocast_cache_enabled()
        own, named = model.forward, {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors = [next((wrong[end] for end in wrong if name.endswith(end)), 1) for name in named]
        parameters, kept = list(named.values()), [torch.empty_like(p) for p in named.values()]
        shown, spec = tree_flatten(own(*inputs))
        shown = [output.detach() for output in shown]
        for held in inputs:
            held.zero_()

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, images, masks, *_):
                for held, given in zip(inputs, (images, masks)):
                    held.copy_(given)
                with torch.enable_grad():
                    ctx.outputs = tree_flatten(own(*inputs))[0]
                return tuple(to.copy_(output.detach()).detach() for to, output in zip(shown, ctx.outputs))

            @staticmethod
            def backward(ctx, *grads):
                found = torch.autograd.grad(ctx.outputs, parameters, grads, allow_unused=True)
                for to, gradient, factor in zip(kept, found, factors):
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
    compile_by(monkeypatch, count)
    for depth in (3, 6):
        torch.compiler.reset()
        graphs.clear()
        model, other = model_of(depth, dropout=0.0), model_of(depth, dropout=0.0)
        compiled.compile_parts(model)
        images, masks = torch.randn(4, 3, 32, 32), torch.rand(4, NUM_REGIONS, 2, 2)
        mine, right = (compiled.of_two_batches(one, images, masks, torch.float32) for one in (model, other))
        torch.testing.assert_close(mine, right)
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
    try:
        raise ValueError("not while capturing\nand more")
    finally:
        raise RuntimeError("the capture has failed\nand more")  # as the end of a capture does


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (as_graphs(**{"": 2.0}), "the gradient of .* differs by 100.0%"),
        (as_graphs(**{"lamm.base_theta": 0.0}), "the gradient of lamm.base_theta differs by 100.0%"),
        (as_graphs(**{"eye_forehead": 0.9}), "the gradient of .*eye_forehead differs by 10.0%"),
        (as_graphs(**{"head.bias": float("nan")}), "the gradient of head.bias differs by nan%"),
        (fail, "RuntimeError: the capture has failed, after ValueError: not while capturing"),
    ],
)
def test_graphs_that_fail_or_differ_are_not_used(monkeypatch, make, message):
    model, other = model_of(), model_of().train()
    with pytest.warns(RuntimeWarning, match=f"^training runs without CUDA graphs: {message}; .*Please report") as said:
        assert not captured(monkeypatch, model, make)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    images, masks = torch.randn(4, 3, 32, 32), torch.rand(4, NUM_REGIONS, 2, 2)
    mine, right = (compiled.of_two_batches(one, images, masks, torch.float32) for one in (model, other))
    assert all(torch.equal(mine[name], right[name]) for name in right)


def test_logits_that_differ_are_noticed():
    right = {"the logits": torch.ones(4, 2), "the gradient of x": torch.ones(3), "of y": torch.full((3,), 1e-10)}
    assert compiled.disagreement(right, right) == ""
    assert compiled.disagreement(right | {"of y": torch.zeros(3)}, right) == "", "rounding alone"
    assert compiled.disagreement(right | {"the logits": torch.zeros(4, 2)}, right) == "the logits differs by 100.0%"
    assert compiled.disagreement(right | {"the gradient of x": 1.04 * torch.ones(3)}, right) == ""
    assert "differs by 6.0%" in compiled.disagreement(right | {"the gradient of x": 1.06 * torch.ones(3)}, right)


@pytest.mark.parametrize(
    ("device", "world", "is_cached", "expected"),
    [("cuda", 1, False, True), ("cpu", 1, False, False), ("cuda", 2, False, False), ("cuda", 1, True, False)],
)
def test_graphs_are_for_one_process_on_a_gpu(monkeypatch, device, world, is_cached, expected):
    """And made in the mode of training, in which frozen blocks drop nothing; compiled it is everywhere."""
    model, seen = model_of().eval(), []
    model.blocks[0].requires_grad_(False)
    monkeypatch.setattr(torch, "compile", lambda forward: seen.append(forward.__self__) or forward)

    def capture(captured, batch_size, dtype):
        assert (captured, batch_size, dtype) == (model, 8, torch.bfloat16)
        assert [model.training, *(block.training for block in model.blocks)] == [True, False, True]
        return True

    monkeypatch.setattr(compiled, "capture", capture)
    run = SimpleNamespace(model=model, fed=None if is_cached else model, trained=model, world=world, is_captured=False)
    run.device, run.args, run.dtype = torch.device(device), SimpleNamespace(batch_size=8), torch.bfloat16
    compiled.compile_run(run)
    assert seen == [*model.blocks, model.lamm] and run.is_captured is expected


def in_graphs(monkeypatch, backend) -> None:
    """From here on train.py --compile is as on a GPU, but for the compiler and the graphs."""
    real = compiled.compile_run

    def compile_run(run):
        device, run.device = run.device, torch.device("cuda")
        real(run)
        run.device = device
        assert run.is_captured

    compile_by(monkeypatch, backend)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", as_graphs())
    monkeypatch.setattr(train, "compile_run", compile_run)


@pytest.mark.slow
def test_a_run_in_graphs_is_the_run_without(features, tmp_path, monkeypatch):
    """To rounding. Validation is not compiled: its scores, and hence the threshold, are those of inference.py."""
    modes = []

    def note(graph, inputs):
        modes.append(torch.is_grad_enabled())
        return graph.forward

    def fit(name, *more):
        options = ("--features", features, *SMALL, "--output_dir", tmp_path / name, "--epochs", 2, "--seed", 3, *more)
        train.main(train.get_args_parser().parse_args(list(map(str, options))))
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return log, torch.load(tmp_path / name / "best_model.pth", weights_only=True)["model"]

    log, weights = fit("plain")
    in_graphs(monkeypatch, note)
    log_in_graphs, weights_in_graphs = fit("graphs", "--compile")
    assert modes and all(modes)
    assert log_in_graphs == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in log]
    for name, values in weights.items():
        torch.testing.assert_close(weights_in_graphs[name], values, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(train, "compile_run", None)
    assert fit("graphs", "--compile", "--resume")[0] == log_in_graphs, "nothing is compiled for a run that is finished"


@pytest.mark.slow
def test_a_sample_that_is_not_finite_is_named_in_graphs_too(features, tmp_path, monkeypatch):
    """Each batch's logits are its own, whatever comes after it in a step."""
    path = spoil(features, tmp_path / "spoilt", "fake/OffAxisMouth", 5)
    in_graphs(monkeypatch, lambda graph, inputs: graph.forward)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FloatingPointError) as error:
        train.main(train.get_args_parser().parse_args([*NOT_FINITE, "--compile"]))
    assert f"not finite with {path}; " in str(error.value)


def test_a_compiler_that_fails_is_told_in_a_line(features, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    compile_by(monkeypatch, broken)
    done = run_script("train.py", "--features", features, *SMALL, "--compile", cwd=tmp_path, expect=1)
    line = error_line(done)
    assert line.startswith("--compile: backend='broken' raised: RuntimeError: Failed to find C compiler. Please")
    assert line.endswith("; without --compile it trains, more slowly")


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
