"""A file to what preprocess.py makes of it: an image to its PNG, a video to PNGs of some frames."""

import argparse
import errno
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from faces.images import ENLARGED, FILLED, TREATMENT, frame_name, is_video, load_rgb, video_of
from faces.originals import find_original, is_made, keep_original
from faces.prepared import filled_of, is_prepared, write_png
from faces.rejection import Rejected
from faces.treatment import treat, treatment_of

LONGEST_NAME = 255  # bytes, on the file systems in use
WITHOUT_ORIGINAL = "without its original"  # an earlier run made the image, of one that is not found


class Outcome(NamedTuple):
    source: Path
    status: str  # "written", "unchanged" or "rejected"; "left out", a frame of a video
    reason: str = ""  # why it was rejected; or ENLARGED, or WITHOUT_ORIGINAL
    filled: float = 0.0  # the share of the crop that lies beyond the picture


def check_size(image: Image.Image, args: argparse.Namespace) -> None:
    if image.height < args.min_height or image.width < args.min_width:
        raise Rejected(f"{image.width}x{image.height} pixels, under the minimum of {args.min_width}x{args.min_height}")


def prepare(source: Path, target: Path, args: argparse.Namespace) -> Outcome:
    """Makes one image; `target` lies beside the source (in place) or in the output folder.

    Raises:
        ValueError: as from treat.
    """
    size, in_place = (args.target_width, args.target_height), args.output_dir is None
    directory, kept = args.directory.resolve(), None
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        return Outcome(source, "rejected", "its PNG would have a name that is too long; rename it")
    if (
        not in_place
        and not args.look_again
        and target.exists()
        and target.stat().st_mtime_ns == source.stat().st_mtime_ns
        and is_prepared(target, size)
    ):
        return Outcome(source, "unchanged", filled=filled_of(target) if args.align else 0.0)
    try:
        image = load_rgb(source)  # in full, a prepared one too: its end may be missing
        prepared = is_prepared(source, size) and not treatment_of(args)
        kept = None if prepared else find_original(source, image)  # better than what was made of it
        # Treated, it was made for an output folder, and its original was never kept beside it
        lost = not prepared and not kept and not image.info[TREATMENT] and is_made(source, image)
        if lost and in_place and not args.discard_originals:
            return Outcome(source, "unchanged", WITHOUT_ORIGINAL)  # once it is replaced, the original would not fit it
        original, image = kept or (source, image)
        check_size(image, args)
        if not prepared:
            image = treat(image, original, args)
    except Rejected as error:
        if not in_place:
            target.unlink(missing_ok=True)  # made when the file, or the minimum, was another
        return Outcome(source, "rejected", str(error))

    if in_place:
        # The original has its second name before the first one goes to the PNG; then that gets its own name. At every
        # moment there is exactly one file in the folder, from which a run that was stopped goes on.
        if not prepared:
            if not kept and not args.discard_originals:
                keep_original(source, directory)
            write_png(image, source, sync=True)
        if source != target:
            os.rename(source, target)
        return Outcome(source, "unchanged" if prepared and source == target else "written")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_png(image, target, sync=False)
    if not lost:  # else the next run looks again for the original
        stat = source.stat()
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by which it knows that the source is the same
    filled = image.info.get(FILLED, 0.0)
    reason = WITHOUT_ORIGINAL if lost else ENLARGED if image.info.get(ENLARGED) else ""
    return Outcome(source, "written", reason, filled)


def prepare_video(source: Path, folder: Path, args: argparse.Namespace) -> list[Outcome]:
    """Makes images of some frames of a video, in a folder. It is rejected if none of them can be used.

    Raises:
        ValueError: as from treat.
    """
    import cv2  # where it is needed

    from faces.videos import sample_frames

    there = [path for path in folder.glob("*.png") if video_of(path) == folder / source.name]
    try:
        stamp, size = source.stat().st_mtime_ns, (args.target_width, args.target_height)
    except OSError as error:
        return [Outcome(source, "rejected", f"cannot be read as a video ({error.strerror})")]
    as_they_were = all(path.stat().st_mtime_ns == stamp and is_prepared(path, size) for path in there)
    if there and not args.look_again and as_they_were:
        return [Outcome(source, "unchanged", filled=filled_of(path) if args.align else 0.0) for path in there]
    for path in there:
        path.unlink()
    outcomes, left_out, made, reason = [], [], [], ""
    try:
        for number, _, image in sample_frames(source, args.frames):
            try:
                check_size(image, args)
                image = treat(image, source, args, image.tobytes)
            except Rejected as error:
                reason = str(error)
                left_out.append(Outcome(source, "left out", reason))
                continue
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / frame_name(source, number)
            write_png(image, target, sync=False)
            made.append(target)
            enlarged = ENLARGED if image.info.get(ENLARGED) else ""
            outcomes.append(Outcome(source, "written", enlarged, image.info.get(FILLED, 0.0)))
    except (Rejected, MemoryError, cv2.error) as error:
        reason = str(error)
    except OSError as error:
        of_video = error.errno == errno.EACCES and str(error.filename) == str(source)
        if not of_video and error.errno != errno.ENAMETOOLONG:
            raise
        reason = error.strerror
    for path in made:  # last of all: frames of a run that was stopped are made anew
        os.utime(path, ns=(stamp, stamp))
    return outcomes + left_out if outcomes else [Outcome(source, "rejected", reason)]


def prepare_file(source: Path, target: Path, args: argparse.Namespace) -> list[Outcome]:
    """Makes the image of an image, or those of a video beside the `target`."""
    return prepare_video(source, target.parent, args) if is_video(source) else [prepare(source, target, args)]
