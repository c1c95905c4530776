"""Shared by all tests: small data sets, made once by the project's own scripts, and a runner for the scripts."""

import os

# Before torch is imported. Each process of a test run has one core at the most: two threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import functools
import io
import json
import shutil
import struct
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import dlib
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

if not torch.cuda.is_available():  # before attention is imported: its kernels then run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import train  # noqa: E402
from drawing.render import draw_face  # noqa: E402
from training import record  # noqa: E402

# For scripts that run_here runs in this process: dlib's 100 MB take half a second to read
for maker in ("get_frontal_face_detector", "shape_predictor", "cnn_face_detection_model_v1"):
    setattr(dlib, maker, functools.cache(getattr(dlib, maker)))

ROOT = Path(__file__).parent.parent
GENERATORS = ("IrisMismatch", "OffAxisMouth")
MAIN = ("__main__", "__mp_main__")  # the second is what its spawned workers call it
NO_IMAGES_BY_NAME = ("notes.txt", "animated.gif")  # of hostile_files


def launcher(processes: int, *torchrun: str) -> list[str]:
    """The beginning of a command that runs a script: python, or torchrun with so many processes."""
    command = [sys.executable]
    return (
        command + ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
        if processes
        else command
    )


def save_with_texts(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """A PNG with these text chunks, as preprocess.py writes them, whatever they say."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    image.save(path, pnginfo=info)


def run_script(
    *command: object, cwd: Path, expect: int | None = 0, processes: int | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a script as a user would, and checks the exit code.

    Args:
        processes: None, in this process, which saves the seconds of importing torch; 0, by `python script.py ...`;
            more, by torchrun with so many.
        environment: variables for the script, which then runs in a process of its own.
    """
    script, *arguments = map(str, command)
    done = (
        run_here(script, arguments, cwd)
        if processes is None and not environment
        else subprocess.run(
            [*launcher(processes or 0), str(ROOT / script), *arguments],
            cwd=cwd,
            env={**os.environ, **environment},
            text=True,
            capture_output=True,
            timeout=300,
        )
    )
    if expect is not None:
        assert done.returncode == expect, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


SEVERAL = """import functools, json, sys
sys.path.insert(0, {root!r})
import {script} as script

script.join_processes = functools.cache(script.join_processes)
for arguments in json.loads(sys.argv[1]):
    script.main(script.get_args_parser().parse_args(arguments))
"""


def one_after_another(script: str, runs: list[list], cwd: Path, processes: int = 2, *torchrun: str) -> list[str]:
    """The command of several runs of a script in one torchrun, which saves the seconds of starting it."""
    program = cwd / f"several_{Path(script).stem}.py"
    program.write_text(SEVERAL.format(root=str(ROOT), script=Path(script).stem))
    return [*launcher(processes, *torchrun), str(program), json.dumps([list(map(str, run)) for run in runs])]


def run_one_after_another(script: str, runs: list[list], cwd: Path, processes: int = 2) -> str:
    """Runs them. Returns what they printed."""
    command = one_after_another(script, runs, cwd, processes)
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"{runs} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_here(script: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """A script from its first line to its exit code. One thread, as in a process of its own: the same bits."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, argv, threads, code = os.getcwd(), sys.argv, torch.get_num_threads(), 0
    main = ModuleType("__main__")
    main.__file__ = str(ROOT / script)
    known = {name: sys.modules[name] for name in MAIN if name in sys.modules}
    try:
        sys.modules |= dict.fromkeys(MAIN, main)
        os.chdir(cwd)
        sys.argv = [script, *arguments]
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(compile((ROOT / script).read_text(), main.__file__, "exec"), main.__dict__)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr)
            except Exception:
                code = 1
                traceback.print_exc()
    finally:
        sys.modules |= known
        os.chdir(before)
        sys.argv = argv
        torch.set_num_threads(threads)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess([script, *arguments], code, stdout, stderr)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The message of a script that refused. It has to be a sentence for its user, not a traceback."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def refusal(script: ModuleType, *arguments: object) -> str:
    """The message with which a script refuses; here in this process, which saves starting one."""
    # What every script's guard turns into one line
    with pytest.raises((ValueError, OSError, FloatingPointError, SystemExit)) as error:
        script.main(script.get_args_parser().parse_args([str(argument) for argument in arguments]))
    return str(error.value)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def decompression_bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10000)))
        + chunk(b"IEND", b"")
    )


def odd_exif() -> bytes:
    """Orientation 6, and a date that is a fraction: Pillow reads it and fails to write it again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0132, 5, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + struct.pack("<II", 1, 3)


def hostile_files(folder: Path) -> dict[str, str]:
    """All that a folder of images may hold. Returns {relative path: part of the reason} of what preprocess.py cannot
    use.
    """
    (folder / "a b/ç").mkdir(parents=True)
    picture(300, 200, 1).save(folder / "same.jpg")
    picture(300, 200, 2).save(folder / "same.bmp")
    picture(224, 224, 3).save(folder / "same.png")
    picture(90, 90, 4).save(folder / "same.JPG", "JPEG")
    picture(640, 480, 5).save(folder / "a b/ç/new\nline é.webp")
    picture(64, 64, 6).save(folder / "-dash.jpeg")
    picture(100, 80, 7).convert("CMYK").save(folder / "cmyk.jpg")
    picture(100, 80, 8).convert("P").save(folder / "palette.png", transparency=0)
    picture(224, 224, 9).save(folder / "colour_key.png", transparency=(1, 2, 3))
    picture(100, 80, 10).convert("L").save(folder / "gray.jpg")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time at which it was made
    picture(100, 80, 11).save(folder / "icc.jpg", icc_profile=bytes(profile))
    picture(50, 50, 12).save(folder / "animated.webp", save_all=True, append_images=[picture(50, 50, 13)])
    picture(224, 224, 14).save(folder / "interleaved.png")
    Image.fromarray(np.linspace(0, 65535, 224 * 224).reshape(224, 224).astype(np.uint16)).save(folder / "sixteen.png")

    picture(120, 90, 18).save(folder / "twin.jpg")
    shutil.copy(folder / "twin.jpg", folder / "twin_copy.jpg")
    picture(120, 90, 19).save(folder / "jpeg_inside.png", "JPEG")  # another format than the name says
    picture(20000, 30, 20).save(folder / "wide.jpg")
    picture(64, 64, 21).convert("LA").save(folder / "gray_alpha.png")

    (folder / "text.jpg").write_text("not an image")
    (folder / "notes.txt").write_text("not an image, and not called one")
    picture(50, 50, 22).save(folder / "animated.gif")
    (folder / "bomb.png").write_bytes(decompression_bomb(20000, 20000))
    picture(64, 64, 23).save(folder / "locked.png")
    (folder / "locked.png").chmod(0)
    (folder / "empty.png").write_bytes(b"")
    picture(3, 3).save(folder / "tiny.png")
    picture(500, 1).save(folder / "line.png")
    picture(11, 40).save(folder / "narrow.png")
    picture(40, 11).save(folder / "low.png")
    os.mkfifo(folder / "pipe.png")
    picture(64, 64, 15).save(folder / "odd_exif.jpg", exif=odd_exif())
    picture(64, 64, 16).save(folder / "garbage_exif.png", exif=b"garbage")
    picture(64, 64, 17).save(folder / ("長" * 79 + ".jpg"))  # nearly as long as a name may be
    (folder / "cut.jpg").write_bytes((folder / "same.jpg").read_bytes()[:3000])
    whole = (folder / "same.png").read_bytes()
    (folder / "cut_224.png").write_bytes(whole[: len(whole) // 2])
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("loop.png", folder / "loop.png")
    return {
        "text.jpg": "cannot be read",
        "bomb.png": "decompression bomb",
        "empty.png": "cannot be read",
        "tiny.png": "3x3 pixels, under the minimum of 12x12",
        "line.png": "500x1 pixels",
        "narrow.png": "11x40",
        "low.png": "40x11",
        "pipe.png": "not a file",
        "cut.jpg": "truncated",
        "cut_224.png": "cannot be read",
        "dangling.png": "No such file",
        "loop.png": "symbolic links",
        **{name: "left alone: its name ends in none of" for name in NO_IMAGES_BY_NAME},
        **({} if os.access(folder / "locked.png", os.R_OK) else {"locked.png": "Permission denied"}),
    }


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch) -> None:
    """The pictures of a training take longer than the trainings of the tests.

    A training inside of a test, in this process, draws them where the test says by the marker that it looks at them.
    Trainings of fixtures that are made once for all tests, and those in a process of their own, always do.
    """
    if not request.node.get_closest_marker("pictures"):
        for module in (record, train):  # the second as a module, the first for run_here
            monkeypatch.setattr(module, "draw_pictures", lambda run: None)


# ---------------------------------------------------------------------------------------------- made once for all tests


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder that make(folder) has filled, once for all of pytest-xdist's workers.

    Tests only read such folders; what they change they copy before.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, is_made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not is_made.exists():
                folder.mkdir()
                make(folder)
                is_made.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def datasets(made_once) -> Path:
    """A data root of drawn faces in the documented layout: 60 real, 2 generators of 30, one picture of nobody."""

    def draw(folder: Path) -> None:
        rng, root = np.random.default_rng(0), folder / "datasets"
        for name, generator, count in (
            ("real/Consistent", None, 60),
            *((f"fake/{name}", name, 30) for name in GENERATORS),
        ):
            (root / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw_face(rng, generator)).save(root / name / f"{i:03}.png")
        noise = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "fake/OffAxisMouth/noise.png")

    return made_once("data", draw) / "datasets"


@pytest.fixture(scope="session")
def features(made_once, datasets) -> Path:
    """The features of `datasets`."""

    def extract(folder: Path) -> None:
        options = ("--data_root", datasets, "--output_dir", folder / "features", "--workers", 1)
        run_script("feature_extraction.py", *options, cwd=folder)

    return made_once("extracted", extract) / "features"


SMALL = ("--patch_size", 56, "--embed_dim", 24, "--depth", 2, "--batch_size", 16, "--accum_steps", 2)


@pytest.fixture(scope="session")
def trained(made_once, features) -> Path:
    """The output folder of a short training of a tiny model on `features`."""

    def fit(folder: Path) -> None:
        options = ("--features", features, "--output_dir", folder / "output_model", *SMALL, "--epochs", 2)
        run_script("train.py", *options, cwd=folder)

    return made_once("trained", fit) / "output_model"
