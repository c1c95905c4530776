"""attention: every path agrees with the formula, forward and backward, with and without dropout; nothing of N x N is
kept.
"""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import attention
from attention import blocked, force_path, kernels, layout, region_gated_attention, trial
from attention import dropout as attention_dropout
from attention.dropout import dropout, keep_mask, random_keys
from attention.textbook import textbook_attention
from model import LAMMLoss, LAMMViT, LAMMViTConfig

NAMES = ("output", "grad q", "grad k", "grad v", "grad masks", "grad lam", "grad theta")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CUDA = torch.cuda.is_available()
triton_needed = pytest.mark.skipif(kernels.triton is None, reason="no Triton for this system")


@pytest.fixture(autouse=True, scope="module")
def interpreter_multiplies_bfloat16():
    """Triton's interpreter takes the bits of a bfloat16 operand for an integer: NumPy has no such type. Here they are
    widened first.
    """
    if kernels.triton is None or CUDA:
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    def widened(self, a, b, *rest):
        return dot(
            self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    dot, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, widened
    yield
    InterpreterBuilder.create_dot = dot


def arguments(B: int, H: int, N: int, Dh: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, masks, lam, theta. q, k and v as a linear layer gives them, so not contiguous."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(B, N, 3, H, Dh, generator=g).to(dtype).unbind(2))
    gates = [torch.randn(B, H, N, generator=g), 3 * torch.rand(B, H, generator=g), torch.randn(B, H, generator=g)]
    return [q, k, v, *(x.to(torch.promote_types(dtype, torch.float32)) for x in gates)]


def output_and_gradients(function, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def assert_agrees(path: str, tensors: list[torch.Tensor], precision: torch.dtype = torch.float64) -> None:
    """`path` on these tensors agrees with the formula, computed in `precision` on the same numbers: output and all
    gradients.
    """
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    expected = output_and_gradients(textbook_attention, [x.to(precision) for x in tensors], grad)
    device = "cuda" if path == "triton" and CUDA else "cpu"
    with force_path(path):
        got = output_and_gradients(region_gated_attention, [x.to(device) for x in tensors], grad.to(device))
    scale = max(x.norm() / math.sqrt(x.numel()) for x in expected[:4])  # what counts as 0, as do gradients where N = 1
    for name, ours, theirs in zip(NAMES, got, expected):
        error = (ours.cpu().to(precision) - theirs).norm()
        limit = TOLERANCE[tensors[0].dtype] * max(theirs.norm(), 0.1 * scale * math.sqrt(theirs.numel()))
        assert error <= limit, f"{name}: {error} of {theirs.norm()}"
    for ours, tensor in zip(got[1:], tensors):
        assert ours.dtype == tensor.dtype


SHAPES = list(product((1, 3), (1, 2, 5, 197, 257), (4, 16, 64, 80)))  # B, N, Dh
LARGE = ((3, 1, 4), (3, 2, 64), (3, 5, 16), (1, 197, 4), (1, 197, 64), (1, 257, 80))
# The interpreter is slow
INTERPRETED = [
    *product((1,), (1, 2, 5), (4, 16, 64, 80)),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in LARGE),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("B, N, Dh", SHAPES)
def test_blocked_agrees(B, N, Dh, dtype):
    assert_agrees("blocked", arguments(B, 12, N, Dh, dtype))


@triton_needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, N, Dh", SHAPES if CUDA else INTERPRETED)
def test_kernels_agree(B, N, Dh, dtype):
    assert_agrees("triton", arguments(B, 12 if CUDA else 6 if N <= 5 else 1, N, Dh, dtype))


PATHS = ["blocked", pytest.param("triton", marks=triton_needed)]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "heads last": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "every other": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
    "one for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(path, layout):
    tensors = arguments(2, 2, 37, 16)
    assert_agrees(path, [LAYOUTS[layout](x) for x in tensors[:3]] + tensors[3:])
    # masks, lam and theta not contiguous
    assert_agrees(path, tensors[:3] + [torch.stack([x, x], -1)[..., 0] for x in tensors[3:]])


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # the interpreter's: σ of a large negative number is 0
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lam", [0.0, 1e-6, 50.0, 1e4, 1e30])
@pytest.mark.parametrize("masks", ["random", "zero", "binary"])
def test_extreme_gates(path, lam, masks):
    q, k, v, M, _, theta = arguments(1, 2, 40, 16)
    # Numbers of few digits: M_i M_j is exact then, and a GPU, which rounds M_i M_j − θ once, gets the same
    M, theta = M.bfloat16().float(), theta.bfloat16().float()
    M = {"random": M, "zero": torch.zeros_like(M), "binary": (M > 0).float()}[masks]
    # The formula itself, in float32, is 1e-3 away from float64 where λ is 1e4: M_i M_j − θ is rounded, then made 1e4
    # times as large
    assert_agrees(path, [q, k, v, M, torch.full((1, 2), lam), theta], torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_large_scores_do_not_overflow(path):
    q, k, *rest = arguments(1, 2, 20, 16)
    with force_path(path):
        out = region_gated_attention(
            *(x.to("cuda" if path == "triton" and CUDA else "cpu") for x in (100 * q, 100 * k, *rest))
        )
    assert out.isfinite().all()


@pytest.mark.parametrize("elements", [1, 200, 2000, 5000])  # one row; rows of one head; one head; heads of one sample
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_result_does_not_depend_on_the_pieces(elements, dropout_p, monkeypatch):
    tensors, grad = arguments(3, 5, 23, 8), torch.randn(3, 5, 23, 8)

    def run():
        torch.manual_seed(0)
        return output_and_gradients(lambda *x: region_gated_attention(*x, dropout_p), tensors, grad)

    whole = run()
    monkeypatch.setattr(blocked, "CACHE_ELEMENTS", elements)
    for name, pieces, expected in zip(NAMES, run(), whole):
        torch.testing.assert_close(pieces, expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one thread, as tests have it else, a piece may be smaller than the largest of the inputs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("B, H, N", [(1, 1, 197), (1, 12, 197), (8, 12, 197), (2, 3, 600)])
def test_blocked_never_allocates_the_plane(B, H, N, two_threads):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    Largest.elements = max(Largest.elements, x.untyped_storage().nbytes() // x.element_size())
            return result

    tensors, random = arguments(B, H, N, 16), random_keys(2, B, H, N)
    with Largest(), torch.no_grad():
        out, _ = blocked.forward(*tensors, random, 0.1)
        blocked.backward(out, out, None, *tensors, random, 0.1)
    assert Largest.elements < B * H * N * N
    assert Largest.elements <= layout.CACHE_ELEMENTS * torch.get_num_threads() / 2  # two buffers forward, five backward


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    tensors = [x.double().requires_grad_() for x in arguments(2, 3, 6, 4)]
    random = random_keys(2, 2, 3, 6) if dropout_p else None
    assert torch.autograd.gradcheck(lambda *x: attention._forward(*x, random, dropout_p, "blocked")[0], tensors)


# Dropout


def dropped_weights(path: str, tensors: list[torch.Tensor], p: float, seed: int) -> torch.Tensor:
    """The weights after dropout (B, H, N, N): with the unit matrix for V they are the output."""
    q, k, _, *gates = (x.to("cuda" if path == "triton" and CUDA else "cpu") for x in tensors)
    torch.manual_seed(seed)
    with force_path(path):
        return region_gated_attention(
            q, k, torch.eye(q.shape[2]).to(q).expand(q.shape[0], q.shape[1], -1, -1).contiguous(), *gates, p
        ).cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, p",
    [*product(["blocked"], [0.1, 0.5]), *(pytest.param("triton", p, marks=triton_needed) for p in (0.1, 0.5))],
)
def test_attention_dropout(path, p):
    tensors, count = arguments(1, 2, 50, 50), 30 if path == "blocked" or CUDA else 12  # the interpreter is slow
    weights = textbook_attention(tensors[0], tensors[1], torch.eye(50).expand(1, 2, 50, 50), *tensors[3:])
    draws = torch.stack([dropped_weights(path, tensors, p, seed) for seed in range(count)])
    kept = draws > 0
    # dropped, or scaled by 1 / (1 − p)
    torch.testing.assert_close(draws, kept * weights / (1 - p), rtol=1e-4, atol=1e-6)
    n = kept.numel()
    assert abs(kept.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    share = draws.mean(0) / weights  # its mean is 1, its variance p / (1 − p) / draws
    assert abs(share.mean() - 1) < 5 * math.sqrt(p / (1 - p) / n)
    assert share.var() == pytest.approx(p / (1 - p) / count, rel=0.1)
    assert torch.equal(draws[3], dropped_weights(path, tensors, p, 3)) and not torch.equal(draws[3], draws[4])


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_backward_sees_the_dropout_of_the_forward(path):
    tensors, p, device = arguments(2, 2, 33, 33), 0.3, "cuda" if path == "triton" and CUDA else "cpu"
    keep = (dropped_weights(path, tensors, p, seed=5) > 0).double() / (1 - p)

    def masked(q, k, v, masks, lam, theta):
        eye = torch.eye(33, dtype=q.dtype).expand(2, 2, 33, 33)
        return (textbook_attention(q, k, eye, masks, lam, theta) * keep) @ v

    grad = torch.randn(2, 2, 33, 33)
    expected = output_and_gradients(masked, [x.double() for x in tensors], grad)
    torch.manual_seed(5)
    with force_path(path):
        got = output_and_gradients(
            lambda *x: region_gated_attention(*x, p), [x.to(device) for x in tensors], grad.to(device)
        )
    for name, ours, theirs in zip(NAMES, got, expected):
        assert (ours.cpu() - theirs).norm() <= 1e-5 * theirs.norm(), name


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_hashed_dropout_looks_random(p):
    """Rate, independence of neighbours, of rows and of columns: what a poor hash of row and column would fail."""
    torch.manual_seed(0)
    n, draws = 197, 40
    z = keep_mask(random_keys(draws, n), random_keys(draws, n), p, torch.empty(draws, n, n, dtype=torch.float64))
    z = ((z > 0).double() - (1 - p)) / math.sqrt(p * (1 - p))  # (draws, n, n), mean 0 and variance 1
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    for rows_or_columns in (z, z.mT):
        sums = rows_or_columns.sum(-1) / math.sqrt(n)
        assert sums.var() == pytest.approx(1, abs=5 * math.sqrt(2 / sums.numel()) + 0.01 / p)
        pairs = (rows_or_columns @ rows_or_columns.mT / math.sqrt(n))[(slice(None), *torch.triu_indices(n, n, 1))]
        assert pairs.var() == pytest.approx(1, abs=0.05)
    corners = z[:, :-1, :-1] * z[:, 1:, :-1] * z[:, :-1, 1:] * z[:, 1:, 1:]
    assert abs(corners.mean()) < 5 * corners.std() / math.sqrt(corners.numel())
    largest = torch.linalg.matrix_norm(z, 2) / (2 * math.sqrt(n))  # 1 for independent entries, more for any pattern
    assert largest.mean() < 1.05 + 0.002 / p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype):
    x = torch.randn(3, 50, 700).to(dtype).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x, 0.1)
    kept = y != 0
    assert abs(kept.double().mean() - 0.9) < 5 * math.sqrt(0.09 / x.numel())
    torch.testing.assert_close(y, (kept * x.float() / 0.9).to(dtype))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, (kept / 0.9).to(dtype))
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.1), y) and not torch.equal(dropout(x, 0.1), y)
    keys = random_keys(4), random_keys(5)
    assert torch.autograd.gradcheck(
        lambda t: attention_dropout._dropout(t, *keys, 0.3), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    )


# The operator in PyTorch's machinery

SMALL = LAMMViTConfig(img_size=64, patch_size=16, embed_dim=48, depth=2, mlp_ratio=2.0)


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=g), torch.rand(4, 8, 4, 4, generator=g)


@pytest.mark.slow
def test_opcheck():
    tensors = [x.requires_grad_() for x in arguments(2, 3, 7, 4)]
    torch.library.opcheck(attention._forward, (*tensors, None, 0.0, "blocked"))
    torch.library.opcheck(attention._forward, (*tensors, random_keys(2, 2, 3, 7), 0.2, "blocked"))
    torch.library.opcheck(attention_dropout._dropout, (tensors[0], random_keys(42), random_keys(4), 0.2))
    transposed = torch.randn(5, 6).T.requires_grad_()
    torch.library.opcheck(attention_dropout._dropout, (transposed, random_keys(6), random_keys(5), 0.2))


def test_autocast():
    tensors = arguments(2, 3, 20, 16)
    grad = torch.randn(2, 3, 20, 16)
    expected = output_and_gradients(textbook_attention, [x.double() for x in tensors], grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = output_and_gradients(region_gated_attention, tensors, grad)
        assert region_gated_attention(*(x.double() for x in tensors)).dtype == torch.float64
    assert got[0].dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in got[1:])
    for name, ours, theirs in zip(NAMES, got, expected):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm(), name


def test_backward_within_autocast_stays_exact():
    leaves = [x.double().requires_grad_() for x in arguments(2, 3, 20, 16)]
    leaves32 = [x.detach().float().requires_grad_() for x in leaves]
    out32 = region_gated_attention(*leaves32)
    expected = torch.autograd.grad(textbook_attention(*leaves).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out32.sum(), leaves32)
    for name, ours, theirs in zip(NAMES[1:], got, expected):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6, name


def test_half_precision_survives_heavy_dropout():
    q, k, v, *gates = arguments(2, 3, 20, 16, torch.float16)
    assert region_gated_attention(q, k, 10 * v, *gates, 0.999).isfinite().all()


@pytest.mark.parametrize("gradients", [True, False])
def test_shapes_pass_through_without_data(gradients):
    model = LAMMViT(SMALL).to("meta")
    images, masks = torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, 8, 4, 4, device="meta")
    with torch.set_grad_enabled(gradients):
        assert model(images, masks)["logits"].shape == (2, 2)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning", "ignore:There is a"
)
@torch.no_grad()
def test_it_is_one_operator_also_where_nothing_is_differentiated():
    """The pieces of blocked.py are those of one batch: a graph that held them would be wrong for any other."""
    one, three = arguments(1, 2, 5, 16), arguments(3, 2, 5, 16)
    traced = torch.jit.trace(region_gated_attention, tuple(one))
    assert torch.equal(traced(*three), region_gated_attention(*three))
    of_each = torch.func.vmap(region_gated_attention)(*(x.unsqueeze(1) for x in three))
    torch.testing.assert_close(of_each.squeeze(1), region_gated_attention(*three))


@pytest.mark.slow
def test_model_compiles_whole():
    """In one graph, forward and backward. With inductor too, by hand: it takes two minutes and a C++ compiler."""
    images, masks = small_batch()
    torch.manual_seed(0)
    model = LAMMViT(SMALL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = LAMMLoss()(compiled.train()(images, masks), torch.arange(4) % 2)["total"]  # with dropout
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(
            compiled.eval()(images, masks)["logits"], model.eval()(images, masks)["logits"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    q, k, v, *gates = arguments(2, 12, 33, 16)
    expected = output_and_gradients(textbook_attention, [q, k, v, *gates], torch.ones_like(q))
    with force_path("flex"):
        computed = region_gated_attention(q, k, v, *gates)
        with pytest.raises(ValueError, match="drops no attention weights"):
            region_gated_attention(q, k, v, *gates, 0.1)
    torch.testing.assert_close(computed, expected[0], atol=1e-5, rtol=0)
    if CUDA:  # on a CPU it has no backward
        assert trial.flex_serves(torch.device("cuda"), torch.bfloat16), "the same for all gradients"


@triton_needed
@pytest.mark.skipif(CUDA, reason="in Triton's interpreter")
def test_kernels_are_tried_before_they_are_used(monkeypatch):
    """On the first call for a device and dtype; where they fail or are wrong, one warning, and the formula."""
    monkeypatch.setattr(trial, "SHAPE", (1, 2, 18, 16))
    monkeypatch.setattr(trial, "FAILED", set())  # not for the tests after this one
    trial.kernels_serve.cache_clear()
    assert trial.disagreement(trial.by_kernels, torch.device("cpu"), torch.float32) == ""
    q, k, v, *gates = arguments(1, 2, 9, 8)
    monkeypatch.setattr(kernels, "takes", lambda q: True)
    forward, backward = kernels.forward, kernels.backward

    def wrong(*args):
        first, *others = backward(*args)
        return (first * 1.5, *others)

    def broken(*args):
        raise RuntimeError("no kernel image for this device\nand more")

    for name, function, message in (
        ("backward", wrong, "the gradient of q differs from the formula's by"),
        ("forward", broken, "they fail .RuntimeError: no kernel image for this device.; the formula"),
    ):
        trial.kernels_serve.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, function)
            with pytest.warns(RuntimeWarning, match=message):
                out = region_gated_attention(q, k, v, *gates)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # said once
                assert torch.equal(region_gated_attention(q, k, v, *gates), out)
            assert torch.equal(out, textbook_attention(q, k, v, *gates))
    trial.kernels_serve.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert trial.kernels_serve(torch.device("cpu"), torch.float32), "wherever the first call is"
    trial.kernels_serve.cache_clear()
    calls = []
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(0) or forward(*args))
    for _ in range(3):
        region_gated_attention(q, k, v, *gates)
    assert len(calls) == 1 + 3, "one trial, then the kernels themselves"
    trial.kernels_serve.cache_clear()


@pytest.mark.slow  # torch's compiler is imported
def test_flex_attention_takes_the_place_of_kernels_that_fail_where_it_can(monkeypatch):
    """Faked: on a CPU it has no backward. Not with dropout, in float16 or heads that it may not take, nor where it is
    wrong."""
    import attention.flex as flex

    monkeypatch.setattr(trial, "SHAPE", (1, 2, 18, 16))
    monkeypatch.setattr(trial, "FAILED", set())  # not for the tests after this one
    monkeypatch.setattr(kernels, "takes", lambda q: True)
    monkeypatch.setattr(kernels, "forward", None)
    calls = []

    def right(*given):
        calls.append(given[0].shape)
        return textbook_attention(*given)

    def wrong(*given):
        return 1.5 * right(*given)

    def attend(fake, dim, dtype, dropout_p):
        trial.kernels_serve.cache_clear()
        trial.flex_serves.cache_clear()
        monkeypatch.setattr(flex, "flex_gated_attention", fake)
        q, k, v, *gates = arguments(1, 2, 9, dim)
        with pytest.warns(RuntimeWarning, match="the formula takes their place, or FlexAttention where it can"):
            region_gated_attention(q.to(dtype), k.to(dtype), v.to(dtype), *gates, dropout_p)
        return [shape[2] for shape in calls]

    try:
        assert attend(right, 16, torch.float32, 0.0) == [18, 9], "tried, then used"
        calls.clear()
        assert attend(wrong, 16, torch.float32, 0.0) == [18], "tried, and not used"
        calls.clear()
        for dim, dtype, dropout_p in ((16, torch.float32, 0.1), (16, torch.float16, 0.0), (8, torch.float32, 0.0)):
            assert attend(right, dim, dtype, dropout_p) == []
    finally:
        trial.kernels_serve.cache_clear()
        trial.flex_serves.cache_clear()


def test_model_exports(tmp_path):
    images, masks = small_batch()
    model = LAMMViT(SMALL).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(
        torch.export.export(model, (images, masks), dynamic_shapes=({0: batch}, {0: batch})), tmp_path / "model.pt2"
    )
    exported = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(exported(images[:3], masks[:3])["logits"], model(images[:3], masks[:3])["logits"])


def test_checkpointing_repeats_the_dropout():
    tensors, grad = arguments(2, 3, 20, 16), torch.randn(2, 3, 20, 16)

    def run(function):
        torch.manual_seed(0)
        return output_and_gradients(function, tensors, grad)

    def again(*x):
        return torch.utils.checkpoint.checkpoint(region_gated_attention, *x, 0.3, use_reentrant=False)

    for ours, theirs in zip(run(again), run(lambda *x: region_gated_attention(*x, 0.3))):
        torch.testing.assert_close(ours, theirs)


def test_textbook_model_is_the_same_model():
    images, masks = small_batch()
    model = LAMMViT(SMALL).eval()
    with torch.no_grad():
        blocked = model(images, masks)["logits"]
        with force_path("textbook"):
            torch.testing.assert_close(model(images, masks)["logits"], blocked, rtol=1e-4, atol=1e-5)


KERNELS_COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attention import kernels
from attention import blocked, kernels, layout
from attention import dropout as attention_dropout

def compile(name, kernel, dtype, dropout, capability):
    [launch] = kernels._launch(torch.empty(1, 12, 197, 64, dtype=dtype), name, on_device=False)
    how = {name: launch[name] for name in ("num_warps", "num_stages")}
    fixed = {name: value for name, value in launch.items() if name.isupper() and name not in "HN"}
    fixed |= {"DROPOUT": dropout} | ({} if dropout else {"SEED": None})
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    def kind(name):
        if name in fixed: return "constexpr"
        if name in ("Q", "K", "V", "OUT", "GRAD", "GRAD_Q", "GRAD_K", "GRAD_V"): return "*" + dtype
        if name == "SEED": return "*i64"
        if name in ("scale", "dropout_p"): return "fp32"
        return "*fp32" if name.isupper() and name not in "HN" else "i32"
    signature = {name: kind(name) for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    assert triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32),
    options=how).asm["cubin"]

for name, kernel in (("forward", kernels._forward_kernel), ("rows", kernels._backward_rows_kernel),
                     ("columns", kernels._backward_columns_kernel)):
    for dtype, dropout, capability in ((torch.bfloat16, True, 90), (torch.float32, False, 80)):
        compile(name, kernel, dtype, dropout, capability)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    compile(name, kernel, torch.float32, True, 80)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
print("compiled")
"""


@pytest.mark.slow
@triton_needed
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its Linux wheels")
def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, without a device: what the interpreter does not check."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = tmp_path / "compile.py"
    script.write_text(KERNELS_COMPILE)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=torch.zeros(2, 3, 8, 4)), "q, k and v have to be"),
        (dict(masks=torch.zeros(2, 3, 8)), "masks have to be"),
        (dict(lam=torch.zeros(2, 3, 1)), "lam and theta"),
        (dict(v=torch.zeros(2, 3, 7, 4, dtype=torch.float64)), "one floating-point dtype"),
        (dict(dropout_p=1.0), "dropout_p is 1.0"),
        (dict(dropout_p=-0.1), "dropout_p is -0.1"),
    ],
)
def test_refuses_what_it_cannot_mean(change, message):
    names = ("q", "k", "v", "masks", "lam", "theta")
    with pytest.raises(ValueError, match=message):
        region_gated_attention(**{**dict(zip(names, arguments(2, 3, 7, 4))), **change})


def test_force_path_knows_its_paths_and_ends():
    with pytest.raises(ValueError, match="no path 'flash'"), force_path("flash"):
        pass
    with pytest.raises(ZeroDivisionError), force_path("textbook"):
        raise ZeroDivisionError
    assert attention._forced_path is None


@triton_needed
def test_kernels_refuse_what_they_cannot_take():
    with force_path("triton"), pytest.raises(RuntimeError, match="heads up to"):
        region_gated_attention(*(x.double() for x in arguments(1, 1, 4, 4)))
    with force_path("triton"), pytest.raises(RuntimeError, match="heads up to"):
        region_gated_attention(*arguments(1, 1, 4, 256))


def test_empty_batch():
    assert region_gated_attention(*arguments(0, 3, 7, 4)).shape == (0, 3, 7, 4)
    assert region_gated_attention(*arguments(2, 3, 0, 4)).shape == (2, 3, 0, 4)
    assert dropout(torch.empty(0, 4), 0.5).shape == (0, 4) and dropout(torch.ones(4), 1.0).sum() == 0
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(4), 1.5)
