"""preprocess.py: what is used, what is set aside, and that nothing is ever lost."""

import csv
import errno
import functools
import hashlib
import io
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import (
    NO_IMAGES_BY_NAME,
    ROOT,
    error_line,
    hostile_files,
    one_after_another,
    picture,
    run_script,
    save_with_texts,
)
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from drawing.render import draw_face
from faces.alignment import CORNERS, GREY, align_face, alignment_square, cut_aligned, find_landmarks
from faces.finder import FaceFinder, find_face, finder_files
from faces.images import FILLED, FOUND, LANDMARKS, ORIGINAL, STALE, TREATMENT, VIDEO, list_images, load_noted, load_rgb
from faces.prepared import plan_names
from faces.rejection import BEYOND, NO_FACE, ORIGINALS_NOTE, Rejected
from faces.treatment import parse_treatment, treatment_of
from preprocess import get_args_parser
from runtime.processes import agree_on_start, map_ahead
from samples.sources import data_set_folders


@functools.cache
def finder() -> FaceFinder:
    return FaceFinder(finder_files())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not Path(name).name.startswith(".")}


def kept_in(folder: Path) -> dict[str, bytes]:
    """What is kept in a folder of originals: all but the note that says what it is."""
    kept = visible(folder)
    return {name: data for name, data in kept.items() if name != ORIGINALS_NOTE}


def rejections(folder: Path) -> dict[str, str]:
    with open(folder / "rejected.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def usable(folder: Path, unusable: dict[str, str]) -> int:
    return sum(path.is_file() or path.is_symlink() or path.is_fifo() for path in folder.rglob("*")) - len(unusable)


def test_in_place(tmp_path):
    folder = tmp_path / "D"
    unusable = hostile_files(folder) | {"animated.gif": VIDEO}
    originals = {
        name: os.path.lexists(folder / name) and (folder / name).read_bytes() if (folder / name).is_file() else None
        for name in unusable
    }
    count, before = usable(folder, unusable), contents(folder)
    done = run_script("preprocess.py", "--directory", folder, cwd=tmp_path)
    assert f"{len(unusable) - len(NO_IMAGES_BY_NAME)} rejected" in done.stdout

    results = contents(folder)
    kept = {name: data for name, data in before.items() if name not in unusable and results.get(name) != data}
    assert kept.keys() > {"same.jpg", "same.bmp", "a b/ç/new\nline é.webp"} and "same.png" not in kept
    assert kept_in(tmp_path / "D_originals") == kept
    assert f"originals are in {tmp_path / 'D_originals'}, with their tree" in done.stdout
    for name in NO_IMAGES_BY_NAME:
        assert results.pop(name) == originals[name], "left where it is"
    assert len(results) == count and all(name.endswith(".png") for name in results)
    for name in results:
        with Image.open(folder / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224)), name
    assert {"same.png", "same_jpg.png", "same_bmp.png", "same_jpg_2.png"} <= results.keys()
    for name, reason in rejections(tmp_path / "D_rejected").items():
        assert unusable.pop(name) in reason
        if name in NO_IMAGES_BY_NAME:
            continue
        assert os.path.lexists(tmp_path / "D_rejected" / name)
        assert originals[name] is None or (tmp_path / "D_rejected" / name).read_bytes() == originals[name]
    assert unusable == {}

    rejected = contents(tmp_path / "D_rejected")
    again = run_script("preprocess.py", "--directory", folder, cwd=tmp_path)
    assert f"0 written, {count} unchanged, 0 rejected" in again.stdout
    # byte for byte
    assert contents(folder).items() >= results.items() and contents(tmp_path / "D_rejected") == rejected
    assert kept_in(tmp_path / "D_originals") == kept


def test_output_dir_leaves_the_source_untouched_and_gives_the_same(tmp_path):
    hostile_files(tmp_path / "D")
    unusable = hostile_files(tmp_path / "E")
    before = contents(tmp_path / "D")
    run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path)
    assert contents(tmp_path / "D") == before
    assert rejections(tmp_path / "O_rejected").keys() == unusable.keys() - {"animated.gif"}
    run_script("preprocess.py", "--directory", "E", cwd=tmp_path)
    results = contents(tmp_path / "O")
    assert results.pop("animated.gif.frame000000.png"), "a video, whose frames need another folder"
    assert results.pop(".source") == str(tmp_path / "D").encode() + b"\0" + b"12x12" + b"\0"
    assert results == {name: data for name, data in contents(tmp_path / "E").items() if name not in NO_IMAGES_BY_NAME}

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "O").rglob("*.png")}
    again = run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path)
    assert "0 written" in again.stdout and contents(tmp_path / "O").items() >= results.items()
    assert "not from" in error_line(
        run_script("preprocess.py", "--directory", "E", "--output_dir", "O", cwd=tmp_path, expect=1)
    )
    assert contents(tmp_path / "O").items() >= results.items(), "another folder's images do not replace these"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "O").rglob("*.png")} == stamps

    picture(100, 100, 99).save(tmp_path / "D/-dash.jpeg")  # a source that changed is made anew, and it alone
    assert "1 written" in run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path).stdout


def test_delete_rejected_deletes_and_still_tells_why(tmp_path):
    unusable = hostile_files(tmp_path / "D")
    run_script("preprocess.py", "--directory", "D", "--delete_rejected", cwd=tmp_path)
    assert rejections(tmp_path / "D_rejected").keys() == unusable.keys()
    assert [path.name for path in (tmp_path / "D_rejected").iterdir()] == ["rejected.csv"]
    assert {name for name in unusable if os.path.lexists(tmp_path / "D" / name)} == set(NO_IMAGES_BY_NAME)


def test_a_rejected_file_never_overwrites_an_earlier_one(tmp_path):
    (tmp_path / "D").mkdir()
    for text in ("first", "second"):
        picture(20, 20).save(tmp_path / "D/good.png")
        (tmp_path / "D/bad.jpg").write_text(text)
        run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert (tmp_path / "D_rejected/bad.jpg").read_text() == "first"
    assert (tmp_path / "D_rejected/bad_2.jpg").read_text() == "second"


def test_an_original_never_overwrites_an_earlier_one(tmp_path):
    (tmp_path / "D").mkdir()
    for i, name in enumerate(("a.jpg", "a.jpg", "a_2.jpg", "a.jpg")):
        picture(60, 40, i).save(tmp_path / "D" / name)
        data = (tmp_path / "D" / name).read_bytes()
        if i == 1:
            picture(60, 40, 9).save(tmp_path / "D/a_2.jpg")  # its name is not free: it goes there itself
        run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
        assert data in kept_in(tmp_path / "D_originals").values()
    kept = kept_in(tmp_path / "D_originals")
    assert kept.keys() == {"a.jpg", "a_2.jpg", "a_3.jpg", "a_2_2.jpg", "a_4.jpg"} and len(set(kept.values())) == 5
    assert len(contents(tmp_path / "D")) == 5
    (tmp_path / "D/a.jpg").write_bytes(kept["a.jpg"])  # once more the same file
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert kept_in(tmp_path / "D_originals") == kept


def test_what_links_lead_to_is_kept(tmp_path):
    """A symbolic link, which would lead nowhere from the other folder, and names that share a file."""
    (tmp_path / "D/sub").mkdir(parents=True)
    picture(60, 40, 1).save(tmp_path / "elsewhere.jpg")
    data = (tmp_path / "elsewhere.jpg").read_bytes()
    os.symlink("../../elsewhere.jpg", tmp_path / "D/sub/a.jpg")
    os.link(tmp_path / "elsewhere.jpg", tmp_path / "D/b.jpg")
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert contents(tmp_path / "D").keys() == {"b.png", "sub/a.png"}
    assert kept_in(tmp_path / "D_originals") == {"b.jpg": data, "sub/a.jpg": data}
    assert not (tmp_path / "D_originals/sub/a.jpg").is_symlink()
    assert (tmp_path / "elsewhere.jpg").read_bytes() == data


def test_discarded_originals(tmp_path):
    for folder in ("D", "E"):
        hostile_files(tmp_path / folder)
    done = run_script("preprocess.py", "--directory", "D", "--discard_originals", cwd=tmp_path)
    run_script("preprocess.py", "--directory", "E", cwd=tmp_path)
    assert "originals are in" not in done.stdout and not (tmp_path / "D_originals").exists()
    for suffix in ("", "_rejected"):
        assert contents(tmp_path / f"D{suffix}") == contents(tmp_path / f"E{suffix}")


def test_later_runs_take_the_kept_originals(tmp_path):
    """Another size gives what it would have given at once; so does --align into another folder."""
    (tmp_path / "D").mkdir()
    face = drawn_in(600, 1, 0, (0, 0), 0).crop((0, 50, 600, 550))
    face.save(tmp_path / "D/a.jpg")
    face.crop((0, 0, 560, 500)).save(tmp_path / "D/a.JPG", "JPEG")
    face.crop((0, 0, 550, 500)).save(tmp_path / "D/b.png")
    face.resize((224, 224)).save(tmp_path / "D/c.png")
    shutil.copytree(tmp_path / "D", tmp_path / "raw")
    small, align = ("--target_height", 96, "--target_width", 96), ("--align", "--recompress", 80)
    for name, options in (("small", small), ("aligned", align)):
        run_script("preprocess.py", "--directory", "raw", "--output_dir", name, *options, cwd=tmp_path)
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    kept = kept_in(tmp_path / "D_originals")
    assert kept.keys() == {"a.jpg", "a.JPG", "b.png"}
    for name, options in (("small", small), ("aligned", align)):
        run_script("preprocess.py", "--directory", "D", "--output_dir", f"{name}_later", *options, cwd=tmp_path)
        assert visible(tmp_path / f"{name}_later") == visible(tmp_path / name)
    run_script("preprocess.py", "--directory", "D", *small, cwd=tmp_path)
    assert contents(tmp_path / "D") == visible(tmp_path / "small")
    kept["c.png"] = (tmp_path / "raw/c.png").read_bytes()  # the size fitted before
    assert kept_in(tmp_path / "D_originals") == kept
    picture(96, 96, 5).save(tmp_path / "D/b.png")  # another picture of that name is taken itself
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert len(kept_in(tmp_path / "D_originals")) == 5 and (tmp_path / "D_originals/b_2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--directory", "nowhere"), "nowhere: no such folder"),
        (("--directory", "empty"), "empty: no images in it"),
        (("--directory", "D", "--output_dir", "D/inside"), "lies within"),
        (("--directory", "D", "--output_dir", "O", "--delete_rejected"), "in place only"),
        (("--directory", "D", "--output_dir", "O", "--discard_originals"), "--discard_originals works in place only"),
        (("--directory", "D", "--target_width", 0), "at least 1"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "D").mkdir()
    picture(20, 20).save(tmp_path / "D/a.jpg")
    before = contents(tmp_path)
    assert message in error_line(run_script("preprocess.py", *arguments, cwd=tmp_path, expect=1))
    assert contents(tmp_path) == before


def test_other_sizes_and_antialiasing(tmp_path):
    (tmp_path / "D").mkdir()
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: shrunk without a filter they would be black and white stripes still
    Image.fromarray(stripes).save(tmp_path / "D/stripes.png")
    run_script("preprocess.py", "--directory", "D", "--target_height", 96, "--target_width", 128, cwd=tmp_path)
    result = np.asarray(Image.open(tmp_path / "D/stripes.png"))
    assert result.shape == (96, 128, 3)
    assert np.abs(result[:, 4:-4].astype(int) - 127).max() <= 3


def test_decoding_is_what_people_see(tmp_path):
    upright = picture(60, 40, 1)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.jpg", exif=sideways, quality=100, subsampling=0)
    assert np.abs(np.asarray(load_rgb(tmp_path / "exif.jpg")).astype(int) - np.asarray(upright)).mean() < 2

    glass = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    glass.putpixel((2, 3), (1, 2, 3, 255))
    glass.save(tmp_path / "glass.png")
    assert load_rgb(tmp_path / "glass.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_rgb(tmp_path / "glass.png").getpixel((2, 3)) == (1, 2, 3)

    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "sixteen.png")
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "sixteen.png"))[..., 0].ravel(), np.arange(256))

    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(load_rgb(tmp_path / "cmyk.jpg")).astype(int) - np.asarray(upright)).mean() < 3


def test_what_a_file_was_at_first_stays_known(tmp_path):
    """Also through a second preparation, at another size; and a foreign text of that name is not believed."""
    (tmp_path / "D").mkdir()
    picture(60, 40, 1).save(tmp_path / "D/a.jpg")
    picture(224, 224, 2).save(tmp_path / "D/b.png")
    note = PngInfo()
    note.add_text("Original", "by Rembrandt")
    picture(30, 40, 3).save(tmp_path / "D/c.png", pnginfo=note)
    for side in (224, 96):
        run_script("preprocess.py", "--directory", "D", "--target_height", side, "--target_width", side, cwd=tmp_path)
        originals = {path.name: load_rgb(path).info[ORIGINAL] for path in (tmp_path / "D").iterdir()}
        assert originals == {"a.png": "JPEG 60x40", "b.png": "PNG 224x224", "c.png": "PNG 30x40"}
    sideways = Image.Exif()
    sideways[0x0112] = 6
    picture(60, 40, 1).save(tmp_path / "exif.jpg", exif=sideways)
    assert load_rgb(tmp_path / "exif.jpg").info[ORIGINAL] == "JPEG 40x60"


def test_reasons_do_not_carry_the_path_of_a_run(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    (tmp_path / "bad\nname.png").write_bytes(b"?")
    for name in ("bad.png", "bad\nname.png"):
        with pytest.raises(Rejected) as error:
            load_rgb(tmp_path / name)
        assert str(tmp_path) not in str(error.value)


def test_plan_is_the_same_at_every_moment_of_a_run(tmp_path):
    """Whatever of the plan has been carried out, the rest keeps its names: a run that was stopped goes on to the same
    end.
    """
    images = sorted(tmp_path / name for name in ("a.jpg", "a.bmp", "A.jpeg", "a.png", "a_jpg.webp", "b.jpg", "b.webp"))
    plan = plan_names(images, set(images))
    assert len({str(name).casefold() for name in plan.values()}) == len(images)
    for done in range(2 ** len(images)):
        state = sorted(plan[image] if done >> i & 1 else image for i, image in enumerate(images))
        rest = plan_names(state, set(state))
        assert all(rest[image] == plan[image] for i, image in enumerate(images) if not done >> i & 1)


# Kills a run before its first, second, ... step on the disk, by which a name or a file's content comes or goes
KILLED = """import errno, os, shutil, signal, sys
sys.path.insert(0, {root!r})
import preprocess

def make_step(name, module=os):
    function = getattr(module, name)

    def step(source, target, **options):
        global left
        left -= 1
        if not left:
            if name == "copy2":
                open(target, "wb").write(open(source, "rb").read()[:99])
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "link" and way == "copy":
            raise OSError(errno.EPERM, "Operation not permitted")
        return function(source, target, **options)

    setattr(module, name, step)

way, side, *folders = sys.argv[1:]
for left, folder in enumerate(folders, 1):
    if not (child := os.fork()):
        sys.stdout = open(os.devnull, "w")
        for name in ("link", "replace", "rename"):
            make_step(name)
        make_step("copy2", shutil)
        options = ["--directory", folder, "--workers", "1", "--target_height", side, "--target_width", side]
        preprocess.main(preprocess.get_args_parser().parse_args(options))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("way", "side", "steps"),
    [("link", 224, 3 + 3 + 2), ("copy", 224, 3 * (1 + 2) + 3 + 2), ("again", 96, 3)],
    ids=["hard links", "copies", "another size"],
)
def test_killed_at_each_step_and_run_again(tmp_path, way, side, steps):
    """For each image a link, or a copy that gets its name; then its PNG gets the name of the original, and its own."""
    (tmp_path / "raw/sub").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "a.png", "sub/b.webp")):
        picture(60, 40, i).save(tmp_path / "raw" / name)
    raw, names = contents(tmp_path / "raw"), [f"D{i}" for i in range(steps + 1)]
    sides = ("--target_height", side, "--target_width", side)
    run_script("preprocess.py", "--directory", "raw", "--output_dir", "made", *sides, cwd=tmp_path)
    for name in names:
        shutil.copytree(tmp_path / "raw", tmp_path / name)
        if way == "again":
            run_script("preprocess.py", "--directory", name, cwd=tmp_path)
    program = tmp_path / "killed.py"
    program.write_text(KILLED.format(root=str(ROOT)))
    command = [sys.executable, program, way, str(side), *names]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.stdout.split() == ["-9"] * steps + ["0"], done.stderr
    for name in names:
        images, kept = contents(tmp_path / name), kept_in(tmp_path / f"{name}_originals")
        assert all(data in (images.get(path), kept.get(path)) for path, data in raw.items())
        assert kept.items() <= raw.items()
        assert name != names[-1] or kept == raw
        run_script("preprocess.py", "--directory", name, *sides, cwd=tmp_path)
        assert visible(tmp_path / name) == visible(tmp_path / "made")
        assert kept_in(tmp_path / f"{name}_originals") == raw


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(tmp_path):
    (tmp_path / "D").mkdir()
    for i in range(60):
        picture(800, 600, i).save(tmp_path / f"D/{i}.jpg", quality=95)
    raw = contents(tmp_path / "D")
    shutil.copytree(tmp_path / "D", tmp_path / "E")
    run_script("preprocess.py", "--directory", "E", cwd=tmp_path)
    for finished in (1, 5, 15, 30, 40, 50, 57):
        process = subprocess.Popen(
            [sys.executable, ROOT / "preprocess.py", "--directory", "D"], cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        while len(list((tmp_path / "D").glob("*.png"))) < finished and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "D").iterdir():
            if not path.name.startswith("."):
                load_rgb(path)  # whole, under its old name or its new one
        images, kept = contents(tmp_path / "D"), kept_in(tmp_path / "D_originals")
        assert all(data in (images.get(name), kept.get(name)) for name, data in raw.items())
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert visible(tmp_path / "D") == contents(tmp_path / "E")
    assert kept_in(tmp_path / "D_originals") == kept_in(tmp_path / "E_originals") == raw


@pytest.mark.slow
def test_two_processes_of_torchrun_give_what_one_gives_also_when_one_is_killed(tmp_path):
    """In one torchrun: in place, and into another folder; then a run whose second process is killed."""
    for folder in ("D", "E", "F", "G"):
        hostile_files(tmp_path / folder)
    (tmp_path / "H").mkdir()
    for i in range(40):
        picture(1200, 900, i).save(tmp_path / f"H/{i}.jpg", quality=95)
    shutil.copytree(tmp_path / "H", tmp_path / "I")
    alone = run_script("preprocess.py", "--directory", "D", cwd=tmp_path).stdout
    alone += run_script("preprocess.py", "--directory", "F", "--output_dir", "O", cwd=tmp_path).stdout
    run_script("preprocess.py", "--directory", "I", cwd=tmp_path)

    runs = [["--directory", "E"], ["--directory", "G", "--output_dir", "P"], ["--directory", "H"]]
    command = one_after_another("preprocess.py", runs, tmp_path, 2, "--max_restarts=2")
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="surrogateescape"
    )
    while len(list((tmp_path / "H").glob("*.png"))) < 10 and process.poll() is None:
        time.sleep(0.005)
    [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"][0].kill()
    together = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    renamed = [line.replace("/E", "/D").replace("/G", "/F").replace("/P", "/O") for line in together.splitlines()]
    assert renamed[: len(alone.splitlines())] == alone.splitlines()
    for names in (("D", "E"), ("O", "P")):
        for suffix in ("", "_rejected", "_originals"):
            one, two = (contents(tmp_path / f"{name}{suffix}") for name in names)
            one.pop(".source", None), two.pop(".source", None)
            assert one == two
    assert visible(tmp_path / "H") == contents(tmp_path / "I")
    assert kept_in(tmp_path / "H_originals") == kept_in(tmp_path / "I_originals")


def test_processes_agree_on_how_often_they_were_started(monkeypatch):
    """Through torchrun's store, which keeps what the processes before them wrote. Machines count restarts for
    themselves.
    """
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.HashStore()
    for start in (1, 2, 3):
        late = [0, 1, 2] if start != 2 else [2, 1, 0]  # whoever comes first
        with ThreadPoolExecutor(3) as threads:
            answers = []
            for rank in late:
                answers.append(threads.submit(agree_on_start, store, rank, 3))
                time.sleep(0.1)
            assert [answer.result(timeout=20) for answer in answers] == [start] * 3


def test_a_disk_that_fails_is_no_reason_to_reject_a_file(tmp_path, monkeypatch):
    """What may be gone tomorrow stops the run; the file stays where it is."""
    picture(20, 20).save(tmp_path / "a.jpg")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "a.jpg"))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Input/output error.*a.jpg"):
        load_rgb(tmp_path / "a.jpg")


def test_threads_work_ahead_while_a_result_is_in_use_and_no_further():
    started, lock_ = [], threading.Lock()

    def work(item: int) -> int:
        with lock_:
            started.append(item)
        return item

    results = map_ahead(work, itertools.count(), workers=2, ahead=3)
    for expected in range(5):
        assert next(results) == expected
        time.sleep(0.05)
        assert len(started) == expected + 1 + 3
    results.close()
    assert list(map_ahead(work, range(3), 2, 5)) == [0, 1, 2] and list(map_ahead(work, [], 2, 5)) == []


def test_an_image_too_large_for_memory_is_named(tmp_path, monkeypatch):
    picture(20, 20).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(Rejected, match="more pixels than there is memory for"):
        load_rgb(tmp_path / "a.jpg")


def test_what_changed_beside_the_files_is_noticed(tmp_path):
    (tmp_path / "D").mkdir()
    for i, side in enumerate((30, 300, 300)):
        picture(side, side, i).save(tmp_path / f"D/{i}.jpg")
    run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path)
    (tmp_path / "O/1.png").write_bytes((tmp_path / "O/1.png").read_bytes()[:-100])  # as a power cut may leave it
    stat = (tmp_path / "D/1.jpg").stat()
    os.utime(tmp_path / "O/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (
        "1 written, 2 unchanged"
        in run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path).stdout
    )
    done = run_script("preprocess.py", "--directory", "D", "--output_dir", "O", "--min_width", 100, cwd=tmp_path)
    assert "2 written, 0 unchanged, 1 rejected" in done.stdout and not (tmp_path / "O/0.png").exists()
    (tmp_path / "D/2.jpg").unlink()
    done = run_script("preprocess.py", "--directory", "D", "--output_dir", "O", "--min_width", 100, cwd=tmp_path)
    assert "no longer in" in done.stdout and "2.png" in done.stdout and "1 unchanged" in done.stdout


def test_what_was_set_aside_is_left_alone(tmp_path):
    """The README's loop runs over all folders, also over those that earlier runs made."""
    (tmp_path / "D").mkdir()
    picture(20, 20).save(tmp_path / "D/good.png")
    (tmp_path / "D/bad.jpg").write_text("no image")
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    before = contents(tmp_path)
    for folder in ("D_rejected", "D_originals"):
        assert "left alone" in run_script("preprocess.py", "--directory", folder, cwd=tmp_path).stdout
    assert contents(tmp_path) == before
    (tmp_path / "D").rename(tmp_path / "Elsewhere")  # then they are all there is
    done = run_script("preprocess.py", "--directory", "D_originals", "--output_dir", "O", cwd=tmp_path)
    assert "1 written" in done.stdout and visible(tmp_path / "O") == contents(tmp_path / "Elsewhere")


def test_a_folder_that_is_linked_twice_is_listed_once(tmp_path):
    (tmp_path / "D/a").mkdir(parents=True)
    picture(20, 20).save(tmp_path / "D/a/1.jpg")
    os.symlink("a", tmp_path / "D/b")
    os.symlink("..", tmp_path / "D/a/up")
    assert list_images(tmp_path / "D") == [tmp_path / "D/a/1.jpg"]


@pytest.mark.slow
def test_names_that_are_no_text(tmp_path):
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / os.fsdecode(b"bad\xff.jpg")).write_text("no image")
    picture(20, 20).save(tmp_path / "D" / os.fsdecode(b"good\xff.jpg"))
    done = run_script("preprocess.py", "--directory", "D", cwd=tmp_path, PYTHONIOENCODING="utf-8:strict")
    assert "1 written, 0 unchanged, 1 rejected" in done.stdout


# ------------------------------------------------------------------------------------------------------------ alignment


def drawn_in(side: int, scale: float, degrees: float, shift: tuple[float, float], seed: int) -> Image.Image:
    """A drawn face of 600 px, scaled, turned and shifted in a larger picture."""
    face = Image.fromarray(draw_face(np.random.default_rng(seed), size=600))
    a, b = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    middle = np.array([side / 2 + shift[0], side / 2 + shift[1]])
    offset = 300 - np.array([[a, b], [-b, a]]) @ middle
    return face.transform(
        (side, side),
        Image.Transform.AFFINE,
        (a, b, offset[0], -b, a, offset[1]),
        Image.Resampling.BICUBIC,
        fillcolor=(90, 110, 130),
    )


def points_of(path: Path) -> np.ndarray:
    """Eyes and mouth (3, 2) in pixels of a prepared picture."""
    _, landmarks, found_by = find_face(Image.open(path), finder(), 224)
    assert found_by == "frontal"
    return np.array([landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0), landmarks[[48, 54]].mean(axis=0)])


@pytest.mark.slow
def test_aligned_faces_have_eyes_and_mouth_in_one_place(tmp_path):
    """The same face, however it stands in its picture, gives the same picture; of all faces the eyes are level and
    equally wide apart.
    """
    (tmp_path / "D").mkdir()
    poses = [
        (800, 1.0, 0, (0, 0)),
        (800, 0.7, 12, (60, -40)),
        (1000, 1.3, -15, (-50, 30)),
        (500, 0.5, 6, (20, 20)),
        (1600, 2.4, -8, (0, 90)),
    ]
    for i, pose in enumerate(poses):
        for seed in (0, 3):
            drawn_in(*pose, seed).save(tmp_path / f"D/{seed}_{i}.png")
    run_script("preprocess.py", "--directory", "D", "--output_dir", "wide", "--align", 0.8, cwd=tmp_path)
    run_script("preprocess.py", "--directory", "D", "--output_dir", "plain", cwd=tmp_path)
    points = {
        seed: np.array([points_of(tmp_path / f"wide/{seed}_{i}.png") for i in range(len(poses))]) for seed in (0, 3)
    }
    for seed, of_face in points.items():
        assert np.ptp(of_face, axis=0).max() < 7, (
            "a tenth of the distance between the eyes, in which is dlib's own spread, twice"
        )
        level = of_face[:, 1] - of_face[:, 0]
        assert np.abs(level[:, 1]).max() < 6
        one = np.asarray(Image.open(tmp_path / f"wide/{seed}_0.png"), float)
        for i in range(1, len(poses)):
            assert np.abs(np.asarray(Image.open(tmp_path / f"wide/{seed}_{i}.png"), float) - one).mean() < 7, i
    every = np.concatenate(list(points.values()))
    assert np.ptp(every.mean(axis=1), axis=0).max() < 9, "eyes and mouth, their mean"
    apart = np.abs(
        np.asarray(Image.open(tmp_path / "plain/0_0.png"), float)
        - np.asarray(Image.open(tmp_path / "plain/0_2.png"), float)
    ).mean()
    assert apart > 10, "without --align these pictures differ"


def test_the_crop_is_the_part_of_ffhqs_square_that_was_asked_for():
    landmarks = np.zeros((68, 2))
    landmarks[36:42], landmarks[42:48], landmarks[[48, 54]] = (40, 50), (60, 50), (50, 75)
    centre, right = alignment_square(landmarks)
    assert np.allclose(centre, (50, 52.5)) and np.allclose(right, (45, 0)), (
        "half of max(4 x 20, 3.6 x 25) pixels, level"
    )
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    turned_centre, turned_right = alignment_square(landmarks @ turn.T)
    assert np.allclose(turned_centre, turn @ centre) and np.allclose(turned_right, turn @ right)


@pytest.mark.slow
def test_alignment_samples_all_pixels():
    """A pattern of single pixels under a face that is made ten times smaller becomes gray, not a pattern."""
    picture = np.asarray(drawn_in(2400, 3.6, 0, (0, 0), 0)).copy()
    checks = (np.indices(picture.shape[:2]).sum(axis=0) % 2 * 2 - 1)[..., None]
    noisy = np.clip(picture.astype(int) // 2 + 64 + 60 * checks, 0, 255).astype(np.uint8)
    clean = Image.fromarray((picture // 2 + 64).astype(np.uint8))
    aligned = [align_face(image, finder(), 96, 0.6) for image in (clean, Image.fromarray(noisy))]
    assert all(isinstance(image, Image.Image) for image in aligned)
    assert np.abs(np.asarray(aligned[0], float) - np.asarray(aligned[1], float)).mean() < 3


def test_a_treatment_says_which_options_it_was():
    for options in (
        ["--align"],
        ["--align", "0.55", "--recompress", "80"],
        ["--recompress", "75-95", "--target_width", "100"],
    ):
        args = get_args_parser().parse_args(["--directory", "D", *options])
        again = parse_treatment(treatment_of(args))
        assert vars(again).items() <= (vars(args) | {"reflected": False}).items()
        assert treatment_of(again) == treatment_of(args)
    assert treatment_of(get_args_parser().parse_args(["--directory", "D"])) == ""
    earlier = parse_treatment("aligned 0.6, JPEG 75-95, 224x224")
    assert earlier.reflected and treatment_of(earlier) == "aligned 0.6, JPEG 75-95, 224x224"


@pytest.mark.slow
def test_what_cannot_be_aligned_is_named_and_counted(tmp_path):
    (tmp_path / "D").mkdir()
    whole = drawn_in(700, 1, 0, (0, 0), 0)
    whole.save(tmp_path / "D/whole.png")
    whole.crop((100, 100, 600, 600)).save(tmp_path / "D/close.jpg", quality=95)
    picture(300, 300).save(tmp_path / "D/nobody.png")
    command = (
        "preprocess.py",
        *"--without_cnn --directory D --output_dir O --align 1 --target_height 96 --target_width 96".split(),
    )
    done = run_script(*command, cwd=tmp_path)
    assert "2 written, 0 unchanged, 1 rejected" in done.stdout
    assert "of 3, 1 have no face that was found (33.3%)\n  1 crops reach over the border" in done.stdout
    assert rejections(tmp_path / "O_rejected") == {"nobody.png": NO_FACE}
    filled = {name: load_rgb(tmp_path / f"O/{name}.png").info[FILLED] for name in ("whole", "close")}
    assert filled["whole"] == 0 and 0.1 < filled["close"] < 0.6
    fewer = run_script(*command, "--max_filled", 0.1, cwd=tmp_path)
    assert "0 written, 1 unchanged, 2 rejected" in fewer.stdout or "1 written, 0 unchanged, 2 rejected" in fewer.stdout
    assert "1 were dropped for more, --max_filled 0.1 (33.3%)" in fewer.stdout
    assert rejections(tmp_path / "O_rejected")["close.jpg"].startswith(f"{BEYOND}: {filled['close']:.1%}")
    assert not (tmp_path / "O/close.png").exists()
    with Image.open(tmp_path / "O/whole.png") as image:
        assert (image.size, image.mode, image.info[TREATMENT]) == ((96, 96), "RGB", "aligned 1 on grey, 96x96")
    assert "2 written, 0 unchanged, 1 rejected" in run_script(*command, cwd=tmp_path).stdout
    before = contents(tmp_path / "O")
    again = run_script(*command, cwd=tmp_path).stdout
    assert "0 written, 2 unchanged, 1 rejected" in again and "1 crops reach over the border" in again
    refused = run_script(*command[:-6], "--align", 0.6, cwd=tmp_path, expect=1)
    assert "holds images that are aligned 1 on grey, 96x96; name another --output_dir" in error_line(refused)
    assert "--target_height and --target_width have to be equal" in error_line(
        run_script(*command, "--target_width", 100, cwd=tmp_path, expect=1)
    )
    assert contents(tmp_path / "O") == before

    (tmp_path / "D/nobody.png").unlink()
    closer = run_script(
        "preprocess.py",
        *"--directory D --output_dir P --align 0.6 --recompress 80 --target_height 400 --target_width 400".split(),
        cwd=tmp_path,
    )
    assert "2 written, 0 unchanged, 0 rejected" in closer.stdout and "2 of the 2 written were enlarged" in closer.stdout
    assert "enlarged" not in done.stdout and not (tmp_path / "P_rejected").exists()


def test_the_border_is_filled_with_grey():
    """And what is filled is told to a thousandth."""
    whole = drawn_in(700, 1, 0, (0, 0), 0)
    landmarks, way = find_landmarks(whole, finder())
    crop = cut_aligned(whole, landmarks, way, 200, 0.6)
    assert crop.info[FILLED] == 0 and crop.info[FOUND] == "frontal"
    left, right = crop.info[CORNERS][:, 0].min(), crop.info[CORNERS][:, 0].max()
    cut = round(left + 0.25 * (right - left))  # a fourth of the crop's width is gone
    rest = whole.crop((cut, 0, *whole.size))
    filled = cut_aligned(rest, landmarks - [cut, 0], way, 200, 0.6)
    assert filled.info[FILLED] == pytest.approx((cut - left) / (right - left), abs=0.02)
    a, b = (np.asarray(image, float)[20:-20] for image in (crop, filled))
    assert np.abs(a[:, 60:] - b[:, 60:]).mean() < 0.5 and np.abs(b[:, 2:40] - GREY).max() <= 1
    mirrored = np.asarray(cut_aligned(rest, landmarks - [cut, 0], way, 200, 0.6, on_grey=False), float)[20:-20]
    assert np.abs(mirrored[:, 10:48] - mirrored[:, 89:51:-1]).mean() < 12, "as earlier versions filled it"
    np.testing.assert_allclose(filled.info[LANDMARKS], crop.info[LANDMARKS], atol=0.02)


@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
def test_landmarks_do_not_depend_on_the_margin(margin):
    """A face with more around it than before, and one that was cut close: the same crop to a pixel."""
    face = drawn_in(700, 1, 0, (0, 0), 0)
    reference, _ = find_landmarks(face, finder())
    left, top = reference.min(axis=0).astype(int) - 60
    side = int(np.ptp(reference, axis=0).max()) + 120
    border = round(margin * side)
    canvas = Image.new("RGB", (side + 2 * border,) * 2, (90, 100, 110))
    canvas.paste(face.crop((left, top, left + side, top + side)), (border, border))
    landmarks, _ = find_landmarks(canvas, finder())
    off = landmarks - border + [left, top] - reference
    assert np.abs(off).mean() < 0.01 * side


def test_landmarks_travel_with_the_png(tmp_path):
    (tmp_path / "D").mkdir()
    drawn_in(600, 1, 10, (0, 0), 0).save(tmp_path / "D/a.png")
    run_script("preprocess.py", *"--directory D --output_dir O --align --recompress 80".split(), cwd=tmp_path)
    info = load_rgb(tmp_path / "O/a.png").info
    assert info[FOUND] == "frontal" and info[FILLED] == 0 and info[LANDMARKS].shape == (68, 2)
    noted, pixels = load_noted(tmp_path / "O/a.png"), np.asarray(load_rgb(tmp_path / "O/a.png"))
    np.testing.assert_array_equal(noted.pixels, pixels)
    assert noted.sha256 == hashlib.sha256(pixels).digest() and noted.info.keys() == info.keys()
    assert all(np.array_equal(noted.info[key], info[key]) for key in info)
    (tmp_path / "cut.png").write_bytes((tmp_path / "O/a.png").read_bytes()[:-3000])
    assert (
        load_noted(tmp_path / "cut.png") is load_noted(tmp_path / "D/a.png") is load_noted(tmp_path / "no.png") is None
    )
    run_script(
        *"preprocess.py --directory O --output_dir half --target_width 112 --target_height 112".split(), cwd=tmp_path
    )
    half = load_rgb(tmp_path / "half/a.png").info[LANDMARKS]
    np.testing.assert_allclose(half, (info[LANDMARKS] + 0.5) / 2 - 0.5, atol=0.01, err_msg="in another size")
    _, searched, _ = find_face(Image.open(tmp_path / "O/a.png").convert("RGB"), finder(), 224)
    assert np.abs(info[LANDMARKS] - searched).mean() < 4
    with Image.open(tmp_path / "O/a.png") as image:
        texts, changed = dict(image.text), image.convert("RGB")
    changed.putpixel((5, 5), (1, 2, 3))
    save_with_texts(changed, tmp_path / "O/a.png", texts)
    info = load_rgb(tmp_path / "O/a.png").info
    assert info[STALE] and LANDMARKS not in info, "they are of other pixels"
    assert load_noted(tmp_path / "O/a.png") is None


def test_a_tag_that_turns_an_aligned_png_is_seen_wherever_it_stands(tmp_path):
    (tmp_path / "D").mkdir()
    drawn_in(600, 1, 10, (0, 0), 0).save(tmp_path / "D/a.png")
    run_script("preprocess.py", *"--directory D --output_dir O --align".split(), cwd=tmp_path)
    content, exif = (tmp_path / "O/a.png").read_bytes(), Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation='6'/>".replace(b"'", b'"')
    for kind, data in ((b"eXIf", exif.tobytes()[6:]), (b"iTXt", xmp)):
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for place in (33, len(content) - 12):  # after the header, before the end
            (tmp_path / "turned.png").write_bytes(content[:place] + chunk + content[place:])
            assert load_noted(tmp_path / "turned.png") is None and load_rgb(tmp_path / "turned.png").info[STALE]


def test_a_note_that_is_none_is_passed_over(tmp_path):
    (tmp_path / "D").mkdir()
    drawn_in(600, 1, 10, (0, 0), 0).save(tmp_path / "D/a.png")
    run_script("preprocess.py", *"--directory D --output_dir O --align".split(), cwd=tmp_path)
    with Image.open(tmp_path / "O/a.png") as image:
        text, pixels = dict(image.text), image.convert("RGB")
    start, points = text[LANDMARKS].rsplit(" ", 136)[0], text[LANDMARKS].split(" ")[3:]
    for forged in (start + " " + "".join(points), text[LANDMARKS].replace(" 0.0000 ", " 1.9999 "), start):
        save_with_texts(pixels, tmp_path / "forged.png", {**text, LANDMARKS: forged})
        assert load_noted(tmp_path / "forged.png") is None
        assert not {LANDMARKS, STALE} & load_rgb(tmp_path / "forged.png").info.keys()


def test_a_name_that_would_get_too_long_is_named(tmp_path):
    (tmp_path / "D").mkdir()
    for suffix in ("bmp", "png", "jpg"):
        picture(20, 20).save(tmp_path / "D" / f"{'b' * 251}.{suffix}")
    for place in (("--output_dir", "O"), ()):
        done = run_script("preprocess.py", "--directory", "D", *place, cwd=tmp_path)
        assert "1 written, 0 unchanged, 2 rejected" in done.stdout
        assert done.stdout.count("its PNG would have a name that is too long; rename it") == 2


def test_the_cnn_finds_what_the_frontal_detector_does_not(tmp_path):
    """A face lying on its side."""
    lying = drawn_in(500, 1, 0, (0, 0), 3).rotate(75, Image.Resampling.BICUBIC, fillcolor=(120, 130, 140))
    found = find_landmarks(lying, finder())
    without = find_landmarks(lying, FaceFinder(finder_files(cnn=False)))
    assert found is not None and found[1] == "cnn" and without is None


def test_a_file_that_was_mended_is_no_longer_listed_as_rejected(tmp_path):
    (tmp_path / "D").mkdir()
    picture(300, 300).save(tmp_path / "D/a.png")
    command = ("preprocess.py", "--directory", "D", "--output_dir", "O", "--align")
    run_script(*command, cwd=tmp_path)
    assert rejections(tmp_path / "O_rejected") == {"a.png": NO_FACE}
    drawn_in(700, 1, 0, (0, 0), 0).save(tmp_path / "D/a.png")
    assert (
        "1 written" in run_script(*command, cwd=tmp_path).stdout and not (tmp_path / "O_rejected/rejected.csv").exists()
    )


def test_only_originals_are_aligned_and_none_in_place(tmp_path):
    """A second crop of a crop, or one of a picture that was squashed to a square, would not be what the options say."""
    (tmp_path / "D").mkdir()
    drawn_in(600, 1, 0, (0, 0), 0).crop((0, 50, 600, 550)).save(tmp_path / "D/a.jpg")
    align, before = ("--align", "--recompress", 80), contents(tmp_path / "D")
    assert "need --output_dir" in error_line(
        run_script("preprocess.py", "--directory", "D", *align, cwd=tmp_path, expect=1)
    )
    assert contents(tmp_path / "D") == before
    run_script("preprocess.py", "--directory", "D", "--output_dir", "aligned", *align, cwd=tmp_path)
    run_script("preprocess.py", "--directory", "D", "--output_dir", "squashed", cwd=tmp_path)
    again = run_script(
        "preprocess.py", "--directory", "aligned", "--output_dir", "twice", *align, cwd=tmp_path, expect=1
    )
    assert (
        "a.png: is aligned 0.6 on grey, JPEG 80, 224x224 already; take the originals for aligned 0.6 on grey, JPEG 80,"
        " 224x224" in error_line(again)
    )
    again = run_script(
        "preprocess.py", "--directory", "squashed", "--output_dir", "again", "--align", cwd=tmp_path, expect=1
    )
    assert "a.png: was resized already, it was a JPEG 600x500; take the originals" in error_line(again)
    run_script("preprocess.py", "--directory", "aligned", "--output_dir", "kept", cwd=tmp_path)
    assert (tmp_path / "kept/a.png").read_bytes() == (tmp_path / "aligned/a.png").read_bytes(), (
        "without the options it stays what it is"
    )


def test_what_travels_with_a_picture_neither_stops_a_run_nor_names_the_class(tmp_path):
    (tmp_path / "D").mkdir()
    text = PngInfo()
    text.add_text("comment", "x" * 100_000)
    text.add_text(TREATMENT, "none")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    face = drawn_in(600, 1, 0, (0, 0), 0)
    face.save(tmp_path / "D/a.png", pnginfo=text, icc_profile=profile)
    face.save(tmp_path / "D/b.png")
    run_script("preprocess.py", "--directory", "D", "--output_dir", "O", "--align", "--recompress", 80, cwd=tmp_path)
    assert (tmp_path / "O/a.png").read_bytes() == (tmp_path / "O/b.png").read_bytes()


def test_a_predictor_that_is_none_is_named(tmp_path):
    (tmp_path / "D").mkdir()
    picture(300, 300).save(tmp_path / "D/a.png")
    (tmp_path / "p.dat").write_text("no predictor")
    command = ("preprocess.py", "--directory", "D", "--output_dir", "O", "--align", "--predictor", "p.dat")
    assert error_line(run_script(*command, cwd=tmp_path, expect=1)).startswith("p.dat: not a dlib shape predictor")


@pytest.mark.slow
def test_recompression_depends_on_the_content_alone(tmp_path):
    for folder in ("D", "E"):
        (tmp_path / folder).mkdir()
    for i in range(12):
        drawn_in(300, 0.5, 0, (0, 0), i).save(tmp_path / f"D/{i}.png")
        shutil.copy(tmp_path / f"D/{i}.png", tmp_path / f"E/other_{i:02}.png")
    for folder in ("D", "E"):
        run_script(
            "preprocess.py",
            "--directory",
            folder,
            "--output_dir",
            f"{folder}_out",
            "--recompress",
            "40-90",
            cwd=tmp_path,
        )
    qualities = set()
    for i in range(12):
        stored = Image.open(tmp_path / f"D_out/{i}.png")
        assert stored.info[TREATMENT] == "JPEG 40-90, 224x224" and stored.format == "PNG"
        assert np.array_equal(stored, Image.open(tmp_path / f"E_out/other_{i:02}.png"))
        source = Image.open(tmp_path / f"D/{i}.png").resize((224, 224), Image.Resampling.LANCZOS)
        made = {}
        for quality in range(30, 101):
            stream = io.BytesIO()
            source.save(stream, "JPEG", quality=quality)
            made[quality] = np.asarray(Image.open(stream))
        fits = [quality for quality in made if np.array_equal(made[quality], stored)]
        assert len(fits) == 1 and 40 <= fits[0] <= 90
        qualities.update(fits)
    assert len(qualities) > 6, "drawn for each file"
    for wrong in ("0", "101", "90-40", "good"):
        assert (
            "a JPEG quality"
            in run_script("preprocess.py", "--directory", "D", "--recompress", wrong, cwd=tmp_path, expect=2).stderr
        )


def test_a_folder_of_the_users_own_is_no_folder_of_originals(tmp_path):
    """Not filled with originals, not taken for set aside, and not left out of the data sets."""
    for name in ("faces", "faces_originals"):
        (tmp_path / f"fake/{name}").mkdir(parents=True)
        picture(300, 200, len(name)).save(tmp_path / f"fake/{name}/x.jpg")
    message = error_line(run_script("preprocess.py", "--directory", "fake/faces", cwd=tmp_path, expect=None))
    assert "faces_originals: is not of preprocess.py" in message and "--output_dir" in message
    assert sorted(path.name for path in (tmp_path / "fake/faces").iterdir()) == ["x.jpg"]
    done = run_script("preprocess.py", "--directory", "fake/faces_originals", cwd=tmp_path)
    assert "1 written" in done.stdout
    assert (tmp_path / "fake/faces_originals_originals/x.jpg").exists()
    assert [path.name for path in data_set_folders(tmp_path, "fake")] == ["faces", "faces_originals"]


def test_what_a_part_of_a_data_set_has_set_aside_is_no_image_of_the_whole(tmp_path):
    (tmp_path / "G/part").mkdir(parents=True)
    picture(300, 200, 1).save(tmp_path / "G/part/a.jpg")
    (tmp_path / "G/part/b.jpg").write_text("not an image")
    run_script("preprocess.py", "--directory", "G/part", cwd=tmp_path)
    done = run_script("preprocess.py", "--directory", "G", cwd=tmp_path)
    assert "0 written, 1 unchanged, 0 rejected" in done.stdout
    assert (tmp_path / "G/part_originals/a.jpg").exists() and (tmp_path / "G/part_rejected/b.jpg").exists()
    # a data set beside which originals lie is prepared anew from there; they are no data set of their own
    done = run_script("preprocess.py", "--directory", "G/part_originals", "--output_dir", "out", cwd=tmp_path)
    assert "left alone" in done.stdout and not (tmp_path / "out").exists()


def test_numbered_originals_and_mixed_endings_are_found_again(tmp_path):
    """Another size is made of the original, and nothing that was made is kept as one."""
    folder = tmp_path / "G"
    folder.mkdir()
    picture(600, 500, 1).save(folder / "a.jpg")
    picture(600, 500, 2).save(folder / "c.Jpg", "JPEG")
    run_script("preprocess.py", "--directory", folder, cwd=tmp_path)
    picture(600, 500, 3).save(folder / "a.jpg")
    run_script("preprocess.py", "--directory", folder, cwd=tmp_path)
    kept = sorted((tmp_path / "G_originals").glob("*.[jJ]*"))
    assert [path.name for path in kept] == ["a.jpg", "a_2.jpg", "c.Jpg"]
    size = ("--target_height", 256, "--target_width", 256, "--min_height", 250, "--min_width", 250)
    done = run_script("preprocess.py", "--directory", folder, *size, cwd=tmp_path)
    assert "3 written, 0 unchanged, 0 rejected" in done.stdout
    assert sorted((tmp_path / "G_originals").glob("*.[jJpP]*")) == kept
    made = {np.asarray(Image.open(path)).tobytes() for path in folder.glob("*.png")}
    assert made == {
        np.asarray(Image.open(path).resize((256, 256), Image.Resampling.LANCZOS)).tobytes() for path in kept
    }


# ---------------------------------------------------------------------------------------------------- links and levels


def test_nothing_is_written_through_a_link_that_leads_out(tmp_path):
    """What it leads to may be another data set. A copy may be made of it."""
    (tmp_path / "D/deep").mkdir(parents=True)
    (tmp_path / "other/part").mkdir(parents=True)
    picture(60, 40, 1).save(tmp_path / "D/own.jpg")
    picture(60, 40, 2).save(tmp_path / "other/part/a.jpg")
    (tmp_path / "other/part/b.jpg").write_text("no image")
    os.symlink("../../other", tmp_path / "D/deep/link")
    before = contents(tmp_path)
    line = error_line(run_script("preprocess.py", "--directory", "D", cwd=tmp_path, expect=1))
    assert line.startswith(f"{tmp_path}/D/deep/link/part: lies in {tmp_path}/other/part, to which a link leads")
    assert "--output_dir" in line and contents(tmp_path) == before
    run_script("preprocess.py", "--directory", "D", "--output_dir", "O", cwd=tmp_path)
    assert visible(tmp_path / "O").keys() == {"own.png", "deep/link/part/a.png"}
    assert before.items() <= contents(tmp_path).items()
    os.symlink("other", tmp_path / "named")  # a folder that is named itself is meant
    assert "1 written" in run_script("preprocess.py", "--directory", "named", cwd=tmp_path).stdout


def test_a_link_within_a_folder_is_no_image_more(tmp_path):
    (tmp_path / "D/z").mkdir(parents=True)
    picture(60, 40, 1).save(tmp_path / "D/z/1.jpg")
    picture(60, 40, 2).save(tmp_path / "D/z/2.png")
    os.symlink("z", tmp_path / "D/a")
    for name in ("1.jpg", "2.png"):
        os.symlink(f"z/{name}", tmp_path / f"D/link_{name}")
    done = run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert "2 written, 0 unchanged, 2 rejected" in done.stdout
    assert sorted(os.listdir(tmp_path / "D")) == ["a", "z"] and contents(tmp_path / "D/z").keys() == {"1.png", "2.png"}
    assert rejections(tmp_path / "D_rejected")["link_1.jpg"] == "is a link to z/1.jpg, which is used itself"
    assert os.path.lexists(tmp_path / "D_rejected/link_2.png")
    done = run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    assert "0 written, 2 unchanged, 0 rejected" in done.stdout


@pytest.mark.parametrize(("first", "later"), [("G/part", "G"), ("G", "G/part")])
def test_originals_are_found_from_another_level(tmp_path, first, later):
    (tmp_path / "G/part").mkdir(parents=True)
    picture(600, 500, 1).save(tmp_path / "G/part/a.jpg")
    run_script("preprocess.py", "--directory", first, cwd=tmp_path)
    size = ("--target_height", 96, "--target_width", 96)
    done = run_script("preprocess.py", "--directory", later, *size, cwd=tmp_path)
    original = Image.open(tmp_path / f"{first}_originals" / Path("G/part/a.jpg").relative_to(first))
    made = np.asarray(Image.open(tmp_path / "G/part/a.png"))
    assert np.array_equal(made, np.asarray(original.resize((96, 96), Image.Resampling.LANCZOS)))
    assert "1 written" in done.stdout and not (tmp_path / f"{later}_originals").exists()


def test_where_an_original_is_not_found_it_is_said_and_nothing_is_lost(tmp_path):
    """A data set was renamed, and its originals were not."""
    (tmp_path / "D").mkdir()
    for i, name in enumerate("ab"):
        picture(600, 500, i).save(tmp_path / f"D/{name}.jpg")
    run_script("preprocess.py", "--directory", "D", cwd=tmp_path)
    os.rename(tmp_path / "D", tmp_path / "E")
    picture(300, 300, 3).save(tmp_path / "E/c.png")  # an original itself
    before, small = contents(tmp_path / "E"), ("--target_height", 96, "--target_width", 96)
    shutil.copytree(tmp_path / "E", tmp_path / "F")
    done = run_script("preprocess.py", "--directory", "E", *small, cwd=tmp_path)
    assert "1 written, 2 unchanged, 0 rejected" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert f"2 PNGs, {tmp_path}/E/a.png for one, were made by preprocess.py of originals that are not found" in line
    assert "left as they are" in line and f"to {tmp_path}/E_originals" in line and "--discard_originals" in line
    assert {**before, "c.png": contents(tmp_path / "E")["c.png"]} == contents(tmp_path / "E")
    done = run_script("preprocess.py", "--directory", "E", "--output_dir", "O", *small, cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert "3 written" in done.stdout and "of these PNGs" in line and "--discard_originals" not in line
    assert (
        "of these PNGs"
        in run_script("preprocess.py", "--directory", "E", "--output_dir", "O", *small, cwd=tmp_path).stdout
    ), "until the originals are found"
    # both ways out
    for path in (tmp_path / "D_originals").glob("*.jpg"):
        os.rename(path, tmp_path / "E_originals" / path.name)
    done = run_script("preprocess.py", "--directory", "E", "--output_dir", "O", *small, cwd=tmp_path)
    assert "2 written, 1 unchanged" in done.stdout and "WARNING" not in done.stdout
    done = run_script("preprocess.py", "--directory", "E", *small, cwd=tmp_path)
    assert "2 written, 1 unchanged" in done.stdout and "WARNING" not in done.stdout
    original = Image.open(tmp_path / "E_originals/a.jpg").resize((96, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "E/a.png")), np.asarray(original))
    done = run_script("preprocess.py", "--directory", "F", "--discard_originals", *small, cwd=tmp_path)
    assert "3 written" in done.stdout and "WARNING" not in done.stdout


def test_what_was_made_for_another_folder_is_no_image_without_its_original(tmp_path):
    """Aligned or recompressed, it was never made in place: its original was never kept beside it."""
    (tmp_path / "D").mkdir()
    picture(600, 500, 1).save(tmp_path / "D/a.jpg")
    run_script("preprocess.py", "--directory", "D", "--output_dir", "O", "--recompress", 80, cwd=tmp_path)
    made = (tmp_path / "O/a.png").read_bytes()
    small = ("--target_height", 96, "--target_width", 96)
    done = run_script("preprocess.py", "--directory", "O", *small, cwd=tmp_path)
    assert "1 written" in done.stdout and "WARNING" not in done.stdout
    assert kept_in(tmp_path / "O_originals") == {"a.png": made}
