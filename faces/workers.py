"""Processes that look for faces: each holds dlib's detector and predictor, loaded once."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
from PIL import Image

from faces.finder import FaceFinder
from runtime.processes import end_with, under_torchrun

_finder: FaceFinder | None = None  # one a process; forked workers share the memory of the one that they come from
_predictor: Path | None = None  # the file that it was read from


def load_finder(predictor: Path) -> FaceFinder:
    """This process's finder. The file is read once."""
    global _finder, _predictor
    if predictor != _predictor:
        _finder, _predictor = FaceFinder(predictor), predictor
    return _finder


def this_finder() -> FaceFinder:
    """The finder that load_finder has loaded."""
    return _finder


def start_worker(predictor: Path, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets what is in hand be finished
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    cv2.setNumThreads(1)  # the worker processes are the parallelism
    load_finder(predictor)
    end_with(parent)


@contextlib.contextmanager
def face_workers(predictor: Path, count: int, may_fork: bool = True) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each with a finder.

    Forked workers start at once and share the predictor's memory. Where this process has threads (torchrun's), or
    forking is not safe (macOS), they start from nothing.

    Args:
        may_fork: whether nothing in this process stands against it, as CUDA does.

    Raises:
        ValueError: the file is not a dlib shape predictor.
    """
    load_finder(predictor)
    # A forked worker would wait forever for OpenCV's threads, which stay behind
    cv2.setNumThreads(1)
    method = "fork" if sys.platform == "linux" and may_fork and not under_torchrun() else "spawn"
    pool = ProcessPoolExecutor(count, get_context(method), start_worker, (predictor, os.getpid()))
    try:
        pool.submit(int)  # all workers start here, not in a thread beside others at work
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
