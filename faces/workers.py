"""Processes that look for faces: each holds dlib's detector and predictor, loaded once."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cv2
from PIL import Image

from faces.finder import FaceFinder, FinderFiles
from runtime.processes import end_with, under_torchrun

_finder: FaceFinder | None = None  # one a process; forked workers share the memory of the one that they come from
_files: FinderFiles | None = None  # that it was made of


def load_finder(files: FinderFiles) -> FaceFinder:
    """This process's finder. The files are read once."""
    global _finder, _files
    if files != _files:
        _finder, _files = FaceFinder(files), files
    return _finder


def this_finder() -> FaceFinder:
    """The finder that load_finder has loaded."""
    return _finder


def start_worker(files: FinderFiles, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets what is in hand be finished
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    load_finder(files)
    end_with(parent)


@contextlib.contextmanager
def face_workers(files: FinderFiles, count: int, may_fork: bool = True) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each with a finder.

    Forked workers start at once and share the predictor's memory. Where this process has threads (torchrun's), or
    forking is not safe (macOS), they start from nothing.

    Args:
        may_fork: whether nothing in this process stands against it, as CUDA does.

    Raises:
        ValueError: a file is not what it should be.
    """
    load_finder(files)
    # A forked worker would wait forever for OpenCV's threads, which stay behind
    cv2.setNumThreads(1)
    may_fork = may_fork and sys.platform == "linux" and not under_torchrun()
    method = "fork" if may_fork else "spawn"
    pool = ProcessPoolExecutor(count, get_context(method), start_worker, (files, os.getpid()))
    try:
        pool.submit(int)  # all workers start here, not in a thread beside others at work
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
