"""Finds the face in every image and writes the feature files that train.py and inference.py read.

    datasets/<real|fake>/<Name>/**/*.png  ->  features/<real|fake>/<Name>/{train,val,test}_features.h5

    python feature_extraction.py --data_root datasets --output_dir features
    python feature_extraction.py --manifest faces.csv                     a list instead of folders
    python feature_extraction.py ... --group_by_folder                    a folder is an identity, kept in one split
    python feature_extraction.py ... --test_only FLUX                     a generator that training must not see
    torchrun --nproc_per_node=8 feature_extraction.py ...                 also over machines that share the two folders

Two steps. First, worker processes take the images in shards of 128: decode, find the face, predict its 68 landmarks,
draw the masks, write the shard. A run that is stopped goes on with the images that are in no shard. Then the images are
dealt out to the three splits and written as the feature files, which appear all at once. Later runs take from these
what has not changed: added, changed and removed images, another --seed or --compress cost no more than they must.

The 68-point predictor was trained on iBUG 300-W, whose terms exclude commercial use. It is not part of this repository.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import signal
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import FaceDataset
from evaluation.typeset import as_text
from faces.finder import FOUND_BY, PREDICTOR_FILE, finder_files
from faces.images import NO_IMAGE_BY_NAME
from faces.regions import draw_region_masks
from faces.rejection import read_reasons, write_reasons
from faces.treatment import describe_treatment
from runtime.processes import default_workers, gather, join_processes, lock, scatter, under_torchrun
from samples.extracted import (
    SHARDS,
    SKIPPED,
    STAGE,
    Plan,
    feature_files,
    find_all_rows,
    has_fingerprint,
    mean_over,
    publish,
    stale_rows,
)
from samples.feature_files import CLASSES, SPLITS, FeatureFileError, open_features, write_features
from samples.plan import dealing, fingerprint_of, make_plan
from samples.shards import CHANGED, extract
from samples.sources import Source
from samples.splits import SHARES, deal

# Images at a time on their way from shards to feature files; larger blocks need more memory and are slower
BLOCK_SIZE = 16
IN_TABLE = ("found_by", "filled", "sha256", "originals", "treatments")  # columns that go to feature files as they are


# ---------------------------------------------------------------------------------------------- shards -> feature files


@dataclass
class Stock:
    """The extracted images on their way to the feature files, in the order of the plan."""

    files: list[Path]  # of earlier runs first, then the shards
    finished: int  # how many are of earlier runs; what is in shards has just been written
    store: FaceDataset  # over these files
    rows: np.ndarray  # (N,) of each image, in the store
    sources: list[Source]
    contents: list[bytes]  # SHA-256 of each
    found: np.ndarray  # (N,) whether a face was
    columns: dict[str, np.ndarray]  # those that go to feature files as they are, (N, ...) each
    mean_landmarks: np.ndarray | None = None  # (68, 2), for those without a face
    mean_masks: np.ndarray | None = None  # (8, G, G)


def read_blocks(stock: Stock, members: np.ndarray, bar: tqdm) -> Iterator[dict[str, np.ndarray]]:
    """The images with these numbers, some at a time, for write_features. What earlier runs wrote is checked."""
    for start in range(0, len(members), BLOCK_SIZE):
        block = members[start : start + BLOCK_SIZE]
        samples, faceless = stock.store.read(stock.rows[block]), ~stock.found[block]
        samples["landmarks"][faceless], samples["region_masks"][faceless] = stock.mean_landmarks, stock.mean_masks
        images = samples["image"].transpose(0, 2, 3, 1)  # (B, 3, h, w) -> (B, h, w, 3)
        for i, image, file in zip(block, images, np.searchsorted(stock.store.ends, stock.rows[block], side="right")):
            if file < stock.finished and hashlib.sha256(image).digest() != stock.contents[i]:
                raise FeatureFileError(
                    f"{stock.files[file]}: the image of {stock.sources[i].path} is damaged in it; delete it and run the"
                    " same command again"
                )
        yield {"images": images, "landmarks": samples["landmarks"], "region_masks": samples["region_masks"]}
        bar.update(len(block))


def take_stock(plan: Plan, skipped: dict[str, str], args: argparse.Namespace) -> Stock:
    files, rows = find_all_rows(plan, skipped, args.output_dir)
    sources, rows = [source for source, row in zip(plan.sources, rows) if row >= 0], rows[rows >= 0]
    if not sources:
        raise FeatureFileError(
            f"{args.data_root}: none of the images can be used; the reasons are in {args.output_dir / SKIPPED}"
        )
    store = FaceDataset(files, mapped=False)
    columns = {name: column[rows] for name, column in store.columns(*IN_TABLE).items()}
    contents = [row.tobytes() for row in columns["sha256"]]
    found = columns["found_by"] != FOUND_BY.index("mean")
    finished = sum(path.parent.name != SHARDS for path in files)
    return Stock(files, finished, store, rows, sources, contents, found, columns)


def fill_in_means(stock: Stock, in_train: np.ndarray, args: argparse.Namespace) -> None:
    """Mean landmarks and masks, for images without a face, from those of the training (N,) that have one.

    A fallback of each data set's own would name the class; one over all splits would tell training about the test set.
    """
    any_train = in_train.any()  # else all are for the test of a model from elsewhere
    stock.mean_landmarks = mean_over(stock.files, stock.rows[stock.found & (in_train if any_train else True)])
    if stock.mean_landmarks is None:
        raise FeatureFileError(
            f"{args.data_root}: no face found in any image{' of the train split' if any_train else ''}; are these"
            " pictures of faces?"
        )
    size, grid_size = (args.img_size, args.img_size), args.img_size // args.patch_size
    stock.mean_masks = draw_region_masks(stock.mean_landmarks, size, grid_size)


def assemble(plan: Plan, skipped: dict[str, str], args: argparse.Namespace) -> None:
    """Deals the extracted images to the splits, fills in mean landmarks, and writes the feature files."""
    stock = take_stock(plan, skipped, args)
    if not args.search_again:
        report_stale(stock)
    data_sets = [source.data_set for source in stock.sources]
    splits = deal(stock.sources, stock.contents, args)
    report_duplicates(data_sets, stock.contents)
    fill_in_means(stock, splits == SPLITS.index("train"), args)

    common = {
        "settings": json.dumps(plan.settings),
        "dealing": json.dumps(dealing(args)),
        "fingerprint": plan.fingerprint,
        "seed": args.seed,
        "mean_landmarks": stock.mean_landmarks,
    }
    in_data_set, grid_size = np.array(data_sets), args.img_size // args.patch_size
    with tqdm(total=len(stock.sources), desc="writing", unit="image") as bar:
        for path, data_set, split in feature_files(plan, args.output_dir / STAGE):
            members = np.flatnonzero((in_data_set == data_set) & (splits == SPLITS.index(split)))
            if has_fingerprint(path, plan.fingerprint):  # written before the run was stopped
                bar.update(len(members))
                continue
            stats = np.array([stock.sources[i].stat for i in members], np.int64).reshape(-1, 2)
            attributes = {**common, "data_set": data_set, "split": split, "source_stats": stats}
            paths = [stock.sources[i].path.encode("utf-8", "surrogateescape") for i in members]
            # not those of the extraction: a manifest may say otherwise now
            table = {"labels": [CLASSES.index(data_set.split("/")[0])] * len(members), "paths": paths}
            table["about"] = [stock.sources[i].about for i in members]
            table |= {name: values[members] for name, values in stock.columns.items()}
            blocks = read_blocks(stock, members, bar)
            write_features(path, args.img_size, grid_size, attributes, table, blocks, args.compress)


def finish(plan: Plan, skipped: dict[str, str], args: argparse.Namespace) -> None:
    """From extracted images to the feature files and the report of them."""
    if plan.published:
        print(f"{args.output_dir}: up to date")
        before = {
            path: reason
            for path, reason in read_reasons(args.output_dir / SKIPPED).items()
            if reason != NO_IMAGE_BY_NAME
        }
        report_skipped(before, plan.others, args.output_dir)
    else:
        report_skipped(skipped, plan.others, args.output_dir)
        if CHANGED in skipped.values():  # the next run is to look at these again
            sources = [
                source._replace(stat=(-1, -1)) if skipped.get(source.path) == CHANGED else source
                for source in plan.sources
            ]
            plan = plan._replace(sources=sources, fingerprint=fingerprint_of(sources, plan.settings, args))
        assemble(plan, skipped, args)
        if not publish(plan, args.output_dir):
            raise FeatureFileError(
                f"{args.output_dir}: another run has removed what this one wrote; run the same command again"
            )
    for folder in (SHARDS, STAGE):
        shutil.rmtree(args.output_dir / folder, ignore_errors=True)
    data_sets = list(dict.fromkeys(source.data_set for source in plan.sources))
    report(args.output_dir, data_sets)
    others = [
        path.parent
        for path in args.output_dir.glob("*/*/train_features.h5")
        if "/".join(path.parts[-3:-1]) not in data_sets
    ]
    if others:
        print(
            f"WARNING: {', '.join(map(str, others))} is not made from {args.manifest or args.data_root}; remove it, or"
            " name the others to train.py with --datasets"
        )


# --------------------------------------------------------------------------------------------------------------- report


def report_duplicates(data_sets: Sequence[str], contents: Sequence[bytes]) -> None:
    homes = defaultdict(list)
    for data_set, content in zip(data_sets, contents):
        homes[content].append(data_set)
    copies = sum(len(home) - 1 for home in homes.values())
    both = sum(len({data_set.split("/")[0] for data_set in home}) == 2 for home in homes.values())
    if copies:
        print(f"{copies} images are copies of another; copies share a split")
    if both:
        print(f"WARNING: {both} images are there as real and as fake")


def report(output_dir: Path, data_sets: Sequence[str]) -> None:
    """Prints how faces were found, per data set and class. A class with more failures than the other is a shortcut."""
    rows, by_class, filled_by_class, treatments = [], defaultdict(Counter), defaultdict(list), defaultdict(set)
    for data_set in data_sets:
        ways, sizes, filled = Counter(), [], []
        for split in SPLITS:
            with open_features(output_dir / data_set / f"{split}_features.h5") as file:
                found_by = file["found_by"][:]
                filled += file["filled"][:].tolist()
                for treatment in set(file["treatments"].asstr()[:]):
                    treatments[describe_treatment(treatment)].add(data_set)
            sizes.append(len(found_by))
            ways.update(FOUND_BY[code] for code in found_by)
        kind = data_set.split("/")[0]
        by_class[kind] += ways
        filled_by_class[kind] += filled
        rows.append([data_set, *report_row(ways, sizes, filled)])
    rows += [
        [f"all {kind}", *report_row(ways, [""] * len(SPLITS), filled_by_class[kind])] for kind, ways in by_class.items()
    ]
    print("\n" + as_text(["data set", "images", *SPLITS, *FOUND_BY, "filled", "not found"], rows))
    if len(treatments) > 1:
        listed = (f"{', '.join(sorted(names))}: {treatment}" for treatment, names in sorted(treatments.items()))
        print(f"WARNING: preprocess.py treated images differently: {'; '.join(listed)}")


def report_row(ways: Counter, sizes: list, filled: list[float]) -> list[str]:
    """Images, those of each split, how many were found in which way, how much of the crops was filled, and the share of
    images without a face.
    """
    total = max(ways.total(), 1)
    shares = (f"{sum(filled) / total:.1%}", f"{ways['mean'] / total:.1%}")
    return [str(ways.total()), *map(str, sizes), *(str(ways[way]) for way in FOUND_BY), *shares]


def report_stale(stock: Stock) -> None:
    """Of what this run has extracted, also before it was stopped."""
    shards = zip(stock.files[stock.finished :], stock.store.starts[stock.finished :])
    rows = {row for shard, start in shards for row in (start + stale_rows(shard)).tolist()}
    if stale := [source.path for source, row in zip(stock.sources, stock.rows.tolist()) if row in rows]:
        print(
            f"WARNING: {len(stale)} images were changed since preprocess.py aligned them, {min(stale)} for one; their"
            " faces were searched again"
        )


def report_skipped(skipped: dict[str, str], others: list[Path], output_dir: Path) -> None:
    """Lists the files that were not used, with the reason, in skipped.csv."""
    listing = output_dir / SKIPPED
    reasons = skipped | {str(path): NO_IMAGE_BY_NAME for path in others}
    if not reasons:
        listing.unlink(missing_ok=True)
        return
    write_reasons(listing, reasons)
    first = min(skipped or reasons)
    print(f"{len(reasons)} files are not used, listed in {listing}; for one, {first}: {reasons[first]}")


# --------------------------------------------------------------------------------------------------------------- script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data_root", type=Path, help="folder with real/<Name> and fake/<Generator> (default: datasets)")
    option(
        "--manifest",
        type=Path,
        metavar="CSV",
        help="a list instead of folders: path,label,dataset and, optional, split, group, and further columns; paths"
        " begin at --data_root (default: the folder of the list)",
    )
    option("--output_dir", type=Path, default=Path("features"), help="where the feature files go (default: features)")
    option("--predictor", type=Path, help=f"{PREDICTOR_FILE}, if not in this folder or in face_recognition_models")
    option(
        "--without_cnn",
        action="store_true",
        help="do not look with dlib's CNN for faces that the frontal detector misses",
    )
    option(
        "--search_again",
        action="store_true",
        help="search faces in aligned images, too, instead of taking the landmarks that preprocess.py stored with them",
    )
    option("--img_size", type=int, default=224, help="side of the stored images in pixels (default: 224)")
    option(
        "--patch_size",
        type=int,
        default=16,
        help="side of a patch in pixels, for the stored masks; train.py may use another (default: 16)",
    )
    option(
        "--group_by_folder",
        action="store_true",
        help="keep the images of each sub-folder of a data set (an identity) in one split",
    )
    option(
        "--test_only",
        nargs="+",
        type=lambda name: name.rstrip("/"),
        default=[],
        metavar="NAME",
        help="data sets whose images all go to the test split: generators that training must not see (default: none)",
    )
    option(
        "--shares",
        nargs=3,
        type=float,
        default=SHARES,
        metavar=("TRAIN", "VAL", "TEST"),
        help="of each data set; with 0 a split gets nothing (default: 60 20 20)",
    )
    option("--seed", type=int, default=0, help="of the split (default: 0)")
    option(
        "--compress",
        action="store_true",
        help="lossless gzip of the stored images: about a fifth smaller, but slower to read (docs/speed.md)",
    )
    option(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes (default: one a core, fewer where memory is short)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.img_size < 1 or args.patch_size < 1 or args.img_size % args.patch_size:
        raise ValueError("--workers has to be at least 1, and --img_size a multiple of --patch_size")
    if min(args.shares) < 0 or min(args.shares[:2]) == 0:
        raise ValueError("--shares are 0 or more, those of train and val above 0")
    # from twice as many pixels on it is an error, and stays one
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if args.manifest and args.group_by_folder:
        raise ValueError("--group_by_folder is for folders; give the manifest a column group")
    if args.data_root is None:
        args.data_root = args.manifest.parent if args.manifest else Path("datasets")
    output, root = args.output_dir.resolve(), args.data_root.resolve()
    if not args.manifest and (output == root or any(root / kind in (output, *output.parents) for kind in CLASSES)):
        raise ValueError(f"--output_dir {args.output_dir}: lies among the images; name a folder outside of them")
    rank, world, _ = join_processes()
    files = finder_files(args.predictor, not args.without_cnn)
    checksums = files.checksums()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with lock(args.output_dir) if rank == 0 else contextlib.nullcontext():
        plan = make_plan(args, checksums) if rank == 0 else None
        settings, missing = scatter(
            [(plan.settings, plan.missing[r::world]) for r in range(world)] if rank == 0 else None
        )
        if settings["finder"] != checksums:
            raise ValueError(f"{files.predictor}: not the files of rank 0; give all machines the same ones")
        results = gather(extract(missing, settings, files, rank == 0, args))
        if rank == 0:
            finish(plan, {path: reason for skipped in results for path, reason in skipped.items()}, args)
        gather(None)  # nobody leaves before all is done, lest a restart miss one


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    if not under_torchrun():  # which waits for nobody, and starts all again
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command again to go on"))
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    except BrokenProcessPool:
        sys.exit(
            "a worker process was killed (was memory short? try fewer --workers); run the same command again to go on"
        )
    except (ValueError, OSError) as error:  # FeatureFileError among them
        message = " ".join(str(error).split())  # HDF5 breaks lines
        # a full disk, say; errors raised here have no number
        broken = isinstance(error, OSError) and error.errno is not None
        sys.exit(
            f"stopped: {message}; nothing is lost, run the same command again when it is mended" if broken else message
        )
