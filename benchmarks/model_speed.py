"""How fast the model is beside a plain ViT-B/16 (torchvision's vit_b_16), and beside itself with the textbook formula.

    python benchmarks/model_speed.py                                    CPU, or CUDA where there is a device
    python benchmarks/model_speed.py --device cuda --batch_sizes 32 128 --dtypes bf16
    python benchmarks/model_speed.py --init_from clip                   CLIP's first 8 blocks, --tune norms

In each round every model runs once, each round in another order, so that whatever slows the machine down for a while
slows all down alike; the times are medians of the rounds, the ratios those of the medians. Forward is inference,
without gradients; a training step is forward, loss, backward and AdamW. bf16 is autocast, as in train.py. Each model is
as its users get it: vit_b_16 without dropout, LAMM-ViT with 0.1. Memory is the peak of a training step: on a CPU the
resident memory of a process of its own for each model, on CUDA what PyTorch allocated for this model.

On CUDA some race once more, apart, as CUDA graphs, where no launch of a kernel has to be waited for: both models, made
by torch.compile as a whole, and LAMM-ViT as train.py --compile has it, whose forward pass without gradients is as
ever. A model that cannot run there has its reason in its row.

With --init_from all is about a pre-trained trunk, cut off after --depth blocks: the bare trunk has its LayerNorms and a
head trained, LAMM-ViT the method beside them (train.py --tune norms).
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention import force_path
from model import NUM_REGIONS, LAMMLoss, LAMMViT, LAMMViTConfig
from runtime.devices import keep_freed_memory
from runtime.pretrained import read_trunk
from training.compiled import capture, compile_parts
from training.options import PARTS
from training.options import get_args_parser as train_parser
from training.setup import build_model

PLAIN, OURS, TEXTBOOK = "vit_b_16", "LAMM-ViT", "LAMM-ViT, textbook formula"
BARE = "bare trunk"  # in the place of PLAIN, with --init_from
FLEX = "LAMM-ViT, FlexAttention"  # on CUDA: on a CPU it has no backward. Without dropout in attention and MLP
PATHS = {TEXTBOOK: "textbook", FLEX: "flex"}
COMPILED = ", compiled"  # on CUDA: the floor's and ours once more
CAPTURED = "LAMM-ViT, train.py --compile"  # likewise


class Contestant:
    """A model with its optimizer, that can run forward and a training step on one batch."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: str):
        torch.manual_seed(0)
        self.name, self.device = name.removesuffix(COMPILED), args.device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bf16")
        self.model = build(self.name, args).to(args.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=args.device == "cuda" or None)
        self.criterion = LAMMLoss()
        self.is_graph = is_graph(name)
        if name.endswith(COMPILED):
            self.model = torch.compile(self.model, mode="reduce-overhead")
            for parameter in trained:  # what a CUDA graph returns is overwritten by its next run
                parameter.grad = torch.zeros_like(parameter)

    def _loss(self, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
        if self.name == PLAIN:
            return F.cross_entropy(self.model(images).float(), labels)
        return self.criterion(self.model(images, masks), labels)["total"]

    def forward(self, images: Tensor, masks: Tensor, labels: Tensor) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast:
            self.model(images) if self.name == PLAIN else self.model(images, masks)

    def training_step(self, images: Tensor, masks: Tensor, labels: Tensor) -> None:
        self.model.train()
        with self.autocast:
            loss = self._loss(images, masks, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.is_graph)

    def capture(self, batch_size: int) -> None:
        """As train.py --compile does. A warning says where it fails."""
        compile_parts(self.model)
        capture(self.model.train(), batch_size, self.dtype)


def is_graph(name: str) -> bool:
    return name.endswith(COMPILED) or name == CAPTURED


def build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    """A contestant's model with its initial weights."""
    if name == PLAIN:
        return torchvision.models.vit_b_16(num_classes=2)
    dropout = 0.0 if name == FLEX else 0.1
    if not args.init_from:
        return LAMMViT(LAMMViTConfig(dropout=dropout))
    options = ["--init_from", args.init_from, "--depth", str(args.depth), "--tune", "norms", "--dropout", str(dropout)]
    options += ["--without", *PARTS] if name == BARE else []
    return build_model(train_parser().parse_args(options), 224, read_trunk(args.init_from))


def make_batch(batch_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random images (B, 3, 224, 224), region masks (B, 8, 14, 14) and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, generator=generator)
    masks = torch.rand(batch_size, NUM_REGIONS, 14, 14, generator=generator)
    return images.to(device), masks.to(device), (torch.arange(batch_size) % 2).to(device)


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(
    contestants: dict[str, Contestant], batch: tuple[Tensor, ...], stage: str, rounds: int, label: str
) -> dict[str, float]:
    """Median seconds of `stage`, a method of Contestant, for each name. Two rounds to warm up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in tqdm(range(rounds + 2), desc=f"{label} {stage}", leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = partial(getattr(contestants[name], stage), *batch)
            with force_path(PATHS.get(name)):
                seconds[name].append(timed(run, contestants[name].device))
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def peak_memory(name: str, args: argparse.Namespace, dtype: str, batch_size: int) -> float:
    """The most GB that this process held, over three training steps."""
    contestant, batch = Contestant(name, args, dtype), make_batch(batch_size, args.device)
    with force_path(PATHS.get(name)):
        for _ in range(3):
            contestant.training_step(*batch)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_memory_apart(name: str, args: argparse.Namespace, dtype: str, batch_size: int) -> float:
    """peak_memory in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--dtypes", dtype, "--batch_sizes", str(batch_size)]
    command += ["--threads", str(args.threads), "--memory_of", name, "--depth", str(args.depth)]
    command += ["--init_from", args.init_from] if args.init_from else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return float(done.stdout)


def on_device(name: str, args: argparse.Namespace, dtype: str, batch: tuple[Tensor, ...]) -> tuple[Contestant, float]:
    """A contestant, and the most GB that PyTorch held on the device for it, over three training steps."""
    gc.collect()
    torch.cuda.empty_cache()
    before, contestant = torch.cuda.memory_allocated(), Contestant(name, args, dtype)
    if name == CAPTURED:
        contestant.capture(len(batch[0]))
    torch.cuda.reset_peak_memory_stats()
    with force_path(PATHS.get(name)):
        contestant.forward(*batch)
        for _ in range(3):
            contestant.training_step(*batch)
    return contestant, (torch.cuda.max_memory_allocated() - before) / 1e9


def rows_of(
    names: tuple[str, ...], args: argparse.Namespace, dtype: str, batch: tuple[Tensor, ...], gigabytes: dict
) -> Iterator[list[str]]:
    """A race of these models, the floor first: a row of the table for each. On CUDA, fills in gigabytes."""
    batch_size, floor, contestants = len(batch[0]), names[0], {}
    label = f"{dtype} batch {batch_size}"
    for name in names:
        if args.device == "cpu":  # one model for both formulas
            contestants[name] = contestants[OURS] if name == TEXTBOOK else Contestant(name, args, dtype)
            continue
        try:
            contestants[name], gigabytes[name, dtype, batch_size] = on_device(name, args, dtype, batch)
        except Exception as error:  # whatever torch's compiler, Triton and the driver raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
            yield [dtype, str(batch_size), name, reason[:160], *[""] * 4]
            if name == floor:
                return
    stages = [race(contestants, batch, stage, args.rounds, label) for stage in ("forward", "training_step")]
    of_floor = gigabytes[floor, dtype, batch_size]
    for name in contestants:
        cells = [dtype, str(batch_size), name]
        for seconds in stages:
            digits = 0 if seconds[name] > 0.1 else 1
            cells.append(f"{1000 * seconds[name]:.{digits}f} ms ({seconds[name] / seconds[floor]:.2f})")
            cells.append(f"{batch_size / seconds[name]:.1f}")
        memory = gigabytes[name, dtype, batch_size]
        # What CUDA graphs work in does not count as allocated
        yield [*cells, "" if is_graph(name) else f"{memory:.2f} GB ({memory / of_floor:.2f})"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help="default: cuda where there is a device"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="fp32 and bf16 autocast"
    )
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, help="images per batch (default: 8 on cpu, 32 and 128 on cuda)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="runs of each model that count (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads (default: %(default)s, PyTorch's choice)",
    )
    parser.add_argument("--init_from", metavar="TRUNK", help="as of train.py: a trunk, bare and in LAMM-ViT")
    parser.add_argument("--depth", type=int, default=8, help="how many of its blocks (default: %(default)s)")
    parser.add_argument("--memory_of", choices=(PLAIN, BARE, OURS, TEXTBOOK), help=argparse.SUPPRESS)
    return parser


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory(torch.device(args.device))  # as train.py and inference.py do
    batch_sizes = args.batch_sizes or ([32, 128] if args.device == "cuda" else [8])
    if args.memory_of:
        print(peak_memory(args.memory_of, args, args.dtypes[0], batch_sizes[0]))
        return

    floor = BARE if args.init_from else PLAIN
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{where}, torch {torch.__version__}, medians of {args.rounds} interleaved rounds; in brackets the ratio to"
        f" {floor}, of compiled ones to the compiled one\n"
    )
    print("| dtype | batch | model | forward | images/s | training step | images/s | peak memory |")
    print("|---|--:|---|--:|--:|--:|--:|--:|")
    fields = [(floor, OURS, TEXTBOOK)]
    if args.device == "cuda":
        fields = [(floor, OURS, TEXTBOOK, FLEX), (floor + COMPILED, OURS + COMPILED, CAPTURED)]
    runs = list(product(args.dtypes, batch_sizes))
    # Before this process grows: on Linux the peak of a new process begins with what its parent holds when it starts it
    gigabytes = {}
    if args.device == "cpu":
        for name, run in tqdm(list(product(fields[0], runs)), desc="memory", leave=False):
            gigabytes[(name, *run)] = peak_memory_apart(name, args, *run)
    for names, (dtype, batch_size) in product(fields, runs):
        torch.compiler.reset()  # another batch size would be compiled for any
        for row in rows_of(names, args, dtype, make_batch(batch_size, args.device), gigabytes):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
