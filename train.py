"""Trains LAMM-ViT on the feature files and keeps the model with the best validation AUC.

    features/<real|fake>/<Name>/{train,val}_features.h5  ->  output_model/: best_model.pth, last.pth, log.jsonl,
    pictures

    python train.py                                                         one GPU, or the CPU where there is none
    torchrun --nproc_per_node=4 train.py                                    four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py      two machines
    python train.py --resume                                                goes on where it stopped, however it stopped
    python train.py --without region_guidance                               one of the paper's ablations
    python train.py --init_from clip --tune head --augment none --cache_blocks 12       the head on CLIP, in seconds

The defaults are the paper's recipe, but for docs/differences.md. --batch_size is per process, as there: with W
processes a step of the optimizer sees W · batch_size · accum_steps images. Without a GPU, torchrun trains on the CPU
(gloo).

A run that is stopped, by Ctrl-C, SIGTERM, kill -9 or a power cut, and goes on, ends on a CPU with the weights and the
log of one that was never stopped, to the bit.
"""

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from evaluation.metrics import binary_metrics, choose_threshold
from evaluation.scoring import load_batches, predict, scores_and_log_odds
from model import NUM_HEADS
from runtime.checkpoint import save
from runtime.devices import backend_for, keep_freed_memory, memory_gb, pick_process_device
from runtime.processes import agree, gather, join_processes, lock
from training.compiled import compile_run
from training.options import check_options, get_args_parser
from training.record import draw_pictures, open_board, report_epoch, report_left_out, write_board
from training.run import BEST, LAST, PREVIOUS, Run, Stopped
from training.schedule import cosine_lr
from training.setup import build_run, print_plan
from training.state import begin, calibrated, check_disk, save_state, write_log
from training.step import as_kept, kept_weights, listed, one_step, rehearse, start_training_mode

# What gloo and nccl say of a process that has ended
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")

COMPILERS = ("torch._dynamo.", "torch._inductor.")  # where the errors of --compile are from


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """SIGTERM (Slurm, torchrun) and Ctrl-C end the run after the step at hand, a second Ctrl-C at once."""

    def note(number: int, frame: object) -> None:
        if run.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_one_epoch(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Trains to the end of the run's epoch.

    Epoch e ends with the first step at which e times epoch_size samples were seen; the next one goes on in the
    sampler's order. So every step is a full one.

    Returns:
        the mean losses per sample of the epoch, over all processes; the timing.

    Raises:
        Stopped: somebody asked for it. The run can go on from last.pth.
        FloatingPointError: a loss or gradient that is not finite. The weights are those before it.
    """
    args, rank = run.args, run.rank
    # 0 where a run was stopped in its validation
    steps = max(0, math.ceil((run.epoch * run.epoch_size - run.samples) / run.window))
    firsts = range(run.samples + rank * args.batch_size, run.samples + steps * run.window, args.batch_size * run.world)
    batches = (run.sampler.draw(first, args.batch_size) for first in firsts)
    loader = load_batches(run.train_set, batches, args.num_workers, pin_memory=run.device.type == "cuda")
    start_training_mode(run)
    started, waited, saved = time.perf_counter(), 0.0, time.monotonic()
    with tqdm(
        desc=f"epoch {run.epoch}", total=steps * args.accum_steps, unit="batch", leave=False, disable=rank > 0
    ) as bar:
        for step in range(steps):
            if args.schedule == "cosine":
                for group in run.optimizer.param_groups:
                    group["lr"] = cosine_lr(run) * group.get("scale", 1)
            is_due = rank == 0 and time.monotonic() - saved >= 60 * args.save_minutes
            seconds, is_stopped, is_due = one_step(run, loader, bar, is_due)
            waited += seconds
            lr = run.optimizer.param_groups[0]["lr"]
            per_second = (step + 1) * run.window / (time.perf_counter() - started)
            bar.set_postfix_str(
                f"loss {run.sums[0] / run.sums[3]:.4f}, lr {lr:.1e}, {per_second:.0f} images/s,"
                f" {memory_gb(run.device):.1f} GB"
            )
            if is_stopped or is_due:
                save_state(run)
                saved = time.monotonic()
            if is_stopped:
                raise Stopped
    seconds = time.perf_counter() - started
    sums = run.sums.to(run.device)
    if run.world > 1:
        dist.all_reduce(sums)
    total, ce, diversity = (sums[:3] / sums[3].clamp(min=1)).tolist()
    timing = {
        "seconds": seconds,
        "images_per_second": steps * run.window / seconds,
        "data_wait": waited / seconds,
        "memory_gb": memory_gb(run.device),
    }
    return {"train_loss": total, "train_ce": ce, "train_diversity": diversity}, timing


def validate(run: Run) -> tuple[dict[str, float], np.ndarray, torch.Tensor | None]:
    """The whole validation set, with the same numbers in every process, hence the same decisions.

    Returns:
        metrics; the scores and their log odds (N, 2); LAMM's w (L, H), the mean over the images.
    """
    sums = torch.zeros(run.args.depth, NUM_HEADS, dtype=torch.float64, device=run.device)

    def watch(lamm: nn.Module, inputs: tuple, outputs: tuple) -> None:
        sums[inputs[1]] += outputs[0].sum(dim=0)

    handle = run.model.lamm.register_forward_hook(watch) if run.model.lamm else None
    predicted = predict(
        run.fed, run.val_set, scores_and_log_odds, run.args.batch_size, run.args.num_workers, "validation"
    )
    scores = predicted[:, 0]
    if handle:
        handle.remove()
        if run.world > 1:
            dist.all_reduce(sums)
    if handle and run.args.cache_blocks:  # LAMM was not called
        sums = run.fed.weights(torch.tensor(run.val_set.stand_in)).double().sum(dim=0)
    labels = run.val_set.labels
    if not np.isfinite(scores).all():
        bad = torch.from_numpy(np.flatnonzero(~np.isfinite(scores)))
        raise FloatingPointError(
            f"epoch {run.epoch}: in validation, no finite score for {listed(run.val_set, bad)}; {run.path(LAST)} holds"
            f" the weights that fail, {BEST} and {PREVIOUS} are of before; start anew with a lower --lr or --precision"
            " fp32"
        )
    threshold = choose_threshold(labels, scores)
    metrics = binary_metrics(labels, scores, threshold)
    line = {
        "val_auc": metrics["auc"],
        "val_ap": metrics["ap"],
        "val_accuracy": metrics["accuracy"],
        "val_loss": metrics["log_loss"],
        "val_threshold": threshold,
    }
    return line, predicted, (sums / len(labels)).float().cpu() if handle else None


def start_line(run: Run) -> dict[str, float]:
    return {"epoch": run.epoch, "samples": run.samples, "lr": run.optimizer.param_groups[0]["lr"]}


def save_best(run: Run, line: dict, predicted: np.ndarray, weights: torch.Tensor | None) -> dict:
    best = calibrated(run, line, kept_weights(run), predicted[:, 1]) | {"lamm_weights": weights}
    save(best, run.path(BEST))
    return best


def report_best(run: Run) -> None:
    """What the run came to: its pictures, and a line."""
    draw_pictures(run)
    print(f"best validation AUC {run.best_auc:.4f}; model in {run.path(BEST)}")


def keep_probe(run: Run) -> None:
    """--epochs 0: the head as training.probe left it is the result."""
    with as_kept(run):
        metrics, predicted, weights = validate(run)
    run.best_auc, run.val_threshold = metrics["val_auc"], metrics["val_threshold"]
    if run.rank == 0:
        best = save_best(run, start_line(run) | metrics, predicted, weights)
        report_left_out(best.get("unknown", {}))
        report_best(run)
    save_state(run)


def train(run: Run) -> None:
    """Epoch after epoch, each with its validation, until the last one or until the AUC stands still."""
    args = run.args
    board = open_board(run) if run.rank == 0 and not run.is_finished else None
    while not run.is_finished:
        losses, timing = train_one_epoch(run)
        save_state(run)  # validation may take longer than Slurm waits
        if agree(bool(run.stop))[0]:
            raise Stopped
        with as_kept(run):
            metrics, predicted, weights = validate(run)
        line = start_line(run) | losses | metrics
        if args.schedule == "plateau":
            run.plateau.step(metrics["val_auc"])
        is_best = metrics["val_auc"] > run.best_auc
        run.epochs_since_best = 0 if is_best else run.epochs_since_best + 1
        run.best_auc, run.val_threshold = max(run.best_auc, metrics["val_auc"]), metrics["val_threshold"]
        run.log.append(line)
        run.sums.zero_()
        if run.rank == 0:
            write_log(run)
            if is_best:
                save_best(run, line, predicted, weights)
            report_epoch(run, line, timing, is_best)
            if board:
                write_board(board, line | timing, run.val_set.labels, predicted[:, 0], weights)
        run.epoch += 1
        save_state(run)
        if agree(bool(run.stop))[0] and run.epoch <= args.epochs:
            raise Stopped
    if run.rank == 0:
        if run.epoch <= args.epochs:
            print(f"no better AUC for {args.stop_patience} epochs, stopped after epoch {run.epoch - 1}")
        report_best(run)


def main(args: argparse.Namespace) -> None:
    check_options(args)
    device = pick_process_device(args.device)
    keep_freed_memory(device)
    rank, world, restarts = join_processes(backend_for(device), timedelta(minutes=30))
    run = build_run(args, rank, world, device)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir}: {error.strerror}") from error
    with lock(args.output_dir) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            check_disk(run, goes_on=args.resume is not None or restarts > 0)
            print_plan(run)
        begin(run, restarts)
        if args.compile and not run.is_finished:
            compile_run(run)
        if world > 1:
            run.trained = DistributedDataParallel(
                run.trained, device_ids=[device.index] if device.type == "cuda" else None
            )
            rehearse(run)
        try:
            with stopping_on_signals(run):
                train(run) if args.epochs else keep_probe(run)
        except Stopped:
            if rank == 0:
                print(
                    f"stopped by {run.stop or 'a signal to another process'} in epoch {run.epoch}, {run.samples}"
                    " samples seen; --resume goes on from there"
                )
        gather(None)  # nobody leaves while others need it


def guarded_main() -> None:
    """main, with one line for what its user can mend."""
    try:
        main(get_args_parser(__doc__).parse_args())
    except (ValueError, FloatingPointError, OSError) as error:  # FeatureFileError and CheckpointError among them
        sys.exit(f"{error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{str(error).splitlines()[0]}; lower --batch_size, and raise --accum_steps as much")
    except RuntimeError as error:
        if type(error).__module__.startswith(COMPILERS):
            sys.exit(f"--compile: {' '.join(str(error).split())[:300]}; without --compile it trains, more slowly")
        if not dist.is_initialized() or not any(words in str(error) for words in LOST):
            raise
        sys.exit(f"another process of this run has ended ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last checkpoint")


if __name__ == "__main__":
    guarded_main()
