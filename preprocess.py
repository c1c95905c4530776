"""Prepares a folder of face images: every usable file becomes an 8-bit RGB PNG of one size, in every class alike.

    any depth of jpg, jpeg, png, bmp, webp  ->  PNG, 224 x 224, the tree kept

    python preprocess.py --directory datasets/fake/StyleGAN3                          in place, one file at a time, atomically
    python preprocess.py --directory raw/StyleGAN3 --output_dir datasets/fake/StyleGAN3      leaves raw/StyleGAN3 untouched
    python preprocess.py --directory ... --output_dir ... --align --recompress 75-95      eyes and mouth in one place, one JPEG for all
    torchrun --nproc_per_node=8 preprocess.py --directory ...                         also over machines that share the folder

Files that cannot be used go to a folder beside, datasets/fake/StyleGAN3_rejected, with rejected.csv telling why; files that
are no images by their names are listed there too, and stay. A second run finds nothing to do; a run that was stopped goes on.
PNG for all, because a class that keeps its JPEGs while another has PNGs is told by its format (arXiv 2403.17608).
"""

import argparse
import atexit
import contextlib
import csv
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
NO_IMAGE_BY_NAME = f"left alone: its name ends in none of {', '.join(IMAGE_EXTENSIONS)}"  # a reason
REJECTED_SUFFIX = "_rejected"
ALIGNED_CROP = 0.6  # from the brows to the chin; FFHQ's own size reaches over the border of nearly all close-ups, and so names the class of these
NO_FACE, BEYOND = "no face found", "the aligned crop would reach"  # reasons of --align
# What Pillow raises on files that are not, or not all, there: its own errors are OSError, broken PNG chunks SyntaxError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error, Image.DecompressionBombError)
# System errors that are about one file. Any other (a bad disk, a server that is away) may be gone tomorrow: it stops the run.
ABOUT_THE_FILE = (None, errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
WORKER_MEMORY = 600 * 2**20  # bytes for one worker of any stage: an image of 100 megapixels, and dlib's predictor

# In image.info, and as a text chunk in the PNGs written here: what the file was at first. Those PNGs are all alike, and the
# formats and sizes that they came from may name the class: feature_extraction.py keeps them, inference.py warns.
ORIGINAL = "Original"
TREATMENT = "Treatment"  # the same for what --align and --recompress did: "aligned 0.6, JPEG 75-95, 224x224"
ORIGINAL_PATTERN = r"\w+ \d+x\d+"  # "JPEG 1024x768", width x height
TREATMENT_PATTERN = r"(?=aligned|JPEG)(?:aligned ([\d.]+), )?(?:JPEG (\d+)(?:-(\d+))?, )?(\d+)x(\d+)"
ENLARGED = "enlarged"  # in image.info, and an outcome's reason: the aligned crop has fewer pixels than the result
CORNERS = "corners"  # in image.info: (4, 2) of the aligned crop in pixels of the image, from the top left one clockwise

ORIENTATION = 0x0112  # EXIF tag; what to do to see the picture upright, by its value
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Rejected(Exception):
    """A file that cannot be used as an image. The message is the reason."""


# -------------------------------------------------------------------------------------------- reading, shared by all stages


def list_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """All files below the directory: those with an image's extension, and the others, each sorted.

    Follows links to folders, each folder once; skips hidden names. A folder that cannot be read is an error: its images would
    be missed without a word.
    """

    def stop(error: OSError) -> None:
        raise error

    images, others, seen = [], [], set()
    for folder, subfolders, names in os.walk(directory, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                (images if name.lower().endswith(IMAGE_EXTENSIONS) else others).append(Path(folder, name))
    return sorted(images), sorted(others)


def list_images(directory: Path) -> list[Path]:
    return list_files(directory)[0]


def turn_upright(image: Image.Image) -> Image.Image:
    """Undoes the EXIF orientation. Metadata that cannot be read is no reason to do without the picture."""
    try:
        return image.transpose(UPRIGHT[image.getexif()[ORIENTATION]])
    except (*UNREADABLE, AttributeError, TypeError):  # KeyError among them: upright already
        return image


def load_rgb(path: Path) -> Image.Image:
    """Decodes a file as people see it: upright (EXIF orientation), 8-bit RGB, transparent parts on white, first frame only.

    image.info[ORIGINAL] tells what it was before preprocess.py, "JPEG 1024x768", and image.info[TREATMENT] how that treated it.

    Raises:
        Rejected: the file is not an image, or not a whole one.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Rejected("is not a file")  # a pipe, say, on which a read would wait for ever
        with Image.open(path) as file:
            file.load()
            image = turn_upright(file)
        original, treatment = file.info.get(ORIGINAL), str(file.info.get(TREATMENT, ""))
        if not isinstance(original, str) or not re.fullmatch(ORIGINAL_PATTERN, original):
            original = f"{file.format} {image.width}x{image.height}"
        treatment = treatment if re.fullmatch(TREATMENT_PATTERN, treatment) else ""
        if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip at 255
            deep, rounded = np.asarray(image), np.empty(image.size[::-1], np.uint8)
            for row in range(0, len(deep), 256):  # in bands: these numbers take eight bytes
                rounded[row : row + 256] = (deep[row : row + 256].clip(0, 65535) / 257).round()
            image = Image.fromarray(rounded)
        if image.has_transparency_data:
            picture, image = image, Image.new("RGBA", image.size, "white")
            image.alpha_composite(picture.convert("RGBA"))
        image = image if image.mode == "RGB" else image.convert("RGB")
        image.info |= {ORIGINAL: original, TREATMENT: treatment}
        return image
    except MemoryError as error:
        raise Rejected("has more pixels than there is memory for") from error
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in ABOUT_THE_FILE:
            raise
        message = str(error)
        for text in (repr(str(path)), str(path)):  # the path of this run, which would make two runs' lists differ
            message = message.replace(text, path.name)
        raise Rejected(f"cannot be read as an image ({type(error).__name__}: {message})") from error


# --------------------------------------------------------------------------------- many threads and processes, for all stages


def map_ahead(function: Callable[[Any], Any], items: Iterable, workers: int, ahead: int) -> Iterator:
    """map(function, items) in order, computed by threads, no more than `ahead` items ahead of their use: memory stays bounded."""
    items = iter(items)
    with ThreadPoolExecutor(workers) as threads:
        waiting = deque(threads.submit(function, item) for item in itertools.islice(items, ahead))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(threads.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:  # whoever iterates may stop early
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second run off a folder. The system gives the lock back when the process ends, however it does.

    Raises:
        ValueError: another run is at work on it.
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        for attempt in range(50) if fcntl else ():  # the workers of a run that was killed hold it for a moment
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == 49:
                    raise ValueError(f"{folder}: another run is at work on it; wait for its end") from error
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        if handle is not None:
            os.close(handle)


def join_processes(backend: str = "gloo", timeout: timedelta = timedelta(days=30)) -> tuple[int, int, int]:
    """Rank and number of the processes that torchrun started, on any number of machines, and how often it has started them
    again; 0, 1 and 0 where it did not.

    Preparation and extraction share a file system, and talk at the beginning and at the end alone: rank 0 says what is to
    do, all tell what came of it. So work never depends on when a machine sees which file. All wait for the slowest.
    """
    if not under_torchrun():
        return 0, 1, 0
    import torch.distributed as dist  # takes seconds, hence only here
    from torch.distributed.rendezvous import rendezvous

    end_with(os.getppid())
    store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=1)))  # torchrun is there, or has been killed meanwhile
    store.set_timeout(timeout)
    start = agree_on_start(store, rank, world)
    dist.init_process_group(backend, store=dist.PrefixStore(f"start_{start}", store), rank=rank, world_size=world, timeout=timeout)
    atexit.register(leave_processes)
    return rank, world, start - 1


def leave_processes() -> None:
    """Before the interpreter ends. Gloo's threads must not outlive it: they abort the process."""
    import torch.distributed as dist

    time.sleep(0.2)  # they want Python's lock, to let go of what was gathered last
    dist.destroy_process_group()


def end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may be killed: then nobody waits for its work, or a new run does it again."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def agree_on_start(store: Any, rank: int, world: int) -> int:
    """The how manieth start of the processes this is, from 1 on, in torchrun's store.

    The store outlives a restart and holds the addresses of the processes before, on which gloo would wait for ever; and
    TORCHELASTIC_RESTART_COUNT is counted by each machine for itself. So rank 0 counts, and tells each process in return for a
    word that is made up by this very process. What earlier ones wrote is no answer to it.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"word_{rank}", word)
        while not (store.check([f"answer_{rank}"]) and (answer := store.get(f"answer_{rank}").decode()).startswith(word)):
            time.sleep(0.02)
        store.set(f"heard_{rank}", answer[len(word) :])
        return int(answer[len(word) :])
    start = max(store.add("starts", 1), int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1)  # the second, where each start has a new store
    silent = set(range(1, world))
    while silent:
        for other in tuple(silent):
            if store.check([f"word_{other}"]):
                store.set(f"answer_{other}", store.get(f"word_{other}") + b"%d" % start)
            if store.check([f"heard_{other}"]) and int(store.get(f"heard_{other}")) == start:
                silent.remove(other)
        time.sleep(0.02)
    return start


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def scatter(parts: list | None) -> Any:
    """Each process's part of what rank 0 called this with, in the order of ranks."""
    if not under_torchrun():
        return parts[0]
    import torch.distributed as dist

    box = [None]
    with others_alive():
        dist.scatter_object_list(box, parts, src=0)
    return box[0]


def gather(item: Any) -> list:
    """What each process called this with, in the order of ranks, in every process."""
    if not under_torchrun():
        return [item]
    import torch.distributed as dist

    items = [None] * dist.get_world_size()
    with others_alive():
        dist.all_gather_object(items, item)
    return items


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Ends this process with a message where another one has ended while they talk."""
    try:
        yield
    except RuntimeError as error:
        sys.exit(f"another process of this run has ended ({str(error).splitlines()[0]}); run the same command again to go on")


def default_workers() -> int:
    """One a core that this process may use, fewer where memory is short; torchrun's processes share both."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # the first is Linux's
    fitting = min(cores, psutil.virtual_memory().available // WORKER_MEMORY)
    return max(1, fitting // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------- writing


def is_prepared(path: Path, size: tuple[int, int]) -> bool:
    """Whether the header says that the file is what this script writes for a (width, height): then it is left as it is."""
    with open(path, "rb") as file:
        header = file.read(29)  # signature, then the IHDR chunk: width, height, bits, colour type, ..., interlace
        if len(header) < 29 or header[:8] != b"\x89PNG\r\n\x1a\n" or struct.unpack(">IIBB2xB", header[16:29]) != (*size, 8, 2, 0):
            return False
        file.seek(-8, os.SEEK_END)
        if file.read(4) != b"IEND":  # cut off
            return False
    with Image.open(path) as image:
        return turn_upright(image) is image and not image.has_transparency_data and not getattr(image, "is_animated", False)


def write_png(image: Image.Image, path: Path, sync: bool) -> None:
    """Writes to a temporary name in the same folder, then renames: under `path` there is never half a file."""
    # Short, since names may be as long as the file system has them; always the same, so that a later run clears it away.
    partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial")
    text = PngInfo()
    if image.info[ORIGINAL] != f"PNG {image.width}x{image.height}":  # else the file says so itself
        text.add_text(ORIGINAL, image.info[ORIGINAL])
    if image.info[TREATMENT]:
        text.add_text(TREATMENT, image.info[TREATMENT])
    try:
        with open(partial, "wb") as file:
            image.save(file, format="PNG", pnginfo=text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def plan_names(images: list[Path], taken: set[Path]) -> dict[Path, Path]:
    """Each image's name as a PNG. Those that are PNGs keep theirs; a.jpg becomes a.png, or a_jpg.png where that is taken.

    Given the sorted images and the names in use, the plan for what is left is the same at every moment of a run: one that
    was stopped goes on to the same names. Names that differ in case alone count as the same, as some file systems have it.
    """
    used = {str(path).casefold() for path in taken}
    plan = {}
    for image in images:
        tagged = f"{image.stem}_{image.suffix[1:].lower()}"
        candidates = (f"{stem}.png" for stem in itertools.chain((image.stem, tagged), (f"{tagged}_{n}" for n in itertools.count(2))))
        if image.suffix.lower() == ".png":
            plan[image] = image
        else:
            plan[image] = next(path for name in candidates if str(path := image.with_name(name)).casefold() not in used)
        used.add(str(plan[image]).casefold())
    return plan


def plan_outputs(directory: Path, images: list[Path]) -> dict[Path, Path]:
    """{image of list_images(directory): path of its PNG below the output folder}."""
    names = plan_names(images, taken={path for folder in {image.parent for image in images} for path in folder.iterdir()})
    return {image: names[image].relative_to(directory) for image in images}


class Outcome(NamedTuple):
    source: Path
    status: str  # "written", "unchanged" or "rejected"
    reason: str = ""  # why it was rejected; or ENLARGED


def treatment_of(args: argparse.Namespace) -> str:
    """What --align and --recompress ask for, as TREATMENT has it; "" for neither."""
    parts = [f"aligned {args.align:g}"] if args.align else []
    parts += [f"JPEG {'-'.join(map(str, dict.fromkeys(args.recompress)))}"] if args.recompress else []
    return ", ".join([*parts, f"{args.target_width}x{args.target_height}"]) if parts else ""


def describe_treatment(treatment: str) -> str:
    """For messages."""
    return treatment or "resized alone"


def parse_treatment(treatment: str) -> argparse.Namespace:
    """The options that treatment_of has made it from."""
    crop, low, high, width, height = re.fullmatch(TREATMENT_PATTERN, treatment).groups()
    return argparse.Namespace(align=float(crop or 0), recompress=(int(low), int(high or low)) if low else None, target_width=int(width), target_height=int(height))


def recompress(image: Image.Image, source: Path, qualities: tuple[int, int]) -> Image.Image:
    """The image after a JPEG of a quality between the two, both included, drawn from the content of its file."""
    low, high = qualities
    drawn = int.from_bytes(hashlib.sha256(source.read_bytes()).digest()[:8], "big")
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=low + drawn % (high - low + 1))
    decoded = Image.open(stream).convert("RGB")
    decoded.info = image.info
    return decoded


def treat(image: Image.Image, source: Path, args: argparse.Namespace, finder: Any) -> Image.Image:
    """An upright RGB image in its new size, aligned and recompressed where that is asked for.

    Raises:
        Rejected: it cannot be aligned.
        ValueError: it is none as it was taken, but resized or treated by an earlier run.
    """
    size, info, treatment = (args.target_width, args.target_height), image.info, treatment_of(args)
    if treatment and info[TREATMENT]:
        raise ValueError(f"{source}: is {info[TREATMENT]} already; take the originals for {treatment}")
    if args.align and info[ORIGINAL].split()[1] != f"{image.width}x{image.height}":
        raise ValueError(f"{source}: was resized already, it was a {info[ORIGINAL]}; take the originals for --align")
    if args.align:
        from faces import align_face

        aligned = align_face(image, finder, args.target_width, args.align)
        if isinstance(aligned, str):
            raise Rejected(aligned)
        image = aligned
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)  # Pillow widens the filter when it shrinks: antialiased
    if treatment:  # comments and colour profiles go: they could name the class
        info = {ORIGINAL: info[ORIGINAL], TREATMENT: treatment} | (image.info if args.align else {})
    image.info = info
    if args.recompress:
        image = recompress(image, source, args.recompress)
    return image


def prepare(source: Path, target: Path, args: argparse.Namespace) -> Outcome:
    """Makes one image; `target` lies beside the source (in place) or in the output folder.

    Raises:
        ValueError: as from treat.
    """
    size, in_place = (args.target_width, args.target_height), args.output_dir is None
    if not in_place and not args.look_again and target.exists() and target.stat().st_mtime_ns == source.stat().st_mtime_ns and is_prepared(target, size):
        return Outcome(source, "unchanged")
    try:
        image = load_rgb(source)  # in full, a prepared one too: its end may be missing
        if image.height < args.min_height or image.width < args.min_width:
            raise Rejected(f"{image.width}x{image.height} pixels, under the minimum of {args.min_width}x{args.min_height}")
        prepared = is_prepared(source, size) and not treatment_of(args)
        if not prepared:
            image = treat(image, source, args, _finder)
    except Rejected as error:
        if not in_place:
            target.unlink(missing_ok=True)  # made when the file, or the minimum, was another
        return Outcome(source, "rejected", str(error))

    if in_place:
        # Content first, then the name: at every moment there is exactly one file, the original or its PNG.
        if not prepared:
            write_png(image, source, sync=True)
        if source != target:
            os.rename(source, target)
        return Outcome(source, "unchanged" if prepared and source == target else "written")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_png(image, target, sync=False)
    stat = source.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by which the next run knows that the source is the same
    return Outcome(source, "written", ENLARGED if image.info.get(ENLARGED) else "")


_finder: Any = None  # faces.FaceFinder of a worker process, with --align


def start_aligner(predictor: Path, parent: int) -> None:
    global _finder
    import cv2

    from faces import FaceFinder

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    _finder = _finder or FaceFinder(predictor)
    end_with(parent)


@contextlib.contextmanager
def preparing(args: argparse.Namespace) -> Iterator[Callable[[tuple[Path, Path]], Outcome]]:
    """prepare of a (source, target), for threads: here, or in as many processes where faces are found, since dlib holds Python's lock.

    Raises:
        OSError, ValueError: no predictor.
    """
    global _finder
    if not args.align:
        yield lambda pair: prepare(*pair, args)
        return
    from faces import FaceFinder, find_predictor

    predictor = find_predictor(args.predictor)
    _finder = FaceFinder(predictor)  # forked workers share its memory
    context = get_context("fork" if sys.platform == "linux" and not under_torchrun() else "spawn")
    with ProcessPoolExecutor(args.workers, context, start_aligner, (predictor, os.getpid())) as pool:
        pool.submit(int)  # all workers start here, not in a thread
        yield lambda pair: pool.submit(prepare, *pair, args).result()


def read_reasons(listing: Path) -> dict[str, str]:
    """{path: reason} of a list that write_reasons wrote; empty where there is none."""
    if not listing.exists():
        return {}
    with open(listing, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file) if row.keys() >= {"path", "reason"}}


def write_reasons(listing: Path, reasons: dict[str, str]) -> None:
    """Writes {path: reason} as a table, in the order of paths, under its name when it is complete."""
    partial = listing.with_name(f".{listing.name}.{os.getpid()}.partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("path", "reason"), *sorted(reasons.items())])
    os.replace(partial, listing)


def set_aside(rejected: list[Outcome], others: list[Path], directory: Path, folder: Path, move: bool, delete: bool) -> None:
    """Lists rejected files in folder/rejected.csv, and moves or deletes them if asked; the list then holds those of earlier runs, too.

    Args:
        others: files that are no images by their names; listed, never moved.
    """
    rejected = [outcome for outcome in rejected if os.path.lexists(outcome.source)]  # who has removed one meanwhile knows
    listing = folder / "rejected.csv"
    if not rejected and not others:
        if not move:
            listing.unlink(missing_ok=True)  # an earlier run's
        return
    folder.mkdir(parents=True, exist_ok=True)
    reasons = read_reasons(listing) if move else {}  # what earlier runs moved is no longer in the directory
    reasons |= {str(path.relative_to(directory)): NO_IMAGE_BY_NAME for path in others}
    reasons |= {str(outcome.source.relative_to(directory)): outcome.reason for outcome in rejected}
    write_reasons(listing, reasons)  # before the files go: stopped in between, no file is without its reason
    for outcome in rejected if move else []:
        if delete:
            outcome.source.unlink()
            continue
        relative = outcome.source.relative_to(directory)
        place, attempt = folder / relative, 2
        while os.path.lexists(place):
            place, attempt = (folder / relative).with_name(f"{relative.stem}_{attempt}{relative.suffix}"), attempt + 1
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(outcome.source, place)


def claim_output(output: Path, directory: Path, args: argparse.Namespace) -> None:
    """Notes in the output folder whose images it holds, and how treated, lest others with the same names be mixed with them.

    Sets args.look_again where these were made with another minimum size.
    """
    note, minimum, treatment = output / ".source", f"{args.min_width}x{args.min_height}".encode(), treatment_of(args).encode()
    known = note.read_bytes().split(b"\0") if note.exists() else []
    holds_images = output.is_dir() and bool(list_images(output))
    if output.is_dir() and (known[0] != os.fsencode(directory) if known and known[0] else holds_images):
        sys.exit(f"{output}: holds images that are not from {directory}; name another --output_dir")
    earlier = (known[2] if len(known) > 2 else b"").decode()
    if holds_images and earlier.encode() != treatment:
        sys.exit(f"{output}: holds images that are {earlier or 'neither aligned nor recompressed'}; name another --output_dir")
    args.look_again = len(known) >= 2 and known[1] != minimum
    output.mkdir(parents=True, exist_ok=True)
    partial = output / ".source.partial"
    partial.write_bytes(b"\0".join((os.fsencode(directory), minimum, treatment)))
    os.replace(partial, note)


def quality_range(text: str) -> tuple[int, int]:
    """"90" -> (90, 90), "75-95" -> (75, 95)."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= 100:
        raise argparse.ArgumentTypeError(f"{text}: a JPEG quality from 1 to 100, or two of them as in 75-95")
    return low, high


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="folder of images, any depth")
    parser.add_argument("--output_dir", type=Path, help="where to write; without it the files in --directory are replaced")
    parser.add_argument("--target_height", type=int, default=224, help="height of the output in pixels (default: 224)")
    parser.add_argument("--target_width", type=int, default=224, help="width of the output in pixels (default: 224)")
    parser.add_argument("--min_height", type=int, default=12, help="images under this height in pixels are rejected (default: 12)")
    parser.add_argument("--min_width", type=int, default=12, help="images under this width in pixels are rejected (default: 12)")
    parser.add_argument("--delete_rejected", action="store_true", help="delete files that cannot be used instead of moving them; in place only")
    parser.add_argument("--align", type=float, nargs="?", const=ALIGNED_CROP, default=0.0, metavar="CROP", help=f"turn and cut out the largest face, eyes and mouth in the same place in all images; CROP is the side in parts of FFHQ's alignment (default: {ALIGNED_CROP}). Without a face, or with a crop beyond the border, an image is rejected")
    parser.add_argument("--recompress", type=quality_range, metavar="Q", help="pass every image through a JPEG of this quality, or of one drawn from the file's content: 75-95")
    parser.add_argument("--predictor", type=Path, help="dlib's 68-point predictor for --align, as for feature_extraction.py")
    parser.add_argument("--workers", type=int, default=default_workers(), help="threads, with --align processes (default: one a core, fewer where memory is short)")
    return parser


def plan_work(args: argparse.Namespace, directory: Path, locks: contextlib.ExitStack) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Each image with the name of what is made of it, and the files that are no images by their names. Exits on a bad request."""
    if not directory.is_dir():
        sys.exit(f"{args.directory}: no such folder; --directory takes a folder of images")
    if min(args.target_height, args.target_width, args.workers) < 1:
        sys.exit("--target_height, --target_width and --workers have to be at least 1")
    if args.align and not 0.2 <= args.align <= 2:
        sys.exit(f"--align {args.align:g}: has to be from 0.2 to 2, in parts of FFHQ's square")
    if args.align and args.target_height != args.target_width:
        sys.exit("--align makes squares: --target_height and --target_width have to be equal")
    if treatment_of(args) and args.output_dir is None:
        sys.exit("--align and --recompress need --output_dir: the originals are wanted again when another crop or quality is")
    output = directory
    if args.output_dir is not None:
        output = args.output_dir.resolve()
        if output == directory or directory in output.parents:
            sys.exit(f"{args.output_dir}: lies within {args.directory}; name a folder outside, or leave --output_dir away to work in place")
        if args.delete_rejected:
            sys.exit("--delete_rejected works in place only: with --output_dir nothing in --directory is touched")
    images, others = list_files(directory)
    if not images:
        sys.exit(f"{args.directory}: no images in it ({', '.join(IMAGE_EXTENSIONS)})")
    if args.output_dir is not None:
        claim_output(output, directory, args)
    locks.enter_context(lock(output))
    work = [(image, output / name) for image, name in plan_outputs(directory, images).items()]
    if args.output_dir is not None and (orphans := sorted(set(list_images(output)) - {target for _, target in work})):
        print(f"WARNING: {len(orphans)} images in {output} are of files that are no longer in {directory}; remove them: {orphans[0]} ...")
    return work, others


def report(results: list[tuple[dict, list[Outcome]]], others: list[Path], directory: Path, args: argparse.Namespace) -> None:
    """Sets the rejected files of all processes aside, and prints what came of the run."""
    counts = sum((counts for counts, _ in results), Counter())
    rejected = sorted(outcome for _, outcomes in results for outcome in outcomes)
    in_place = args.output_dir is None
    output = directory if in_place else args.output_dir.resolve()
    rejected_folder = output.with_name(output.name + REJECTED_SUFFIX)
    set_aside(rejected, others, directory, rejected_folder, move=in_place, delete=args.delete_rejected)
    print(f"{output}: {counts['written']} written, {counts['unchanged']} unchanged, {len(rejected)} rejected")
    for outcome in rejected[:10]:
        print(f"  {outcome.source.relative_to(directory)}: {outcome.reason}")
    if rejected:
        fate = ("deleted" if args.delete_rejected else "moved there") if in_place else "left where they were"
        print(f"  {'all' if len(rejected) <= 10 else f'... all {len(rejected)}'} listed in {rejected_folder / 'rejected.csv'}; {fate}")
    if args.align and (total := counts["written"] + counts["unchanged"] + len(rejected)):
        faceless = sum(outcome.reason == NO_FACE for outcome in rejected)
        beyond = sum(outcome.reason.startswith(BEYOND) for outcome in rejected)
        print(f"  of {total}, {faceless} have no face that was found ({faceless / total:.1%}), {beyond} would need their border filled ({beyond / total:.1%})")
    if counts[ENLARGED]:
        print(f"WARNING: {counts[ENLARGED]} of the {counts['written']} written were enlarged, their crops have fewer pixels than {args.target_width}x{args.target_height}; where classes differ in this, sharpness tells them apart: take a smaller size for all")
    if others:
        print(f"  {len(others)} files are no images by their names and were left alone, {others[0].relative_to(directory)} for one; listed there too")


def main(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from twice as many pixels on it is an error, and stays one
    directory = args.directory.resolve()
    if directory.name.endswith(REJECTED_SUFFIX):
        print(f"{args.directory}: set aside by an earlier run, left alone")
        return
    rank, world, _ = join_processes()
    args.look_again = False
    with contextlib.ExitStack() as locks:
        work, others = plan_work(args, directory, locks) if rank == 0 else (None, None)
        mine, args.look_again = scatter([(work[r::world], args.look_again) for r in range(world)] if rank == 0 else None)
        counts, rejected = Counter(), []
        # Threads, since Pillow decodes, resizes and encodes outside of Python's lock
        outcomes = map_ahead(locks.enter_context(preparing(args)), mine, args.workers, ahead=16 * args.workers)
        for outcome in tqdm(outcomes, total=len(mine), desc=directory.name, unit="image", disable=rank > 0):
            if outcome.status == "rejected":
                rejected.append(outcome)
            else:
                counts.update([outcome.status, *([ENLARGED] if outcome.reason else [])])
        results = gather((counts, rejected))
        if rank == 0:
            report(results, others, directory, args)
        gather(None)  # nobody leaves before all is done, lest a restart miss one


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    except BrokenProcessPool:
        sys.exit("a worker process was killed (was memory short? try fewer --workers); run the same command again to go on")
    except ValueError as error:
        sys.exit(f"{error}")
    except OSError as error:  # a full disk, a folder without write permission
        sys.exit(f"stopped: {error}; nothing is lost, run the same command again when it is mended")
