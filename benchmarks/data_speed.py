"""How fast the data path is beside bare loops that do nothing but what cannot be left out.

    python benchmarks/data_speed.py                       draws its faces; about eight minutes on two cores
    python benchmarks/data_speed.py --faces FOLDER        with images of your own, 1,000 or more

stage        ours                      beside it, as many bare processes as workers
preprocess   preprocess.py             Pillow: decode, resize, encode as PNG
extraction   feature_extraction.py     decode; dlib's detector, at the size at which it finds the face; its predictor
aligned      feature_extraction.py     decode: of aligned images the landmarks are known
loading      scoring.load_batches      h5py: file["images"][i] and so on of random samples, out of a file that is open

Scripts are timed as a user runs them, on a part of the images and on all: images/s is the difference of images over the
difference of seconds, for both sides alike, and what is left of the smaller run is the start-up. In each round each
side runs once, one right after the other; the figures are medians of the rounds, the ratios those of the medians.
Memory is the largest resident set of any one process of a run, its shared pages included. All files lie in a temporary
folder below the current one.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import FaceDataset
from drawing.render import draw_file
from faces.finder import FOUND_BY, FaceFinder, finder_files
from faces.images import list_images
from samples.feature_files import SPLITS
from samples.transforms import TrainTransform

BATCH_SIZE, SECONDS = 32, 2.0  # of the loader: samples a batch, and how long it is watched
PART = 0.2  # of the images in the smaller run


# ------------------------------------------------------------------------------------------------------- bare processes


def bare_preprocess(job: list, target: str) -> None:
    for path in job:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)
        small.save(Path(target, f"{Path(path).stem}.png"))


def bare_extraction(job: list, target: str) -> None:
    finder = FaceFinder(finder_files())
    for path, upsampling in job:
        picture = np.asarray(Image.open(path).convert("RGB"))
        faces = finder.detector(picture, upsampling)
        if faces:
            finder.predictor(picture, faces[0])


def bare_decoding(job: list, target: str) -> None:
    for path, _ in job:
        np.asarray(Image.open(path).convert("RGB"))


def bare_loading(job: list, target: str) -> None:
    """Prints samples/s of one process that reads chunk after chunk. `target` is a feature file, `job` the seed of the
    order.
    """
    with h5py.File(target) as file:
        columns = [file[name] for name in ("images", "region_masks", "landmarks")]

        def batches() -> Iterator[None]:
            for rows in random_batches(len(columns[0]), *job):
                for row in rows:
                    [column[row] for column in columns]
                yield

        print(samples_per_second(batches()))


def our_loading(job: list, target: str) -> None:
    """Prints samples/s of our loader: job is the number of threads, and whether with the train-time transforms."""
    from evaluation.scoring import load_batches

    num_workers, with_transforms = job
    dataset = FaceDataset([target], transform=TrainTransform() if with_transforms else None)
    print(samples_per_second(load_batches(dataset, ((rows,) for rows in random_batches(len(dataset))), num_workers)))


def torch_loading(job: list, target: str) -> None:
    """Prints samples/s of torch's DataLoader over the same samples, with job[0] worker processes."""
    from torch.utils.data import DataLoader

    dataset = FaceDataset([target])
    print(samples_per_second(iter(DataLoader(dataset, batch_sampler=random_batches(len(dataset)), num_workers=job[0]))))


def random_batches(size: int, seed: int = 0) -> Iterator[list[int]]:
    """Without an end."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(size).tolist()
        yield from (order[start : start + BATCH_SIZE] for start in range(0, size - BATCH_SIZE + 1, BATCH_SIZE))


def samples_per_second(batches: Iterator) -> float:
    for _ in range(50):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += BATCH_SIZE
    return count / (time.perf_counter() - start)


BARE = {
    function.__name__: function
    for function in (bare_preprocess, bare_extraction, bare_decoding, bare_loading, torch_loading, our_loading)
}


# --------------------------------------------------------------------------------------------------------------- timing


def run_together(commands: list[list[str]], watch: bool = True) -> tuple[float, float, list[str]]:
    """Runs programs side by side. Returns seconds, the largest resident set of any of their processes in MB, and what
    they said.

    To look at memory takes a little time; `watch` says whether to.
    """
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    programs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        for command in commands
    ]
    peak = 0
    while any(program.poll() is None for program in programs):
        for program in programs if watch else ():
            try:
                family = [psutil.Process(program.pid)]
                family += family[0].children(recursive=True)
                peak = max(peak, *(process.memory_info().rss for process in family))
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if any(program.returncode for program in programs):
        sys.exit(f"{' '.join(commands[0])} failed")
    return seconds, peak / 2**20, [program.stdout.read() for program in programs]


def bare(name: str, jobs: list[list], target: Path, scratch: Path) -> list[list[str]]:
    """The commands of one bare process a job."""
    commands = []
    for number, job in enumerate(jobs):
        path = scratch / f"job_{number}.json"
        path.write_text(json.dumps(job))
        commands.append([sys.executable, __file__, "--bare", name, str(path), str(target)])
    return commands


def script(name: str, *options: object) -> list[list[str]]:
    return [[sys.executable, str(ROOT / name), *map(str, options)]]


class Measured:
    """Seconds of a run over a part of the images and over all, and its memory, of each round."""

    def __init__(self, sizes: list[int]):
        self.sizes, self.seconds, self.memory = sizes, [[], []], [[], []]

    def add(self, which: int, result: tuple[float, float, list[str]]) -> None:
        self.seconds[which].append(result[0])
        self.memory[which].append(result[1])

    @property
    def rate(self) -> float:
        less, more = map(statistics.median, self.seconds)
        return (self.sizes[1] - self.sizes[0]) / (more - less)

    @property
    def start_up(self) -> float:
        return statistics.median(self.seconds[0]) - self.sizes[0] / self.rate

    @property
    def peak(self) -> list[float]:
        return [statistics.median(values) for values in self.memory]


# --------------------------------------------------------------------------------------------------------------- stages


def draw_originals(folder: Path, count: int) -> None:
    """Faces as demo.py draws them, enlarged to JPEGs of 512 x 512."""
    folder.mkdir(parents=True)
    jobs = [(folder / f"{i:05}.png", None, [0, 0, i]) for i in range(count)]
    with ProcessPoolExecutor() as pool:
        for path, *_ in zip(
            (job[0] for job in jobs),
            tqdm(pool.map(partial(draw_file, size=224), jobs), total=count, desc="drawing", leave=False),
        ):
            Image.open(path).resize((512, 512), Image.Resampling.BICUBIC).save(path.with_suffix(".jpg"), quality=92)
            path.unlink()


def link(paths: list[Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in paths:
        os.link(path, folder / path.name)
    return folder


def measure_preprocess(
    originals: Path, sizes: list[int], workers: int, rounds: int, scratch: Path
) -> tuple[Measured, Measured]:
    ours, floor, paths = Measured(sizes), Measured(sizes), list_images(originals)
    parts = [link(paths[:size], scratch / f"originals_{size}") for size in sizes]
    for _, (which, size) in tqdm(
        list(itertools.product(range(rounds), enumerate(sizes))), desc=f"preprocess, {workers} workers", leave=False
    ):
        for output in ("bare", "ours"):
            shutil.rmtree(scratch / output, ignore_errors=True)
            (scratch / output).mkdir()
        jobs = [[str(path) for path in paths[:size][i::workers]] for i in range(workers)]
        floor.add(which, run_together(bare("bare_preprocess", jobs, scratch / "bare", scratch)))
        ours.add(
            which,
            run_together(
                script(
                    "preprocess.py", "--directory", parts[which], "--output_dir", scratch / "ours", "--workers", workers
                )
            ),
        )
    return ours, floor


def measure_extraction(
    prepared: Path, sizes: list[int], workers: int, rounds: int, scratch: Path, floor_is: str = "bare_extraction"
) -> tuple[Measured, Measured, Path]:
    """Also returns the features folder of all images."""
    ours, floor, paths = Measured(sizes), Measured(sizes), list_images(prepared)
    roots = [link(paths[:size], scratch / f"data_{size}/real/Faces").parent.parent for size in sizes]
    features = scratch / "features"
    command = [
        script("feature_extraction.py", "--data_root", root, "--output_dir", features, "--workers", workers)
        for root in roots
    ]
    run_together(command[1])
    upsampling = {}
    for split in SPLITS:
        with h5py.File(features / f"real/Faces/{split}_features.h5") as file:
            for path, code in zip(file["paths"].asstr()[:], file["found_by"][:]):
                upsampling[Path(path).name] = 0 if FOUND_BY[code] in ("frontal", "original") else 1
    for _, (which, size) in tqdm(
        list(itertools.product(range(rounds), enumerate(sizes))), desc=f"extraction, {workers} workers", leave=False
    ):
        shutil.rmtree(features)
        jobs = [[(str(path), upsampling[path.name]) for path in paths[:size][i::workers]] for i in range(workers)]
        floor.add(which, run_together(bare(floor_is, jobs, prepared, scratch)))
        ours.add(which, run_together(command[which]))
    return ours, floor, features


def measure_loading(file: Path, rounds: int, scratch: Path) -> dict[str, float]:
    """Samples/s of h5py in 1 and 2 processes, our loader with 0 to 2 threads and transforms, torch's DataLoader."""
    runs = {
        "bare 0": bare("bare_loading", [[0]], file, scratch / "a"),
        "bare 2": bare("bare_loading", [[0], [1]], file, scratch / "b"),
        "ours 0": bare("our_loading", [[0, False]], file, scratch / "c"),
        "ours 2": bare("our_loading", [[2, False]], file, scratch / "d"),
        "transforms 0": bare("our_loading", [[0, True]], file, scratch / "e"),
        "transforms 2": bare("our_loading", [[2, True]], file, scratch / "f"),
        "torch 0": bare("torch_loading", [[0]], file, scratch / "g"),
        "torch 2": bare("torch_loading", [[2]], file, scratch / "h"),
    }
    rates = {name: [] for name in runs}
    for _, (name, commands) in tqdm(list(itertools.product(range(rounds), runs.items())), desc="loading", leave=False):
        rates[name].append(sum(float(said) for said in run_together(commands, watch=False)[2]))
    return {name: statistics.median(values) for name, values in rates.items()}


# --------------------------------------------------------------------------------------------------------------- script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, help="folder of images, any depth (default: faces are drawn)")
    parser.add_argument("--images", type=int, default=1000, help="how many of them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 and 2)")
    parser.add_argument("--bare", nargs=3, metavar=("NAME", "JOB", "TARGET"), help=argparse.SUPPRESS)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.bare:
        name, job, target = args.bare
        BARE[name](json.loads(Path(job).read_text()), target)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        work = Path(folder)
        if args.faces:
            link(list_images(args.faces)[: args.images], work / "originals")
        else:
            draw_originals(work / "originals", args.images)
        count = len(list_images(work / "originals"))
        sizes = [int(count * PART), count]
        print(
            f"{count} images, {count * PART:.0f} in the smaller run; {psutil.cpu_count()} cores; medians of"
            f" {args.rounds} rounds\n"
        )
        print(
            "| stage | workers | images/s | bare | ratio | start-up, bare | peak memory of a process, smaller run and"
            " all |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|")

        def show(stage: str, workers: int, ours: Measured, floor: Measured) -> None:
            memory = f"{ours.peak[0]:.0f} MB, {ours.peak[1]:.0f} MB ({ours.peak[1] / ours.peak[0]:.2f})"
            start_up = f"{ours.start_up:.1f} s, {floor.start_up:.1f} s"
            print(
                f"| {stage} | {workers} | {ours.rate:.0f} | {floor.rate:.0f} | **{ours.rate / floor.rate:.2f}** |"
                f" {start_up} | {memory} |",
                flush=True,
            )

        for workers in args.workers:
            scratch = work / f"preprocess_{workers}"
            show("preprocess", workers, *measure_preprocess(work / "originals", sizes, workers, args.rounds, scratch))
        run_together(script("preprocess.py", "--directory", work / "originals", "--output_dir", work / "prepared"))
        for workers in args.workers:
            *measured, features = measure_extraction(
                work / "prepared", sizes, workers, args.rounds, work / f"extraction_{workers}"
            )
            show("extraction", workers, *measured)
        options = ("--directory", work / "originals", "--output_dir", work / "aligned", "--align")
        run_together(script("preprocess.py", *options))
        aligned = list_images(work / "aligned")  # those that have a face
        for workers in args.workers:
            of_aligned = [int(len(aligned) * PART), len(aligned)]
            *measured, _ = measure_extraction(
                work / "aligned", of_aligned, workers, args.rounds, work / f"aligned_{workers}", "bare_decoding"
            )
            show("aligned", workers, *measured)
        for name in "abcdefgh":
            (work / name).mkdir()
        rates = measure_loading(features / "real/Faces/train_features.h5", args.rounds, work)
        for threads in (0, 2):
            mine, floor, transforms, others = (
                rates[f"{name} {threads}"] for name in ("ours", "bare", "transforms", "torch")
            )
            print(f"| loading | {threads} | {mine:.0f} | {floor:.0f} | **{mine / floor:.2f}** | | |")
            print(
                f"| loading, train-time transforms | {threads} | {transforms:.0f} | {floor:.0f} |"
                f" {transforms / floor:.2f} | | |"
            )
            print(
                f"| loading, torch's DataLoader | {threads} | {others:.0f} | {floor:.0f} | {others / floor:.2f} | | |"
            )
        size = sum(path.stat().st_size for path in features.rglob("*.h5"))
        seconds = run_together(
            script(
                "feature_extraction.py",
                "--data_root",
                features.parent / f"data_{count}",
                "--output_dir",
                features,
                "--compress",
            )
        )[0]
        compressed = sum(path.stat().st_size for path in features.rglob("*.h5"))
        said = run_together(bare("our_loading", [[0, False]], features / "real/Faces/train_features.h5", work / "a"))[2]
        print(
            f"\nfeature files: {size / count / 1000:.1f} KB an image;"
            f" with --compress {compressed / count / 1000:.1f} KB"
            f" ({compressed / size:.2f}), written anew in {seconds:.1f} s,"
            f" read at {float(said[0]):.0f} samples/s by one thread"
        )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
