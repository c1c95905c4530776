"""Where a run stands, on the disk: last.pth is written so that a run which goes on ends with the same bits."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from evaluation.metrics import choose_threshold, log_loss
from evaluation.operating import fold_temperature, judge_left_out, operating_points
from model import LAMMViTConfig
from runtime.checkpoint import CHECKPOINT_VERSION, TO_JUDGE, CheckpointError, read_model, save
from runtime.files import free_path, replacing
from runtime.processes import gather
from runtime.tuning import held_state
from training.cache import use_cache
from training.options import get_args_parser
from training.probe import probe_head
from training.readings import forget as forget_readings
from training.run import BEST, FILES, LAST, LOG, PREVIOUS, Run

# Options that may change between a run and its resumption. The schedule "cosine" depends on --epochs.
MAY_CHANGE = ("features", "epochs", "stop_patience", "device", "num_workers", "save_minutes")
COMPARED = ("datasets", "sizes", "dtype", "config")  # beside the options
# What last.pth holds beside a model
STATE = {"optimizer", "schedule", "scaler", "processes", "log", "launch", "sizes", "window", "dtype"}


class OtherRun(CheckpointError):
    """A checkpoint of a run with other options or features."""


def describe(run: Run) -> dict:
    """What every checkpoint holds: the weights, and what is needed to use them and to tell where they come from."""
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(run.args).items()
        if name not in ("resume", "output_dir")
    }
    return {
        "version": CHECKPOINT_VERSION,
        "config": dataclasses.asdict(run.model.config),
        "model": held_state(run.model, run.args.tune),
        "trunk": run.trunk,
        "mask_style": run.args.mask_style,
        "datasets": run.datasets,
        "framing": run.framing,
        "images": run.images,
        "features": run.train_set.fingerprint,
        "arguments": arguments,
        "val_threshold": run.val_threshold,
        "sizes": [len(run.train_set), len(run.val_set)],
        "window": run.window,
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": run.device.type,
        "epoch": run.epoch,
        "samples": run.samples,
        "best_auc": run.best_auc,
    }


def calibrated(run: Run, line: dict, weights: dict[str, torch.Tensor], log_odds: np.ndarray) -> dict:
    """What best_model.pth holds: describe, the epoch's line of the log, and the operating points.

    Its logits are those of the run divided by `temperature`, in the weights of its head: whoever uses it has calibrated
    probabilities, and need not know. So val_loss and val_threshold are other numbers than in the log, and `thresholds`,
    {rate of false alarms: threshold}, are of calibrated scores. `unknown` is judge_left_out's, where a probe alone has
    left data sets out in turn.

    Args:
        weights: step.kept_weights.
        log_odds: (N,) of the validation images, by these weights.
    """
    labels = run.val_set.labels
    # "real/FFHQ" of FFHQ's file
    others = {
        "/".join(Path(run.train_set.files[one]).parts[-3:-1]): (
            int(run.train_set.labels[run.train_set.starts[one]]),
            values.cpu().numpy(),
        )
        for one, values in ({} if run.args.epochs else run.left_out).items()
    }
    real = {  # by data set: each has a file, and one class
        file: slice(start, end)
        for file, start, end in zip(run.val_set.files, run.val_set.starts, run.val_set.ends)
        if start < end and labels[start] == 0
    }
    temperature, thresholds = operating_points(labels, log_odds, real, list(others.values()))
    scores = expit(log_odds / temperature)
    held = describe(run) | line
    held["model"] = fold_temperature(weights, temperature)
    held |= {"temperature": temperature, "thresholds": thresholds}
    if {label for label, _ in others.values()} == {0, 1}:
        held["unknown"] = judge_left_out(others, temperature, thresholds)
    return held | {"val_threshold": choose_threshold(labels, scores), "val_loss": log_loss(labels, scores)}


def save_state(run: Run) -> None:
    """Writes last.pth, from which the run can go on; the one before stays, as previous.pth. All processes call it."""
    own = {"sums": run.sums.clone(), "cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(run.device)
    processes = gather(own)
    if run.rank == 0:
        parts = {
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.plateau.state_dict(),
            "scaler": run.scaler.state_dict(),
            "processes": processes,
            "epochs_since_best": run.epochs_since_best,
            "log": run.log,
            "ema": run.ema,
            "left_out": run.left_out,
            "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        }
        save(describe(run) | parts, run.path(LAST), run.path(PREVIOUS))


def load_state(run: Run, path: Path, is_restart: bool) -> None:
    """Puts the run where the checkpoint's stood.

    Args:
        is_restart: torchrun has started the processes again; the checkpoint has to be of the same start of torchrun.

    Raises:
        CheckpointError: damaged, foreign, without its best model.
        OtherRun: of a run with other options or features.
    """
    checkpoint = read_or_offer_the_one_before(path)
    if not STATE <= checkpoint.keys():
        raise CheckpointError(f"{path}: holds a model, not a run; {LAST} and {PREVIOUS} are what --resume goes on from")
    if is_restart and checkpoint["launch"] != os.environ["TORCHELASTIC_RUN_ID"]:
        raise OtherRun(f"{path}: of an earlier start of torchrun")
    if run.args.precision == "auto" and run.device.type == checkpoint.get("device") == "cpu":
        run.dtype = getattr(torch, checkpoint["dtype"])  # as it was found to be faster then
    try:
        changed = changes_since(checkpoint, run)
    except (TypeError, ValueError) as error:  # its models have other settings than this program's
        raise CheckpointError(f"{path}: of another version of this program ({error}); run train.py again") from error
    if changed:
        raise OtherRun(f"{path}: trained with {', '.join(changed)}; resume with the same options and features")
    if checkpoint["log"] and not run.path(BEST).exists():
        raise CheckpointError(
            f"{run.path(BEST)}: is gone, and it is the best of this run; put it back, or start anew without --resume"
        )
    wanted, there = (
        {name: values.shape for name, values in state.items()}
        for state in (held_state(run.model, run.args.tune), checkpoint["model"])
    )
    if wanted != there:  # load_state_dict alone cannot tell: what is frozen is in no checkpoint
        raise CheckpointError(
            f"{path}: its weights are of another architecture than this program's; run train.py again"
        )
    run.model.load_state_dict(checkpoint["model"], strict=False)
    averages = checkpoint.get("ema")  # None before the first step
    run.ema = averages and {name: values.to(run.device) for name, values in averages.items()}
    run.left_out = checkpoint.get("left_out", {})
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = run.optimizer.defaults["fused"]  # the device's business, not the run's
    for part, name in ((run.optimizer, "optimizer"), (run.plateau, "schedule"), (run.scaler, "scaler")):
        part.load_state_dict(checkpoint[name])
    for name in ("epoch", "samples", "best_auc", "epochs_since_best", "val_threshold", "log"):
        setattr(run, name, checkpoint[name])
    processes = checkpoint["processes"]
    if len(processes) == run.world:
        run.sums = processes[run.rank]["sums"]
        torch.set_rng_state(processes[run.rank]["cpu"])
        if run.device.type == "cuda" and "cuda" in processes[run.rank]:
            torch.cuda.set_rng_state(processes[run.rank]["cuda"], run.device)
    else:
        torch.manual_seed(hash((run.args.seed, run.samples, run.rank)))
        if run.rank == 0:
            run.sums = sum(process["sums"] for process in processes)
            print(
                f"{path} is of {len(processes)} processes, these are {run.world}: goes on with another number of images"
                " a step, and not to the bit"
            )


def read_or_offer_the_one_before(path: Path) -> dict:
    """A checkpoint, its model not yet built; the error names the older checkpoint where that is whole."""
    try:
        return read_model(path, needed=TO_JUDGE)
    except CheckpointError as error:
        older, found = path.with_name(PREVIOUS), None
        with contextlib.suppress(CheckpointError):
            found = read_model(older, needed=TO_JUDGE) if path != older else None
        if found is None:
            raise
        hint = f"{older} is whole, from epoch {found['epoch']}: to go on from it, --resume {older}"
        raise CheckpointError(f"{error}\n{hint}") from error


def changes_since(checkpoint: dict, run: Run) -> list[str]:
    """In what the checkpoint's run was another one: options, data, features. Each as the checkpoint has it."""
    now, options = describe(run), checkpoint["arguments"]
    may_change = set(MAY_CHANGE)
    if checkpoint["window"] == now["window"]:
        may_change |= {"batch_size", "accum_steps"}
    if run.args.schedule == "cosine":
        may_change.remove("epochs")
    trunk, trunk_now = ((one.get("trunk") or {}).get("sha256") for one in (checkpoint, now))
    if trunk and trunk == trunk_now:
        may_change.add("init_from")  # it is the same, wherever it lies
    fixed = [name for name in now["arguments"] if name not in may_change]
    # Of before an option was there, or a field of the model
    options = vars(get_args_parser().parse_args([])) | {"start": "paper"} | options
    checkpoint = checkpoint | {"config": dataclasses.asdict(LAMMViTConfig(**checkpoint["config"]))}
    if bool(options["epochs"]) != bool(run.args.epochs) and "epochs" in may_change:  # a probe alone is no training
        fixed.append("epochs")
    changed = [f"--{name} {options[name]}" for name in fixed if options[name] != now["arguments"][name]]
    if not changed:
        changed = [f"{what} {checkpoint[what]}" for what in COMPARED if checkpoint[what] != now[what]]
    if not changed and trunk != trunk_now:
        changed = [f"a trunk of SHA-256 {trunk[:16]}..."]
    return changed or (["other features"] if checkpoint["features"] != now["features"] else [])


def begin(run: Run, restarts: int) -> None:
    """Puts the run at its beginning; or where it stopped, with --resume, or if torchrun has started it again.

    All processes read the checkpoint; rank 0 says which, since machines may see a file at different moments.
    """
    asked = run.args.resume is not None
    gone_on = False
    if asked or restarts:
        path = gather(checkpoint_to_go_on_from(run) if run.rank == 0 else None)[0]
        with contextlib.suppress(OtherRun) if not asked else contextlib.nullcontext():
            if path:
                load_state(run, path, is_restart=not asked)
                gone_on = True
        if len(set(gather((gone_on, run.epoch, run.samples)))) > 1:
            raise CheckpointError(f"{path}: not the same on all machines; they have to share {run.args.output_dir}")
    if run.args.cache_blocks:
        use_cache(run)
    if gone_on or not (asked or restarts):
        forget_readings(run)
    if gone_on:
        if run.rank == 0:
            print(f"goes on from {path}: epoch {run.epoch}, {run.samples} samples seen")
            write_log(run)
        return
    if run.args.head == "probe":
        probe_head(run)
    if run.rank == 0:
        keep_earlier(run.args.output_dir)
    torch.manual_seed((run.args.seed << 16) + run.rank)  # dropout
    save_state(run)
    forget_readings(run)


def checkpoint_to_go_on_from(run: Run) -> Path | None:
    """The one named; else the last, or the one before where there is no last one; None: none at all."""
    if not run.args.resume:
        return next((path for path in (run.path(LAST), run.path(PREVIOUS)) if path.exists()), None)
    path = Path(run.args.resume)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint to go on from")
    if path.resolve().parent != run.args.output_dir.resolve():
        raise CheckpointError(f"{path}: of a run in another folder; go on with --output_dir {path.parent}")
    return path


def keep_earlier(output_dir: Path) -> None:
    """A model is days of work, maybe: never written over."""
    if any((output_dir / name).exists() for name in (BEST, LAST, PREVIOUS)):
        earlier = free_path(output_dir, "earlier", numbered=True)
        earlier.mkdir()
        for name in FILES:
            if (output_dir / name).exists():
                (output_dir / name).rename(earlier / name)
        print(f"the model of an earlier run is kept in {earlier}")


def check_disk(run: Run, goes_on: bool) -> None:
    """Raises OSError where the disk has no room for the run's checkpoints."""
    kept = (values for values in run.model.parameters() if values.requires_grad)
    weights = sum(values.numel() * values.element_size() for values in kept)
    # The best, and the last twice and in writing, with AdamW's two moments and the average
    needed = weights + 3 * (3 + bool(run.args.ema)) * weights
    there = (
        sum(path.stat().st_size for name in (BEST, LAST, PREVIOUS) if (path := run.path(name)).exists())
        if goes_on
        else 0
    )
    free = shutil.disk_usage(run.args.output_dir).free
    if needed - there > free:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoints need {(needed - there) / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; make room"
            " or choose another --output_dir",
            str(run.args.output_dir),
        )


def write_log(run: Run) -> None:
    """log.jsonl holds what the computation determines, so that a resumed run's is the same; timing.jsonl the rest."""
    with replacing(run.path(LOG)) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in run.log))
