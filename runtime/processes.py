"""Many threads, processes and machines at one piece of work: threads ahead, locks, torchrun.

This module knows of nothing else in the repository, and torch is imported only where processes talk to each other.
"""

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Bytes for one worker of any stage: an image of 100 megapixels, and dlib's predictor
WORKER_MEMORY = 600 * 2**20


# -------------------------------------------------------------------------------------------------- threads and workers


def map_ahead(function: Callable[[Any], Any], items: Iterable, workers: int, ahead: int) -> Iterator:
    """map(function, items) in order, computed by threads, no more than `ahead` items ahead of their use: memory stays
    bounded.
    """
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


def default_workers() -> int:
    """One a core that this process may use, fewer where memory is short; torchrun's processes share both."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # the first is Linux's
    fitting = min(cores, psutil.virtual_memory().available // WORKER_MEMORY)
    return max(1, fitting // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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


def end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may be killed: then nobody waits for its work, or a new run does
    it again.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------- torchrun


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_processes(backend: str = "gloo", timeout: timedelta = timedelta(days=30)) -> tuple[int, int, int]:
    """Rank and number of the processes that torchrun started, on any number of machines, and how often it has started
    them again; 0, 1 and 0 where it did not.

    Preparation and extraction share a file system, and talk at the beginning and at the end alone: rank 0 says what is
    to do, all tell what came of it. So work never depends on when a machine sees which file. All wait for the slowest.
    """
    if not under_torchrun():
        return 0, 1, 0
    import torch.distributed as dist  # takes seconds, hence only here
    from torch.distributed.rendezvous import rendezvous

    end_with(os.getppid())
    # torchrun is there, or has been killed meanwhile
    store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=1)))
    store.set_timeout(timeout)
    start = agree_on_start(store, rank, world)
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"start_{start}", store), rank=rank, world_size=world, timeout=timeout
    )
    atexit.register(leave_processes)
    return rank, world, start - 1


def leave_processes() -> None:
    """Before the interpreter ends. Gloo's threads must not outlive it: they abort the process."""
    import torch.distributed as dist

    time.sleep(0.2)  # they want Python's lock, to let go of what was gathered last
    dist.destroy_process_group()


def agree_on_start(store: Any, rank: int, world: int) -> int:
    """The how manieth start of the processes this is, from 1 on, in torchrun's store.

    The store outlives a restart and holds the addresses of the processes before, on which gloo would wait for ever; and
    TORCHELASTIC_RESTART_COUNT is counted by each machine for itself. So rank 0 counts, and tells each process in return
    for a word that is made up by this very process. What earlier ones wrote is no answer to it.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"word_{rank}", word)
        while not (
            store.check([f"answer_{rank}"]) and (answer := store.get(f"answer_{rank}").decode()).startswith(word)
        ):
            time.sleep(0.02)
        store.set(f"heard_{rank}", answer[len(word) :])
        return int(answer[len(word) :])
    # the second, where each start has a new store
    start = max(store.add("starts", 1), int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1)
    silent = set(range(1, world))
    while silent:
        for other in tuple(silent):
            if store.check([f"word_{other}"]):
                store.set(f"answer_{other}", store.get(f"word_{other}") + b"%d" % start)
            if store.check([f"heard_{other}"]) and int(store.get(f"heard_{other}")) == start:
                silent.remove(other)
        time.sleep(0.02)
    return start


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


def agree(*flags: bool) -> list[bool]:
    """Whether any process says so, for each flag; the same answer in all of them."""
    if not under_torchrun():
        return list(flags)
    import torch
    import torch.distributed as dist

    votes = torch.tensor(flags, dtype=torch.uint8)  # on the CPU, gloo's: no waiting for the GPU
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Ends this process with a message where another one has ended while they talk."""
    try:
        yield
    except RuntimeError as error:
        sys.exit(
            f"another process of this run has ended ({str(error).splitlines()[0]}); run the same command again to go on"
        )
