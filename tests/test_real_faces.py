"""benchmarks/real_faces.py and near_duplicates.py: nothing near on both sides of a split, the whole command on drawn
faces.
"""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import feature_extraction
import inference
import preprocess
import train
from benchmarks import real_faces
from benchmarks.comparison import images, jobs, near_duplicates, variants
from benchmarks.comparison.images import NOT_AGAIN, check_splits, kind_of
from benchmarks.comparison.jobs import MAIN
from benchmarks.comparison.near_duplicates import Fingerprint, find_network, find_pairs, leave_out, take_fingerprint
from benchmarks.comparison.scores import read_scores
from drawing.render import draw_face
from evaluation.masks import OWN, WRONG
from faces.finder import FaceFinder, detect_face, finder_files
from faces.rejection import BEYOND, NO_FACE
from samples.feature_files import SPLITS, find_feature_files, open_features


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def turned(image: np.ndarray, degrees: float, scale: float) -> np.ndarray:
    side = image.shape[0]
    return cv2.warpAffine(
        image,
        cv2.getRotationMatrix2D((side / 2, side / 2), degrees, scale),
        (side, side),
        borderMode=cv2.BORDER_REFLECT,
    )


# ------------------------------------------------------------------------------------------------------ near-duplicates


@pytest.fixture(scope="module")
def take():
    import dlib

    finder, network = (FaceFinder(finder_files()), dlib.face_recognition_model_v1(str(find_network())))

    def fingerprint(image: np.ndarray) -> Fingerprint:
        stored, face = detect_face(Image.fromarray(image), finder, 224)
        return take_fingerprint(stored, face, finder, network)

    return fingerprint


@pytest.fixture(scope="module")
def strangers(take) -> list[np.ndarray]:
    """Drawn faces, none near another; most of these are alike to a network that has learned people."""
    images = [draw_face(np.random.default_rng(seed)) for seed in range(60)]
    out = leave_out(find_pairs([take(image) for image in images]), [0] * len(images))
    kept = [image for i, image in enumerate(images) if i not in out]
    assert len(kept) >= 5
    return kept


COPIES = {
    "recompressed": lambda image: as_jpeg(image, 50),
    "shrunk": lambda image: cv2.resize(
        cv2.resize(image, (90, 90), interpolation=cv2.INTER_AREA), (224, 224), interpolation=cv2.INTER_CUBIC
    ),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "lighter": lambda image: cv2.convertScaleAbs(image, alpha=0.9, beta=25),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COPIES)
def test_planted_copies_are_found_by_their_hash_and_nothing_else_is(take, strangers, what, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_FACE_DISTANCE", 0.0)  # the hash alone
    copies = [COPIES[what](image) for image in strangers[:5]]
    pairs = find_pairs([take(image) for image in (*strangers, *copies)])
    assert [(i, j) for i, j, _ in pairs] == [(i, len(strangers) + i) for i in range(5)]
    assert all(reason.startswith("near-duplicate") for *_, reason in pairs)


@pytest.mark.slow
def test_a_person_in_another_pose_is_found_by_the_face(take, strangers, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_HASH_DISTANCE", -1)  # the face alone
    others = [
        turned(as_jpeg(image, 70), degrees, scale)
        for image, degrees, scale in zip(strangers, (12, -9, 0, 15, -14), (0.9, 0.8, 0.7, 1.1, 1))
    ]
    fingerprints = [take(image) for image in (*strangers, *others)]
    pairs = {(i, j) for i, j, _ in find_pairs(fingerprints)}
    planted = {(i, len(strangers) + i) for i in range(len(others))}
    assert planted <= pairs and len(pairs - planted) <= 2
    assert not find_pairs(fingerprints[: len(strangers)])


def made_up(count: int, seed: int = 0) -> list[Fingerprint]:
    """Fingerprints far from each other."""
    rng = np.random.default_rng(seed)
    return [Fingerprint(rng.random((2, 63)) < 0.5, rng.normal(size=128).astype(np.float32)) for _ in range(count)]


def test_pairs_across_blocks_of_the_table(monkeypatch):
    monkeypatch.setattr(near_duplicates, "ROWS", 7)
    fingerprints = made_up(30)
    fingerprints[29] = fingerprints[3]
    # mirrored, no face found
    fingerprints[13] = Fingerprint(fingerprints[8].hashes[::-1], np.full(128, np.nan, np.float32))
    assert [(i, j) for i, j, _ in find_pairs(fingerprints)] == [(3, 29), (8, 13)]


def test_what_is_left_out_leaves_no_pair_and_spares_small_sets():
    pairs = [(0, 1, "a"), (1, 2, "b"), (2, 3, "c")]
    assert leave_out(pairs, [0, 0, 0, 0]) == {1: (0, "a"), 3: (2, "c")}, "a chain loses every other one"
    assert leave_out(pairs, [9, 1, 9, 9]).keys() == {0, 2}
    assert leave_out(pairs, [9, 9, 9, 1]).keys() == {2, 1} and leave_out([], [0]) == {}


def test_reasons_are_counted_by_what_they_say():
    reasons = {
        NOT_AGAIN: NOT_AGAIN,
        NO_FACE: NO_FACE,
        "near-duplicate, 2 of 63 bits: a": "near-duplicate",
        f"{BEYOND}: 30.1%, --max_filled 0.3": BEYOND,
        "face at a distance of 0.20: a": "face at a distance",
        "truncated": "unusable",
    }
    assert {reason: kind_of(reason) for reason in reasons} == reasons


def test_a_pair_on_both_sides_of_a_split_is_an_error(features):
    paths = {}
    for split in SPLITS:
        for path in find_feature_files(features, split).values():
            with open_features(path) as file:
                paths |= dict.fromkeys(file["paths"].asstr()[:].tolist(), split)
    kept = dict(zip(paths, made_up(len(paths))))
    sizes = check_splits(features, kept)
    assert sizes["real/Consistent"] == (36, 12, 12) and sum(map(sum, sizes.values())) == len(paths)
    in_train, in_test = (next(path for path, split in paths.items() if split == wanted) for wanted in ("train", "test"))
    also_in_train = [path for path, split in paths.items() if split == "train"][1]
    assert check_splits(features, kept | {also_in_train: kept[in_train]}) == sizes, "on one side they may be"
    with pytest.raises(ValueError, match=f"{in_train} is in train, {in_test} in test: near-duplicate, 0 of 63 bits"):
        check_splits(features, kept | {in_test: kept[in_train]})
    with pytest.raises(ValueError, match="does not hold the images that were chosen"):
        check_splits(features, {in_train: kept[in_train]})


# ---------------------------------------------------------------------------------------------------- the whole command


def draw_data_sets(root: Path) -> None:
    """Two kinds of traps: photographs are JPEGs, and one generator's pictures are close-ups. A copy is planted, and a
    picture of nobody.
    """
    rng = np.random.default_rng(5)
    for name, generator, count in (
        ("real/Photos", None, 24),
        ("fake/Gan", "IrisMismatch", 20),
        ("fake/Diffusion", "OffAxisMouth", 16),
        ("fake/New", "NoseLight", 12),
    ):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(draw_face(rng, generator, 240))
            if name == "fake/Diffusion":
                image = image.crop((25, 15, 215, 205) if i else (70, 70, 170, 170))
            image.save(root / name / (f"{i:02}.jpg" if name == "real/Photos" else f"{i:02}.png"))
    shutil.copy(root / "fake/Gan/03.png", root / "fake/New/copy.png")
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(root / "fake/Gan/nobody.png")


OPTIONS = (
    *"--workers 1 --train_on Gan Diffusion --img_size 96 --patch_size 24 --seeds 2 --jobs 1".split(),
    *"--device cpu --embed_dim 24 --depth 1 --epochs 2 --main_only".split(),
)


def compare(root: Path, output: Path, *options: object) -> dict:
    arguments = ("--data_root", root, "--output_dir", output, *options)
    return real_faces.main(*real_faces.get_args_parser().parse_known_args(list(map(str, arguments))))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Trains and tests in this process, which takes no seconds to import torch. Drawn faces are one person's to dlib's
    network: copies alone are near each other here."""
    seen: list[str] = []

    def run_here(command: list[str]) -> None:
        name = Path(command[0]).stem
        seen.append(name)
        script = {module.__name__: module for module in (preprocess, feature_extraction, train, inference)}[name]
        script.main(script.get_args_parser().parse_args(command[1:]))

    # real_faces.py's threads wait for processes
    monkeypatch.setattr(train, "stopping_on_signals", lambda run: contextlib.nullcontext())
    for module in (variants, images, jobs):
        monkeypatch.setattr(module, "run", run_here)
    monkeypatch.setattr(near_duplicates, "MAX_FACE_DISTANCE", 0.01)
    monkeypatch.setattr(near_duplicates, "MAX_HASH_DISTANCE", 0)
    return seen


@pytest.mark.slow
def test_from_files_to_tables(tmp_path, calls, capsys):
    data_root, output = tmp_path / "datasets", tmp_path / "out"
    draw_data_sets(data_root)
    summary = compare(data_root, output, *OPTIONS)
    printed = capsys.readouterr().out
    assert "8 models, 0 of them are there already" in printed and "8 models of 2 epochs, 1 at a time, about" in printed
    with open(output / "dropped.csv") as file:
        dropped = {line["path"]: line["reason"] for line in csv.DictReader(file)}
    assert dropped["fake/Gan/nobody.png"] == "no face found" and "fake/Diffusion/00.png" not in dropped
    assert dropped["fake/Gan/03.png"] == "near-duplicate, 0 of 63 bits: fake/New/copy.png", (
        "the smaller data set keeps its image"
    )
    for data_set, of in summary["data"].items():
        assert sum(of["dropped"].values()) + sum(of[split] for split in SPLITS) == len(
            list((data_root / data_set).iterdir())
        )
    assert [summary["data"]["fake/New"][split] for split in SPLITS[:2]] == [0, 0] and summary["data"]["fake/New"][
        "test"
    ] >= 12

    paths = {
        treatment: sorted(
            str(path.relative_to(output / "data" / treatment)) for path in (output / "data" / treatment).rglob("*.png")
        )
        for treatment in ("raw", "equalised")
    }
    assert paths["raw"] == paths["equalised"], "both are of the same images"
    assert summary["probes"]["raw"]["files"]["Gan"] > 0.95, "JPEGs against PNGs"
    assert summary["probes"]["raw"]["files"]["New"] > 0.95 and summary["probes"]["equalised"]["files"]["New"] < 0.9
    for name in MAIN:
        for treatment in ("raw", "equalised"):
            folders = [
                next((output / "models").glob(f"{treatment}_*")) / name.replace(" ", "_") / f"seed_{seed}"
                for seed in (0, 1)
            ]
            aucs = [json.loads((folder / "prediction_results.json").read_text())["New"]["auc"] for folder in folders]
            assert (
                summary["detectors"][treatment][name]["New"] == aucs == summary["detectors"][treatment][name]["unseen"]
            )
    first, second = (np.mean(summary["detectors"]["equalised"][name]["New"]) for name in MAIN)
    gain = summary["comparison"]["New"]
    assert gain["difference"] == pytest.approx(first - second) and gain["low"] <= gain["difference"] <= gain["high"]
    masks = summary["masks"]
    assert masks["plain ViT"].keys() == {OWN}, "the plain ViT has none"
    every = [
        summary["detectors"]["equalised"]["LAMM-ViT"][name]
        for name in ("Gan", "Diffusion", "New")
        if name in summary["detectors"]["equalised"]["LAMM-ViT"]
    ]
    assert masks["LAMM-ViT"][OWN] == [0, pytest.approx(np.mean(every))] and masks["LAMM-ViT"].keys() == {OWN, *WRONG}
    assert all(0 < masks["LAMM-ViT"][how][0] < 1 for how in WRONG)
    tables = (output / "results.md").read_text()
    assert tables in printed and f"| LAMM-ViT, equalised | {0:.0f}"[:22] in tables

    calls.clear()
    shutil.rmtree(next((output / "models").glob("equalised_*")) / "LAMM-ViT/seed_1")
    assert compare(data_root, output, *OPTIONS) == summary, "the same numbers, trained again"
    assert calls.count("train") == 2, "to foretell the time, and the model that was missing"

    calls.clear()
    assert list(compare(data_root, output, *OPTIONS, "--without_raw")["detectors"]) == ["equalised"]
    assert "train" not in calls

    calls.clear(), capsys.readouterr()
    go_on_with_other_images(data_root, output, summary)
    assert "4 models, 0 of them are there already" in capsys.readouterr().out and calls.count("train") == 5


def go_on_with_other_images(root: Path, output: Path, first: dict) -> None:
    """Images that come, go or change are in the next run's tables, and models of earlier ones are not taken for its
    own.
    """
    (root / "real/Photos/01.jpg").unlink()
    shutil.copy(root / "fake/Gan/05.png", root / "fake/Gan/nobody.png")  # was no face, is a copy now
    (root / "fake/.cache").mkdir()
    (root / "fake/Gan/notes.txt").write_text("no image")
    for i in range(6):
        Image.fromarray(draw_face(np.random.default_rng(200 + i), "NoseLight", 240)).save(
            root / f"fake/New/more_{i}.png"
        )
    second = compare(root, output, *OPTIONS, "--seeds", 1)
    count = {
        name: sum(of["dropped"].values()) + sum(of[split] for split in SPLITS) for name, of in second["data"].items()
    }
    assert (
        count["real/Photos"] == 23
        and count["fake/Gan"] == 21
        and second["data"]["fake/New"]["test"] == first["data"]["fake/New"]["test"] + 6
    )
    assert second["data"]["fake/Gan"]["dropped"] == {"near-duplicate": 2}
    assert len(list((output / "models").glob("equalised_*"))) == 2, "the earlier ones are left alone"

    scores = next((output / "models").glob("raw_*")) / "plain_ViT/seed_0/prediction_results.csv"
    scores.write_text(scores.read_text().replace("Photos/0", "Photos/9"))
    with pytest.raises(ValueError, match="tested on other images than"):
        read_scores(
            [
                scores.parent,
                *(path.parent for path in (output / "models").glob("raw_*/LAMM-ViT/seed_0/prediction_results.csv")),
            ]
        )


@pytest.mark.slow
def test_what_it_refuses(tmp_path, calls):
    data_root = tmp_path / "datasets"
    draw_data_sets(data_root)
    for options, message in (
        (("--train_on", "Gam"), "no such generator in .*; there are Diffusion, Gan, New"),
        (("--train_on", "Gan", "Diffusion", "New"), "a generator that is not in --train_on"),
        (("--train_on", "Gan", "--seed", 3), "--seed: this script sets it"),
        (("--train_on", "Gan", "--with", "lamm"), "--with: this script sets it"),
        (("--train_on", "Gan", "--lrr", 3), "train.py does not take these options"),
        (("--train_on", "Gan", "--lr", -3), "cannot be negative"),
        (("--train_on", "Gan", "--seeds", 0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(data_root, tmp_path / "out", *options)
    assert not calls and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds results with other options"):
        compare(data_root, tmp_path / "out", "--train_on", "Gan")
