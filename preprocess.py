"""Prepares a folder of face images: every usable file becomes an 8-bit RGB PNG of one size, in every class alike.

    any depth of jpg, jpeg, png, bmp, webp  ->  PNG, 224 x 224, the tree kept
    and, with --output_dir, mp4, mov, mkv, webm, avi, gif  ->  clip.mp4.frame000123.png, some frames of each

    python preprocess.py --directory datasets/fake/StyleGAN3                          in place, one by one, atomically
    python preprocess.py --directory ... --discard_originals                          the same, originals are not kept
    python preprocess.py --directory raw/GAN --output_dir datasets/fake/GAN           leaves raw/GAN untouched
    python preprocess.py ... --align --recompress 75-95                               eyes and mouth in one place
    torchrun --nproc_per_node=8 preprocess.py --directory ...                         also over several machines

In place, originals are moved to a folder beside, datasets/fake/StyleGAN3_originals, with their tree; killed at any
moment, each is whole in one of the two. What is made later, in another size or with --align elsewhere, is made of them.

Files that cannot be used go to datasets/fake/StyleGAN3_rejected, with rejected.csv telling why; files that are no
images by their names are listed there too, and stay. A second run finds nothing to do; a run that was stopped goes on.
PNG for all, because a class that keeps its JPEGs while another has PNGs is told by its format (arXiv 2403.17608).
"""

import argparse
import contextlib
import functools
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from faces.images import (
    ENLARGED,
    IMAGE_EXTENSIONS,
    NO_IMAGE_BY_NAME,
    VIDEO,
    is_video,
    list_files,
    list_images,
    video_of,
)
from faces.originals import check_links, check_originals, is_alone, kept_by_stem, originals_folder
from faces.prepare import WITHOUT_ORIGINAL, Outcome, prepare_file
from faces.prepared import plan_outputs
from faces.rejection import BEYOND, NO_FACE, REJECTED_LIST, REJECTED_SUFFIX, is_set_aside, read_reasons, write_reasons
from faces.treatment import ALIGNED_CROP, treatment_of
from runtime.files import free_path, replacing
from runtime.processes import default_workers, gather, join_processes, lock, map_ahead, scatter


@contextlib.contextmanager
def preparing(args: argparse.Namespace) -> Iterator[Callable[[tuple[Path, Path]], list[Outcome]]]:
    """prepare_file of a (source, target), for threads: here, or in as many processes where dlib finds faces.

    dlib holds Python's lock while it searches.

    Raises:
        OSError, ValueError: no predictor.
    """
    if not args.align:
        yield lambda pair: prepare_file(*pair, args)
        return
    from faces.finder import finder_files  # OpenCV and dlib, where they are needed
    from faces.workers import face_workers

    with face_workers(finder_files(args.predictor, not args.without_cnn), args.workers) as pool:
        yield lambda pair: pool.submit(prepare_file, *pair, args).result()


# ---------------------------------------------------------------------------------------------------------- the folders


UNFINISHED = b"unfinished"  # in the note of an output folder whose images are to be looked at again


def claim_output(output: Path, directory: Path, args: argparse.Namespace) -> Callable[[], None]:
    """Notes in the output folder whose images it holds, and how treated, lest others of the same names be mixed in.

    Sets args.look_again where these were made with another minimum size, share that may be filled, or finder. Returns
    what notes that all have been looked at.
    """
    note, treatment = output / ".source", treatment_of(args).encode()
    minimum = f"{args.min_width}x{args.min_height}"
    minimum += f", {args.frames} frames" if args.frames != 16 else ""
    minimum += f", filled {args.max_filled:g}" if args.max_filled < 1 else ""
    minimum = (minimum + (", without CNN" if args.without_cnn else "")).encode()
    known = note.read_bytes().split(b"\0") if note.exists() else []
    holds_images = output.is_dir() and bool(list_images(output))
    if output.is_dir() and (known[0] != os.fsencode(directory) if known and known[0] else holds_images):
        sys.exit(f"{output}: holds images that are not from {directory}; name another --output_dir")
    earlier = (known[2] if len(known) > 2 else b"").decode()
    if holds_images and earlier.encode() != treatment:
        version = " by an earlier version, which filled borders with a mirror image" * (
            earlier == treatment.decode().replace(" on grey", "")
        )
        sys.exit(
            f"{output}: holds images that are {earlier or 'neither aligned nor recompressed'}{version}; name another"
            " --output_dir"
        )
    args.look_again = len(known) >= 2 and known[1] != minimum
    output.mkdir(parents=True, exist_ok=True)
    write_note = functools.partial(write_source, note, directory, treatment)
    # Stopped before it has looked at all again, the next run does so once more
    write_note(UNFINISHED if args.look_again else minimum)
    return functools.partial(write_note, minimum)


def write_source(note: Path, directory: Path, treatment: bytes, settings: bytes) -> None:
    with replacing(note) as partial:
        partial.write_bytes(b"\0".join((os.fsencode(directory), settings, treatment)))


def check_options(args: argparse.Namespace, directory: Path) -> None:
    """Exits where they make no sense."""
    if not directory.is_dir():
        sys.exit(f"{args.directory}: no such folder; --directory takes a folder of images")
    if min(args.target_height, args.target_width, args.workers, args.frames) < 1:
        sys.exit("--target_height, --target_width, --workers and --frames have to be at least 1")
    if args.align and not 0.2 <= args.align <= 2:
        sys.exit(f"--align {args.align:g}: has to be from 0.2 to 2, in parts of FFHQ's square")
    if not args.align and (args.max_filled < 1 or args.without_cnn or args.predictor):
        sys.exit("--max_filled, --without_cnn and --predictor go with --align")
    if not 0 <= args.max_filled <= 1:
        sys.exit(f"--max_filled {args.max_filled:g}: has to be from 0 to 1")
    if args.align and args.target_height != args.target_width:
        sys.exit("--align makes squares: --target_height and --target_width have to be equal")
    if treatment_of(args) and args.output_dir is None:
        sys.exit("--align and --recompress need --output_dir, a folder for each crop and quality")
    if args.output_dir is None:
        if not args.discard_originals:
            check_originals(directory)
        return
    output = args.output_dir.resolve()
    if directory in (output, *output.parents):
        sys.exit(
            f"{args.output_dir}: lies within {args.directory}; name a folder outside, or leave --output_dir away to"
            " work in place"
        )
    for option in ("delete_rejected", "discard_originals"):
        if getattr(args, option):
            sys.exit(f"--{option} works in place only: with --output_dir nothing in --directory is touched")


def plan_work(
    args: argparse.Namespace, directory: Path, locks: contextlib.ExitStack
) -> tuple[list[tuple[Path, Path]], list[Path], list[Outcome], Callable[[], None]]:
    """Each image with the name of what is made of it, the files that are no images by their names, the links that are
    no images of their own, and what to call when the work is done."""
    check_options(args, directory)
    output = args.output_dir.resolve() if args.output_dir is not None else directory
    images, others = list_files(directory)
    videos = [path for path in others if is_video(path)] if args.output_dir is not None else []
    if not images and not videos:
        sys.exit(f"{args.directory}: no images in it ({', '.join(IMAGE_EXTENSIONS)})")
    links = check_links(directory, images) if args.output_dir is None else {}
    images = [image for image in images if image not in links]
    finish = claim_output(output, directory, args) if args.output_dir is not None else lambda: None
    locks.enter_context(lock(output))
    work = [(image, output / name) for image, name in plan_outputs(directory, images).items()]
    work += [(video, output / video.relative_to(directory)) for video in videos]
    targets, others = {target for _, target in work}, [path for path in others if path not in videos]
    if clash := [(image, video_of(target).name) for image, target in work if videos and video_of(target) in targets]:
        sys.exit(f"{clash[0][0]}: has the name that a frame of {clash[0][1]} beside it gets; rename it")
    orphans = [path for path in list_images(output) if path not in targets and video_of(path) not in targets]
    if args.output_dir is not None and orphans:
        print(
            f"WARNING: {len(orphans)} images in {output} are of files that are no longer in {directory}; remove them:"
            f" {orphans[0]} ..."
        )
    of_links = [
        Outcome(link, "rejected", f"is a link to {real.relative_to(directory)}, which is used itself")
        for link, real in links.items()
    ]
    return work, others, of_links, finish


def set_aside(
    rejected: list[Outcome], others: list[Path], directory: Path, folder: Path, move: bool, delete: bool
) -> None:
    """Lists rejected files in folder/rejected.csv, and moves or deletes them if asked.

    The list then holds those of earlier runs, too.

    Args:
        others: files that are no images by their names; listed, never moved.
    """
    # Who has removed one meanwhile knows
    rejected = [outcome for outcome in rejected if os.path.lexists(outcome.source)]
    listing = folder / REJECTED_LIST
    if not rejected and not others:
        if not move:
            listing.unlink(missing_ok=True)  # an earlier run's
        return
    folder.mkdir(parents=True, exist_ok=True)
    reasons = read_reasons(listing) if move else {}  # what earlier runs moved is no longer in the directory
    reasons |= {str(path.relative_to(directory)): VIDEO if is_video(path) else NO_IMAGE_BY_NAME for path in others}
    reasons |= {str(outcome.source.relative_to(directory)): outcome.reason for outcome in rejected}
    write_reasons(listing, reasons)  # before the files go: stopped in between, no file is without its reason
    for outcome in rejected if move else []:
        if delete:
            outcome.source.unlink()
            continue
        place = (folder / outcome.source.relative_to(directory)).parent
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(outcome.source, free_path(place, outcome.source.stem, outcome.source.suffix))


def report(
    results: list[tuple[Counter, list[Outcome], list[float], list[Path]]],
    others: list[Path],
    directory: Path,
    args: argparse.Namespace,
) -> None:
    """Sets the rejected files of all processes aside, and prints what came of the run."""
    counts = sum((counts for counts, *_ in results), Counter())
    rejected = sorted(outcome for _, outcomes, *_ in results for outcome in outcomes)
    filled = [share for *_, shares, _ in results for share in shares]
    in_place = args.output_dir is None
    output = directory if in_place else args.output_dir.resolve()
    rejected_folder = output.with_name(output.name + REJECTED_SUFFIX)
    set_aside(rejected, others, directory, rejected_folder, move=in_place, delete=args.delete_rejected)
    print(f"{output}: {counts['written']} written, {counts['unchanged']} unchanged, {len(rejected)} rejected")
    if in_place and (originals := originals_folder(directory)).is_dir():
        print(f"  originals are in {originals}, with their tree, and take their room until you remove them")
    for outcome in rejected[:10]:
        print(f"  {outcome.source.relative_to(directory)}: {outcome.reason}")
    if rejected:
        fate = ("deleted" if args.delete_rejected else "moved there") if in_place else "left where they were"
        print(
            f"  {'all' if len(rejected) <= 10 else f'... all {len(rejected)}'} listed in"
            f" {rejected_folder / 'rejected.csv'}; {fate}"
        )
    if args.align and (total := counts["written"] + counts["unchanged"] + len(rejected)):
        faceless = sum(outcome.reason == NO_FACE for outcome in rejected)
        print(f"  of {total}, {faceless} have no face that was found ({faceless / total:.1%})")
        if filled:
            print(
                f"  {len(filled)} crops reach over the border of their picture ({len(filled) / total:.1%}), and are"
                f" filled with grey: {sum(filled) / len(filled):.1%} of such a crop, {max(filled):.1%} at the most"
            )
        if beyond := sum(outcome.reason.startswith(BEYOND) for outcome in rejected):
            print(f"  {beyond} were dropped for more, --max_filled {args.max_filled:g} ({beyond / total:.1%})")
    if counts["left out"]:
        print(f"  {counts['left out']} frames of videos, of which others are used, cannot be: most have no face")
    if counts[ENLARGED]:
        print(
            f"WARNING: {counts[ENLARGED]} of the {counts['written']} written were enlarged, their crops have fewer"
            f" pixels than {args.target_width}x{args.target_height}; where classes differ in this, sharpness tells them"
            " apart: take a smaller size for all"
        )
    if lost := sorted(path for *_, paths in results for path in paths):
        fate = "and left as they are" if in_place else "and images of another size were made of these PNGs themselves"
        print(
            f"WARNING: {len(lost)} PNGs, {lost[0]} for one, were made by preprocess.py of originals that are not found,"
            f" {fate}: move these to {originals_folder(directory)}, if they are in a folder of another name"
            + (", or give --discard_originals" if in_place else "")
        )
    if others:
        print(
            f"  {len(others)} files are no images by their names and were left alone,"
            f" {others[0].relative_to(directory)} for one; listed there too"
        )


# --------------------------------------------------------------------------------------------------------------- script


def quality_range(text: str) -> tuple[int, int]:
    """ "90" -> (90, 90), "75-95" -> (75, 95)."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= 100:
        raise argparse.ArgumentTypeError(f"{text}: a JPEG quality from 1 to 100, or two of them as in 75-95")
    return low, high


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="folder of images, any depth")
    parser.add_argument(
        "--output_dir", type=Path, help="where to write; without it the files in --directory are replaced"
    )
    parser.add_argument("--target_height", type=int, default=224, help="height of the output in pixels (default: 224)")
    parser.add_argument("--target_width", type=int, default=224, help="width of the output in pixels (default: 224)")
    parser.add_argument(
        "--min_height", type=int, default=12, help="images under this height in pixels are rejected (default: 12)"
    )
    parser.add_argument(
        "--min_width", type=int, default=12, help="images under this width in pixels are rejected (default: 12)"
    )
    parser.add_argument(
        "--delete_rejected",
        action="store_true",
        help="delete files that cannot be used instead of moving them; in place only",
    )
    parser.add_argument(
        "--discard_originals", action="store_true", help="keep no originals in <directory>_originals; in place only"
    )
    parser.add_argument(
        "--align",
        type=float,
        nargs="?",
        const=ALIGNED_CROP,
        default=0.0,
        metavar="CROP",
        help=(
            "turn and cut out the largest face, eyes and mouth in the same place in all images; CROP is the side in"
            f" parts of FFHQ's alignment (default: {ALIGNED_CROP}). An image without a face is rejected; a crop that"
            " reaches over the border is filled with grey"
        ),
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=16,
        help="of each video, evenly spread, with --output_dir (default: 16); one video's frames share a split",
    )
    parser.add_argument(
        "--max_filled",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="with --align, reject images of whose crop more than this share would be filled (default: 1)",
    )
    parser.add_argument(
        "--without_cnn",
        action="store_true",
        help="with --align, do not look with dlib's CNN for faces that its frontal detector misses",
    )
    parser.add_argument(
        "--recompress",
        type=quality_range,
        metavar="Q",
        help="pass every image through a JPEG of this quality, or of one drawn from the file's content: 75-95",
    )
    parser.add_argument(
        "--predictor", type=Path, help="dlib's 68-point predictor for --align, as for feature_extraction.py"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="threads, with --align processes (default: one a core, fewer where memory is short)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    # from twice as many pixels on it is an error, and stays one
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    kept_by_stem.cache_clear()  # of an earlier run in this process
    directory = args.directory.resolve()
    if is_set_aside(directory) and not is_alone(directory):  # the README's loop comes to them, too
        print(f"{args.directory}: set aside by an earlier run, left alone")
        return
    rank, world, _ = join_processes()
    args.look_again = False
    with contextlib.ExitStack() as locks:
        work, others, rejected, finish = plan_work(args, directory, locks) if rank == 0 else (None, None, [], None)
        mine, args.look_again = scatter(
            [(work[r::world], args.look_again) for r in range(world)] if rank == 0 else None
        )
        counts, filled, lost = Counter(), [], []
        # Threads, since Pillow decodes, resizes and encodes outside of Python's lock
        outcomes = map_ahead(locks.enter_context(preparing(args)), mine, args.workers, ahead=16 * args.workers)
        for of_file in tqdm(outcomes, total=len(mine), desc=directory.name, unit="image", disable=rank > 0):
            rejected += [outcome for outcome in of_file if outcome.status == "rejected"]
            for outcome in of_file:
                if outcome.status == "left out":
                    counts.update(["left out"])
                elif outcome.status != "rejected":
                    counts.update([outcome.status, *([ENLARGED] if outcome.reason == ENLARGED else [])])
                    filled += [outcome.filled] if outcome.filled else []
                    lost += [outcome.source] if outcome.reason == WITHOUT_ORIGINAL else []
        results = gather((counts, rejected, filled, lost))
        if rank == 0:
            finish()
            report(results, others, directory, args)
        gather(None)  # nobody leaves before all is done, lest a restart miss one


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    except BrokenProcessPool:
        sys.exit(
            "a worker process was killed (was memory short? try fewer --workers); run the same command again to go on"
        )
    except ValueError as error:
        sys.exit(f"{error}")
    except OSError as error:  # a full disk, a folder without write permission
        sys.exit(f"stopped: {error}; nothing is lost, run the same command again when it is mended")
