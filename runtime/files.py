"""Files that are there whole or not at all, names that nobody has taken, room on the disk."""

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False, several: bool = False) -> Iterator[Path]:
    """A path in the same folder to write to. When the block ends well it gets the name `path`; else it is removed.

    Args:
        sync: the content is on the disk before it gets its name.
        several: other processes may write this file at the same time, each with a content of its own.
    """
    # Short, since names may be as long as the file system has them; always the same, so that a later run clears it away
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    partial = path.with_name(f".{name}.{os.getpid()}.partial" if several else f".{name}.partial")
    try:
        yield partial
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the cause is what counts
            partial.unlink(missing_ok=True)
        raise


def save_arrays(path: Path, /, **arrays: np.ndarray | list[bytes]) -> None:
    """Writes an .npz, there whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def why_away(path: Path, follow_links: bool = True) -> str:
    """Why there is no file, "" where there is one."""
    try:
        os.stat(path, follow_symlinks=follow_links)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror
    return ""


def free_path(
    folder: Path,
    stem: str,
    suffix: str = "",
    is_taken: Callable[[Path], bool] = os.path.lexists,
    numbered: bool = False,
    first: int = 1,
) -> Path:
    """The first of stem + suffix, stem_2 + suffix, stem_3 + suffix, ... in the folder that is not taken.

    Args:
        numbered: the first name is stem_1 + suffix instead.
        first: the number of the first name to try.
    """
    numbers = itertools.count(first)
    names = (stem + suffix if number == 1 and not numbered else f"{stem}_{number}{suffix}" for number in numbers)
    return next(path for name in names if not is_taken(path := folder / name))


def check_space(path: Path, needed: int) -> None:
    """HDF5 must not run into a full disk: it cannot let go of the file then, and may take the process down with it."""
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, f"no space left on the disk, {needed} bytes needed and {free} free", str(path))
