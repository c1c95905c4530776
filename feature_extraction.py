"""Finds the face in every image and writes the feature files that train.py and inference.py read.

    datasets/<real|fake>/<Name>/**/*.png  ->  features/<real|fake>/<Name>/{train,val,test}_features.h5

    python feature_extraction.py --data_root datasets --output_dir features
    python feature_extraction.py --data_root datasets --output_dir features --group_by_folder      a folder = an identity

Two steps. First, worker processes take the images in shards of 32: decode, find the face, predict its 68 landmarks, draw the
masks, write the shard. A run that is stopped goes on with the shards that are missing. Then the shards are dealt out to the
three splits and become the feature files. Each carries the fingerprint of the run; train.py and inference.py refuse a mixture.

The 68-point predictor was trained on iBUG 300-W, whose terms exclude commercial use. It is not part of this repository.
"""

import argparse
import bz2
import csv
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from dataset import CLASSES, FOUND_BY, PER_SAMPLE, REGIONS, SCHEMA_VERSION, SPLITS, FeatureFileError, FeatureWriter, draw_region_masks, open_features
from preprocess import IMAGE_EXTENSIONS, REJECTED_SUFFIX, Rejected, list_images, load_rgb

PREDICTOR_FILE = "shape_predictor_68_face_landmarks.dat"
PREDICTOR_URL = f"http://dlib.net/files/{PREDICTOR_FILE}.bz2"
PREDICTOR_SHA256 = "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"

SPLIT_FRACTIONS = (0.6, 0.2, 0.2)  # train, val, test; the authors'
SHARD_SIZE = 32  # images between two points that a stopped run can go on from
SEARCH_SIDE = 480  # a larger image is searched on a copy with this longer side, so that the time for a face does not grow with it
WORKER_MEMORY = 700 * 2**20  # bytes that a worker process takes, libraries and predictor included
PADDING = 0.25  # of each side; brings a face that fills the frame back into the detector's reach


# ------------------------------------------------------------------------------------------------------------------- faces


def find_predictor(given: Path | None) -> Path:
    """The predictor file: the one given, else in the project's root, in the package face_recognition_models, or downloaded.

    Raises:
        FileNotFoundError: nowhere to be had; the message says what to do.
    """
    way_out = "pip install face_recognition_models, or give the file with --predictor"
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"{given}: no such predictor file; {way_out}")
        return given
    root = Path(__file__).parent / PREDICTOR_FILE
    if root.is_file():
        return root
    package = importlib.util.find_spec("face_recognition_models")  # not imported: that needs pkg_resources, now gone
    if package is not None and package.submodule_search_locations:
        packaged = Path(package.submodule_search_locations[0], "models", PREDICTOR_FILE)
        if packaged.is_file():
            return packaged
    try:
        print(f"downloading {PREDICTOR_URL} (64 MB)", file=sys.stderr)
        with urllib.request.urlopen(PREDICTOR_URL, timeout=30) as response:
            content = bz2.decompress(response.read())
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{PREDICTOR_FILE}: not found, and not downloaded ({error}); {way_out}") from error
    if hashlib.sha256(content).hexdigest() != PREDICTOR_SHA256:
        raise FileNotFoundError(f"{PREDICTOR_URL}: has not the checksum {PREDICTOR_SHA256}; {way_out}")
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, root)
    return root


class FaceFinder:
    """dlib's frontal face detector and 68-point predictor, loaded once.

    Raises:
        ValueError: the file is not a dlib shape predictor.
    """

    def __init__(self, predictor: Path):
        import dlib  # only where faces are found

        self.detect = dlib.get_frontal_face_detector()
        try:
            self.predict = dlib.shape_predictor(str(predictor))
        except RuntimeError as error:
            raise ValueError(f"{predictor}: not a dlib shape predictor ({error})") from error

    def __call__(self, image: np.ndarray, upsampling: int = 0, padding: float = 0.0) -> np.ndarray | None:
        """The landmarks of the largest face in a picture.

        Args:
            image: (h, w, 3) uint8 RGB.
            upsampling: how often the picture is doubled before the search; at 0, faces from about 80 pixels on are found.
            padding: border to put around for the search, as a fraction of each side.

        Returns:
            (68, 2) float32, x and y in pixels of the image; None where no face was found.
        """
        pad_y, pad_x = round(image.shape[0] * padding), round(image.shape[1] * padding)
        searched = cv2.copyMakeBorder(image, pad_y, pad_y, pad_x, pad_x, cv2.BORDER_REPLICATE)
        faces = self.detect(searched, upsampling)
        if not faces:
            return None
        shape = self.predict(searched, max(faces, key=lambda face: face.area()))
        return np.array([(point.x - pad_x, point.y - pad_y) for point in shape.parts()], np.float32)


def find_face(image: Image.Image, finder: FaceFinder, img_size: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Turns an RGB image of any size into what the feature files hold of it, searching for the face with growing effort.

    The stored image is searched first, so that an image gives the same landmarks before and after preprocess.py, and those
    of a class are not better for its larger files. Only if no face is found there, the image in its own proportions is
    searched, then the stored image with a border around.

    Returns:
        stored image (img_size, img_size, 3) uint8 RGB, as preprocess.py would have made it; landmarks (68, 2) float32 in its
        pixels, None where no face was found; and which of FOUND_BY.
    """
    stored = np.asarray(image if image.size == (img_size, img_size) else image.resize((img_size, img_size), Image.Resampling.LANCZOS))
    if (landmarks := finder(stored)) is not None:
        return stored, landmarks, "frontal"
    if (landmarks := finder(stored, upsampling=1)) is not None:
        return stored, landmarks, "upsampled"
    if image.size != (img_size, img_size):
        search = image.copy()
        search.thumbnail((SEARCH_SIDE, SEARCH_SIDE))
        if (landmarks := finder(np.asarray(search))) is not None:
            scale = np.float32(img_size) / np.array(search.size, np.float32)  # (x, y)
            return stored, (landmarks + 0.5) * scale - 0.5, "original"  # between centres of pixels
    if (landmarks := finder(stored, upsampling=1, padding=PADDING)) is not None:
        return stored, landmarks, "padded"
    return stored, None, "mean"


# --------------------------------------------------------------------------------------------------- step 1: images -> shards


class Shard(NamedTuple):
    """Some images of one data set. `file` is named by a hash of all that its content depends on."""

    data_set: str  # "fake/StyleGAN3"
    images: list[Path]
    file: Path


def find_data_sets(data_root: Path) -> dict[str, list[Path]]:
    """{"real/FFHQ": [images], ...}, real first, in the order of names.

    Raises:
        FileNotFoundError: the layout is another one, or a data set is without images.
    """
    layout = f"the layout is {data_root}/<real|fake>/<Name>/..., any depth below"
    if not data_root.is_dir():
        raise FileNotFoundError(f"{data_root}: no such folder; {layout}")
    data_sets = {}
    for kind in CLASSES:
        folders = sorted(path for path in (data_root / kind).glob("*") if path.is_dir() and not path.name.startswith("."))
        for folder in folders:
            if not folder.name.endswith(REJECTED_SUFFIX):
                data_sets[f"{kind}/{folder.name}"] = list_images(folder)
        loose = sorted(path for path in (data_root / kind).glob("*.*") if path.is_file() and path.suffix.lower() in IMAGE_EXTENSIONS)
        if loose:
            raise FileNotFoundError(f"{loose[0]}: {len(loose)} images lie in no data set's folder; {layout}")
    if not data_sets:
        raise FileNotFoundError(f"{data_root}: no data set in it; {layout}")
    if empty := [name for name, images in data_sets.items() if not images]:
        raise FileNotFoundError(f"{data_root / empty[0]}: no images in it; add some or remove the folder")
    return data_sets


def plan_shards(data_sets: dict[str, list[Path]], data_root: Path, folder: Path, settings: dict) -> list[Shard]:
    """Cuts the sorted list of images into shards. A changed file or setting makes another name, hence a new shard."""
    shards = []
    for data_set, images in data_sets.items():
        for start in range(0, len(images), SHARD_SIZE):
            some = images[start : start + SHARD_SIZE]
            stats = [os.stat(path) if path.exists() else None for path in some]  # None: a link to nowhere
            content = [(str(path.relative_to(data_root)), s and (s.st_size, s.st_mtime_ns)) for path, s in zip(some, stats)]
            key = hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()
            shards.append(Shard(data_set, some, folder / f"{key}.h5"))
    return shards


_finder: FaceFinder | None = None  # one a worker process


def start_worker(predictor: Path, parent: int) -> None:
    global _finder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets the shards in hand be finished
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    _finder = FaceFinder(predictor)

    def follow_parent() -> None:
        try:
            program = psutil.Process(parent)
            while program.is_running() and program.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        finally:  # psutil.NoSuchProcess is the same news
            os._exit(1)  # the program was killed: nobody waits for this worker

    threading.Thread(target=follow_parent, daemon=True).start()


def extract_shard(shard: Shard, data_root: Path, img_size: int, grid_size: int) -> int:
    """Writes one shard, a feature file whose samples without a face have NaN for landmarks. Returns the number of images."""
    samples, skipped = defaultdict(list), {}
    for path in shard.images:
        relative = str(path.relative_to(data_root))
        try:
            image = load_rgb(path)
        except Rejected as reason:
            skipped[relative] = str(reason)
            continue
        stored, landmarks, found_by = find_face(image, _finder, img_size)
        samples["images"].append(stored)
        samples["landmarks"].append(np.full((68, 2), np.nan) if landmarks is None else landmarks)
        samples["region_masks"].append(draw_masks(landmarks, img_size, grid_size))
        samples["labels"].append(CLASSES.index(shard.data_set.split("/")[0]))
        samples["paths"].append(relative.encode("utf-8", "surrogateescape"))
        samples["found_by"].append(FOUND_BY.index(found_by))
        samples["sha256"].append(np.frombuffer(hashlib.sha256(stored.tobytes()).digest(), np.uint8))
    attributes = {"skipped": json.dumps(skipped)}
    with FeatureWriter(shard.file, img_size, grid_size, attributes) as writer:
        if samples:
            writer.append(**{name: rows if name == "paths" else np.stack(rows) for name, rows in samples.items()})
    return len(shard.images)


def draw_masks(landmarks: np.ndarray | None, img_size: int, grid_size: int) -> np.ndarray:
    if landmarks is None:
        return np.zeros((len(REGIONS), grid_size, grid_size), np.float32)
    return draw_region_masks(landmarks, (img_size, img_size), grid_size)


def extract(shards: list[Shard], predictor: Path, args: argparse.Namespace) -> None:
    """Makes the shards that are missing, in worker processes."""
    missing = [shard for shard in shards if not shard.file.exists()]
    total = sum(len(shard.images) for shard in shards)
    done = total - sum(len(shard.images) for shard in missing)
    if done:
        print(f"going on: {done} of {total} images were done before")
    FaceFinder(predictor)  # an unusable predictor file is better found here than in every worker
    # A fork of this process would inherit locks that threads of torch or cv2 hold, so workers come from a clean one.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context(method), start_worker, (predictor, os.getpid()))
    try:
        futures = [pool.submit(extract_shard, shard, args.data_root, args.img_size, args.img_size // args.patch_size) for shard in missing]
        with tqdm(total=total, initial=done, desc="faces", unit="image", smoothing=0.05) as bar:
            for future in futures:
                bar.update(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- step 2: shards -> feature files


def deal_splits(data_sets: Sequence[str], contents: Sequence[bytes], groups: Sequence[str | None], seed: int) -> np.ndarray:
    """Deals samples to train, val and test, 60/20/20 in every data set, by nothing but the content of the files.

    Samples of the same content, and of the same group, stay together, whatever data sets they are in. The bundles that
    result are taken in an order drawn from content and seed, large ones first, and each goes where its data sets are
    furthest from their share.

    Args:
        data_sets: each sample's data set.
        contents: each sample's hash.
        groups: each sample's group, None for those on their own.

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

    def turn(members: list[int]) -> tuple[int, bytes]:
        return -len(members), hashlib.sha256(str(seed).encode() + min(contents[i] for i in members)).digest()

    share = {name: np.array(SPLIT_FRACTIONS) * count for name, count in Counter(data_sets).items()}  # (3,)
    dealt = {name: np.zeros(len(SPLITS)) for name in share}
    splits = np.empty(len(contents), int)
    for members in sorted(bundles.values(), key=turn):
        filled = sum(dealt[data_sets[i]] / share[data_sets[i]] for i in members)
        split = int(np.argmin(filled))  # the first of equals: train
        splits[members] = split
        for i in members:
            dealt[data_sets[i]][split] += 1
    return splits


def assemble(shards: list[Shard], fingerprint: str, args: argparse.Namespace) -> None:
    """Deals the samples of all shards to the splits, fills in mean landmarks, and writes the feature files."""
    data_sets, contents, groups = [], [], []
    for shard in shards:
        with open_features(shard.file) as file:
            contents += [row.tobytes() for row in file["sha256"][:]]
            parts = [path.split("/") for path in file["paths"].asstr("utf-8", "surrogateescape")[:]]
        data_sets += [shard.data_set] * len(parts)
        # real/FFHQ/person/video/1.png: the person, whatever folders are below
        groups += ["/".join(part[:3]) if args.group_by_folder and len(part) > 3 else None for part in parts]
    splits = deal_splits(data_sets, contents, groups, args.seed)
    report_duplicates(data_sets, contents)

    # A fallback of each data set's own would name the class; one over all splits would tell training about the test set.
    total, count, start = np.zeros((68, 2)), 0, 0
    for shard in shards:
        with open_features(shard.file) as file:
            landmarks = file["landmarks"][:].astype(np.float64)
        chosen = landmarks[(splits[start : start + len(landmarks)] == 0) & np.isfinite(landmarks[:, 0, 0])]
        total, count, start = total + chosen.sum(axis=0), count + len(chosen), start + len(landmarks)
    if not count:
        raise FeatureFileError(f"{args.data_root}: no face found in any image of the train split; are these pictures of faces?")
    mean_landmarks = (total / count).astype(np.float32)
    grid_size = args.img_size // args.patch_size
    mean_masks = draw_region_masks(mean_landmarks, (args.img_size, args.img_size), grid_size)

    start = 0
    for data_set in tqdm(dict.fromkeys(shard.data_set for shard in shards), desc="writing", unit="data set"):
        folder = args.output_dir / data_set
        for abandoned in folder.glob(".*.partial"):  # of a run that was killed
            abandoned.unlink()
        attributes = {"data_set": data_set, "fingerprint": fingerprint, "seed": args.seed, "mean_landmarks": mean_landmarks}
        with ExitStack() as stack:
            writers = [
                stack.enter_context(FeatureWriter(folder / f"{split}_features.h5", args.img_size, grid_size, {**attributes, "split": split}))
                for split in SPLITS
            ]
            for shard in (shard for shard in shards if shard.data_set == data_set):
                with open_features(shard.file) as file:
                    rows = {name: file[name][:] for name in PER_SAMPLE}
                faceless = np.isnan(rows["landmarks"][:, 0, 0])
                rows["landmarks"][faceless], rows["region_masks"][faceless] = mean_landmarks, mean_masks
                dealt = splits[start : start + len(faceless)]
                for split, writer in enumerate(writers):
                    writer.append(**{name: values[dealt == split] for name, values in rows.items()})
                start += len(faceless)


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
    by_class = defaultdict(Counter)
    for data_set in data_sets:
        ways, sizes = Counter(), []
        for split in SPLITS:
            with open_features(output_dir / data_set / f"{split}_features.h5") as file:
                found_by = file["found_by"][:]
            sizes.append(len(found_by))
            ways.update(FOUND_BY[code] for code in found_by)
        by_class[data_set.split("/")[0]] += ways
        rate = f"{ways['mean'] / max(sum(sizes), 1):>12.1%}"
        print(f"{data_set:<28}{sum(sizes):>8}" + "".join(f"{n:>8}" for n in sizes) + "".join(f"{ways[way]:>11}" for way in FOUND_BY) + rate)
    for kind, ways in by_class.items():
        print(f"{'all ' + kind:<28}{ways.total():>8}{'':>24}" + "".join(f"{ways[way]:>11}" for way in FOUND_BY) + f"{ways['mean'] / max(ways.total(), 1):>12.1%}")


def report_skipped(shards: list[Shard], output_dir: Path) -> None:
    """Lists files that are no images, with the reason, in skipped.csv."""
    skipped = {}
    for shard in shards:
        with open_features(shard.file) as file:
            skipped |= json.loads(file.attrs["skipped"])
    listing = output_dir / "skipped.csv"
    listing.unlink(missing_ok=True)
    if skipped:
        with open(listing, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([("path", "reason"), *skipped.items()])
        print(f"{len(skipped)} files cannot be used, listed in {listing}; the first: {next(iter(skipped))}: {next(iter(skipped.values()))}")


def is_finished(output_dir: Path, data_sets: Sequence[str], fingerprint: str) -> bool:
    """Whether all feature files are there and made from exactly these images and settings."""
    for data_set in data_sets:
        for split in SPLITS:
            try:
                with open_features(output_dir / data_set / f"{split}_features.h5") as file:
                    if file.attrs.get("fingerprint") != fingerprint:
                        return False
            except FeatureFileError:
                return False
    return True


# ------------------------------------------------------------------------------------------------------------------ script


def default_workers() -> int:
    """One process a core that this one may use, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # the first is Linux's
    return max(1, min(cores, psutil.virtual_memory().available // WORKER_MEMORY))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder with real/<Name> and fake/<Generator> (default: datasets)")
    parser.add_argument("--output_dir", type=Path, default=Path("features"), help="where the feature files go (default: features)")
    parser.add_argument("--predictor", type=Path, help=f"{PREDICTOR_FILE}, if not in this folder or in face_recognition_models")
    parser.add_argument("--img_size", type=int, default=224, help="side of the stored images in pixels (default: 224)")
    parser.add_argument("--patch_size", type=int, default=16, help="side of a patch in pixels, for the stored masks; train.py may use another (default: 16)")
    parser.add_argument("--group_by_folder", action="store_true", help="keep the images of each sub-folder of a data set (an identity) in one split")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one a core, fewer where memory is short)")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.img_size < 1 or args.patch_size < 1 or args.img_size % args.patch_size:
        raise ValueError("--workers has to be at least 1, and --img_size a multiple of --patch_size")
    data_sets = find_data_sets(args.data_root)
    predictor = find_predictor(args.predictor)
    settings = {"schema": SCHEMA_VERSION, "img_size": args.img_size, "patch_size": args.patch_size, "search": [SEARCH_SIDE, PADDING]}
    settings["predictor"] = hashlib.sha256(predictor.read_bytes()).hexdigest()

    shard_folder = args.output_dir / ".shards"
    shards = plan_shards(data_sets, args.data_root, shard_folder, settings)
    whole = [[shard.file.name for shard in shards], args.seed, args.group_by_folder, SPLIT_FRACTIONS]
    fingerprint = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    if is_finished(args.output_dir, list(data_sets), fingerprint):
        print(f"{args.output_dir}: up to date")
    else:
        extract(shards, predictor, args)
        report_skipped(shards, args.output_dir)
        assemble(shards, fingerprint, args)
    shutil.rmtree(shard_folder, ignore_errors=True)
    report(args.output_dir, list(data_sets))
    others = [path.parent for path in args.output_dir.glob("*/*/train_features.h5") if "/".join(path.parts[-3:-1]) not in data_sets]
    if others:
        print(f"WARNING: {', '.join(map(str, others))} is not made from {args.data_root}; remove it, or name the others to train.py with --datasets")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command again to go on"))
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    except BrokenProcessPool:
        sys.exit("a worker process was killed (was memory short? try fewer --workers); run the same command again to go on")
    except (ValueError, OSError) as error:  # FeatureFileError among them
        sys.exit(f"{error}")
