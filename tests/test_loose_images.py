"""inference.py --images: a row for each face or a reason for each file, and the score that the features path gives."""

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import NO_IMAGES_BY_NAME, ROOT, error_line, hostile_files, run_script
from PIL import Image

import inference
from benchmarks import wild
from dataset import FaceDataset
from drawing.face import sample_face
from drawing.render import draw_face, render
from evaluation import explain, pictures
from evaluation.operating import verdict_of
from evaluation.pictures import COLUMNS, framing_of
from evaluation.scoring import predict_scores
from faces.alignment import GREY
from faces.finder import FaceFinder, finder_files
from faces.loose import faces_in_file, find_faces, list_pictures
from faces.regions import face_frame, face_size
from runtime.checkpoint import load_checkpoint
from samples.feature_files import find_feature_files


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(finder_files())


@pytest.fixture(scope="module")
def framing(trained):
    return framing_of(*load_checkpoint(trained / "best_model.pth"), whole_image=False)


def drawn(seed: int, size: int) -> Image.Image:
    return Image.fromarray(render(sample_face(np.random.default_rng(seed)), size))


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


# --------------------------------------------------------------------------------------------------- faces of a picture


def test_a_picture_framed_as_in_training_is_taken_whole(finder, framing):
    for size in (224, 500):
        (face,) = find_faces(drawn(1, size), finder, framing)
        np.testing.assert_array_equal(
            face.image,
            np.asarray(drawn(1, size).resize((224, 224), Image.Resampling.LANCZOS) if size != 224 else drawn(1, size)),
        )
        left, top, right, bottom = np.array(face.box) / size
        assert 0 <= left < 0.35 < 0.65 < right <= 1 and 0 <= top < 0.45 < 0.7 < bottom <= 1


@pytest.mark.slow
def test_every_face_of_a_picture_is_cut_out_as_the_training_images_are_framed(finder, framing):
    """Three faces on a wide canvas, 8000 pixels wide too: each is found where it is, and comes out as its own picture
    would.
    """
    for scale in (1, 4):
        canvas = Image.new("RGB", (2000 * scale, 700 * scale), (128, 128, 128))
        places = {1: (60, 40, 560), 2: (760, 120, 400), 3: (1350, 60, 600)}
        for seed, (left, top, side) in places.items():
            canvas.paste(
                drawn(seed, side).resize((side * scale, side * scale), Image.Resampling.BICUBIC),
                (left * scale, top * scale),
            )
        faces = find_faces(canvas, finder, framing)
        assert len(faces) == 3 and [face.box[2] - face.box[0] for face in faces] == sorted(
            (face.box[2] - face.box[0] for face in faces), reverse=True
        )
        for face in faces:
            middle = (face.box[0] + face.box[2]) / 2 / scale
            seed, (left, top, side) = next(
                (seed, place) for seed, place in places.items() if place[0] < middle < place[0] + place[2]
            )
            assert left * scale < face.box[0] and face.box[3] < (top + side) * scale * 1.05
            mean = framing.mean_landmarks
            np.testing.assert_allclose(face.landmarks.mean(axis=0), mean.mean(axis=0), atol=12)
            assert np.linalg.norm(face_size(face.landmarks)) == pytest.approx(np.linalg.norm(face_size(mean)), rel=0.12)


@pytest.mark.parametrize(("width", "height"), [(400, 533), (400, 600), (533, 400), (600, 400), (460, 460), (560, 560)])
def test_a_picture_framed_otherwise_is_not_squeezed(finder, framing, width, height):
    """Portraits with another proportion, or with more around the face: it comes out in the proportions and the size of
    training.
    """
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    picture.paste(drawn(3, 400), ((width - 400) // 2, (height - 400) // 2))
    (face,) = find_faces(picture, finder, framing)
    (straight,) = find_faces(drawn(3, 400), finder, framing)
    if face.framing == "whole":  # a little more around it is still as in training
        assert (width, height) == (460, 460)
        return
    aspect, expected = (np.divide(*face_size(one.landmarks)) for one in (face, straight))
    assert aspect == pytest.approx(expected, rel=0.1)
    assert np.linalg.norm(face_size(face.landmarks)) == pytest.approx(
        np.linalg.norm(face_size(framing.mean_landmarks)), rel=0.12
    )


def test_a_little_more_border_than_in_training_is_cut_away(finder, framing):
    mean, framings = face_frame(framing.mean_landmarks / framing.side)[0], Counter()
    for seed in range(8):
        picture = Image.new("RGB", (480, 480), (128, 128, 128))
        picture.paste(drawn(seed, 400), (40, 40))
        face = find_faces(picture, finder, framing)[0]
        framings[face.framing] += 1
        assert face_frame(face.landmarks / framing.side)[0] >= 0.92 * mean
    assert framings["cut"] >= 5


@pytest.mark.slow
def test_small_faces_beside_a_large_one_have_rows(finder, framing):
    picture = Image.new("RGB", (900, 640), (120, 130, 140))
    for seed, (left, top, side) in {1: (0, 0, 640), 2: (645, 0, 250), 4: (645, 300, 250)}.items():
        picture.paste(drawn(seed, side), (left, top))
    assert [face.framing for face in find_faces(picture, finder, framing)] == ["cut"] * 3
    picture = drawn(1, 1000)
    picture.paste(drawn(2, 260), (0, 740))
    faces = find_faces(picture, finder, framing)
    assert [face.framing for face in faces] == ["whole", "cut"] and faces[1].box[0] < 260 < 740 < faces[1].box[3]


def test_nothing_is_filled_up_at_the_border(finder, framing):
    # a face in the corner, another one close to the opposite edge
    canvas = Image.new("RGB", (1200, 700), (10, 250, 10))
    canvas.paste(drawn(2, 420).crop((60, 60, 420, 420)), (0, 0))
    canvas.paste(drawn(4, 420).crop((0, 0, 400, 400)), (800, 300))
    faces = find_faces(canvas, finder, framing)
    assert len(faces) == 2
    for face in faces:
        black = (face.image == 0).all(axis=2).mean()
        assert black < 0.01 and face.image.shape == (224, 224, 3)


def test_without_a_face(finder, framing):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert find_faces(noise, finder, framing) == []
    (face,) = find_faces(noise, finder, framing._replace(whole_image=True))
    assert face.box is None and face.found_by == "mean"
    np.testing.assert_allclose(face.landmarks, framing.mean_landmarks, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- whole commands


def test_scores_are_those_of_the_features(datasets, features, trained, tmp_path):
    """Of all test images, the one without a face among them; with any batch size and number of workers."""
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    files = find_feature_files(features, "test")
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    expected = dict(zip((str(datasets / path) for path in dataset.column("paths")), predict_scores(model, dataset)))
    outputs = []
    for options in (("--batch_size", 7, "--workers", 2), ("--batch_size", 64, "--workers", 1)):
        done = run_script(
            "inference.py",
            "--checkpoint",
            trained / "best_model.pth",
            "--images",
            *expected,
            "--whole_image",
            *options,
            cwd=tmp_path,
        )
        outputs.append(rows_of(done.stdout))
        assert [row["path"] for row in outputs[-1]] == list(expected)
        for row in outputs[-1]:
            assert float(row["probability"]) == pytest.approx(expected[row["path"]], abs=1e-4)
            assert row["verdict"] == verdict_of(float(row["probability"]), checkpoint["thresholds"])
            assert not row["reason"]
    assert [(row["path"], row["left"], row["face"]) for row in outputs[0]] == [
        (row["path"], row["left"], row["face"]) for row in outputs[1]
    ]


def test_verdicts_are_by_the_thresholds_of_the_checkpoint(datasets, trained, tmp_path, monkeypatch):
    """Of nine faces; first with a checkpoint of before there were such thresholds."""
    checkpoint = torch.load(trained / "best_model.pth", weights_only=True)
    del checkpoint["thresholds"], checkpoint["temperature"]
    torch.save(checkpoint, tmp_path / "old.pth")
    titles = []
    monkeypatch.setattr(explain, "draw_explanation", lambda *picture: titles.append(picture[3]))
    faces = [datasets / f"real/Consistent/00{i}.png" for i in range(9)]

    def judged(name: str, *options: object, expect: int = 0) -> tuple[list[float], list[str], str]:
        arguments = ("--checkpoint", name, "--without_cnn", "--workers", 1, *options, "--images", *faces)
        done = run_script("inference.py", *arguments, cwd=tmp_path, expect=expect)
        rows = rows_of(done.stdout)
        return [float(row["probability"]) for row in rows], [row["verdict"] for row in rows], done.stderr.splitlines()

    scores, verdicts, told = judged("old.pth")
    assert len(scores) == 9
    assert verdicts == ["fake" if score >= checkpoint["val_threshold"] else "real" for score in scores]
    assert f"{verdicts.count('fake')} fake, {verdicts.count('real')} real, 0 uncertain (fake from" in told[-1]
    assert told[-1].endswith("on: the threshold chosen on validation)")
    assert "old.pth has no such thresholds" in judged("old.pth", "--fpr", 0.01, expect=1)[2][-1]

    low, high = (float(np.mean(np.sort(scores)[[i - 1, i]])) for i in (4, 7))
    torch.save(checkpoint | {"thresholds": {"0.01": high, "0.05": low}}, tmp_path / "new.pth")
    _, verdicts, told = judged("new.pth", "--explain", "why")
    assert verdicts == ["fake" if score > high else "real" if score < low else "uncertain" for score in scores]
    limits = f"fake from {high:.4f} on, real below {low:.4f}"
    assert f"faces: 2 fake, 4 real, 3 uncertain ({limits}: 1 % and 5 % of false alarms, chosen in training)" in told[-1]
    assert [title.split(", ")[0] for title in titles] == [f"{path.name}: {v}" for path, v in zip(faces, verdicts)]
    assert all(title.endswith(limits) for title in titles)
    _, verdicts, told = judged("new.pth", "--fpr", 0.05)
    assert verdicts == ["fake" if score > low else "real" for score in scores]
    assert "5 fake, 4 real, 0 uncertain" in told[-1] and "5 % of false alarms, chosen in training" in told[-1]
    line = judged("new.pth", "--fpr", 0.02, expect=1)[2][-1]
    assert line == "--fpr 0.02: new.pth has thresholds for 0.01 and 0.05; take one of these"


def test_a_followed_face_is_judged_by_the_mean_of_its_frames():
    rows = [
        pictures.Row(Path(name), argparse.Namespace(number=number), score)
        for name, number, score in (("a.mp4", 0, 0.95), ("a.mp4", 1, 0.1), ("a.mp4", 0, 0.55), ("b.mp4", 0, 0.92))
    ]
    rows.insert(3, pictures.Row(Path("no.jpg"), reason="no face found"))
    judged = pictures.with_verdicts(pictures.with_summaries(iter(rows)), {"0.01": 0.9, "0.05": 0.6})
    assert [(row.path.name, row.verdict, row.frames) for row in judged] == [
        *(("a.mp4", "fake", None), ("a.mp4", "real", None), ("a.mp4", "real", None)),
        *(("a.mp4", "uncertain", 2), ("a.mp4", "real", 1)),  # means of 0.75 and 0.1
        ("no.jpg", "", None),
        *(("b.mp4", "fake", None), ("b.mp4", "fake", 1)),
    ]


@pytest.mark.slow
def test_a_row_for_each_face_or_a_reason_for_each_file(trained, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    reasons = hostile_files(folder)
    drawn(1, 300).save(folder / "one.png")
    group = Image.new("RGB", (1500, 400), "white")
    for i in range(3):
        group.paste(drawn(i, 400), (50 + 480 * i, 0))
    group.save(folder / "three.jpg", quality=95)
    done = run_script(
        "inference.py",
        "--without_cnn",  # which takes most of a second for each picture of nobody
        "--checkpoint",
        trained / "best_model.pth",
        "--images",
        folder,
        "nowhere.jpg",
        cwd=tmp_path,
        expect=3,
    )
    rows = rows_of(done.stdout)
    by_path: dict[str, list[dict]] = {}
    for row in rows:
        by_path.setdefault(row["path"].removeprefix(f"{folder}/"), []).append(row)
    everything = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    } | {"nowhere.jpg"}
    assert set(by_path) == everything
    reasons["animated.gif"] = "no face found"  # a video
    for path, reason in (reasons | {"nowhere.jpg": "no such file"}).items():
        (row,) = by_path[path]
        # of small ones, too, it is said
        assert (reason if not re.search(r"\d+x\d+", reason) else "no face found") in row["reason"], (path, row)
        assert not row["probability"] and not row["verdict"]
    assert len(by_path["one.png"]) == 1 and len(by_path["three.jpg"]) == 3
    assert all(
        0 < float(row["probability"]) < 1 and row["verdict"] in ("real", "fake")
        for row in by_path["one.png"] + by_path["three.jpg"]
    )
    assert {name for name in NO_IMAGES_BY_NAME} <= set(by_path)
    assert "Traceback" not in done.stderr and f"files: {len(everything)}, without a score: " in done.stderr


@pytest.mark.slow
def test_json_lines_patterns_and_pictures_of_the_reasons(datasets, trained, tmp_path):
    arguments = (
        "--images",
        f"{datasets}/real/*/00[0-2].png",
        datasets / "fake/OffAxisMouth/noise.png",
        *"--output new/out.jsonl --format jsonl --explain why".split(),
    )
    done = run_script("inference.py", "--checkpoint", trained / "best_model.pth", *arguments, cwd=tmp_path, expect=3)
    rows = [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text().splitlines()]
    assert not done.stdout and all(tuple(row) == COLUMNS for row in rows) and len(rows) == 4
    assert rows[3]["reason"].startswith("no face found") and rows[3]["probability"] is None
    assert [row["explanation"] for row in rows] == ["why/000.png.png", "why/001.png.png", "why/002.png.png", None]
    assert all((tmp_path / row["explanation"]).exists() for row in rows[:3])


@pytest.mark.slow
def test_each_face_has_a_picture_of_its_own(datasets, trained, tmp_path):
    for name in ("a", "sub/a", "a_2", "sub/a_2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(datasets / "real/Consistent/000.png", tmp_path / name)
    names = (tmp_path / "a", tmp_path / "sub/a", tmp_path / "a_2", tmp_path / "sub/a_2")
    run_script(
        "inference.py",
        "--checkpoint",
        trained / "best_model.pth",
        *"--explain why --output rows.csv --images".split(),
        *names,
        cwd=tmp_path,
    )
    with open(tmp_path / "rows.csv", newline="") as file:
        pictures = [row["explanation"] for row in csv.DictReader(file)]
    assert len(set(pictures)) == 4 and all((tmp_path / picture).exists() for picture in pictures)


def test_a_file_is_listed_once_and_a_missing_one_is_named(datasets, tmp_path):
    one = datasets / "real/Consistent/000.png"
    listed = list(list_pictures([str(one), str(datasets / "real"), str(tmp_path / "no.png"), str(tmp_path / "*.png")]))
    assert (
        len(listed) == 62 and listed[0] == (one, "") and [reason for _, reason in listed[-2:]] == ["no such file"] * 2
    )
    long, below = tmp_path / ("n" * 300), one / "below.png"
    assert list(list_pictures([str(long), str(below), str(one)])) == [
        (long, "File name too long"),
        (below, "Not a directory"),
        (one, ""),
    ]


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_run_quietly(datasets, trained):
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--checkpoint",
        trained / "best_model.pth",
        "--batch_size",
        "1",
        "--images",
        datasets / "real",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == ",".join(COLUMNS) + "\n"
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait(60) == 0


def test_refusals(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    checkpoint = ("--checkpoint", trained / "best_model.pth")
    assert "empty: no images there" in error_line(
        run_script("inference.py", "--images", "empty", *checkpoint, cwd=tmp_path, expect=1)
    )
    for arguments, message in (
        (("--images", "a.png", "--robustness"), "--robustness: not for loose images"),
        (("--explain", "why"), "--explain: only for loose images"),
        (("--without_cnn",), "--without_cnn: only for loose images"),
        (("--images", ""), "one of the paths is empty"),
        (("--images", "a.png", "--protocol", "all_jpeg96"), "--protocol: not for"),
        (("--redetect",), "goes with --robustness"),
    ):
        with pytest.raises(ValueError, match=message):
            inference.main(inference.get_args_parser().parse_args(list(map(str, (*arguments, *checkpoint)))))


def test_pictures_can_be_scored_where_opencv_was_at_work(trained):
    """As in a notebook: workers are forked from a process that has OpenCV's threads. They waited forever."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    args = inference.get_args_parser().parse_args(["--images", "x", "--workers", "1"])
    rows = list(pictures.score_pictures(model, checkpoint, [(ROOT / "README.md", "")] * 3, args))
    assert len(rows) == 3 and all("cannot be read" in row.reason for row in rows)


def test_no_more_pictures_are_held_than_the_model_is_behind(trained, monkeypatch):
    """Memory does not grow with the number of pictures: a consumer that stops stops the search a few pictures later."""
    looked_at = []

    def counted():
        for i in range(1000):
            looked_at.append(i)
            yield ROOT / "README.md", ""

    class Pictures(list):
        __len__, __iter__ = lambda self: 1000, lambda self: counted()

    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    args = inference.get_args_parser().parse_args(["--images", "x", "--workers", "1", "--batch_size", "4"])
    rows = pictures.score_pictures(model, checkpoint, Pictures(), args)
    for _ in range(4):
        next(rows)
    time.sleep(0.5)
    assert len(looked_at) < 50
    rows.close()


# --------------------------------------------------------------------------------------------- models of aligned images


@pytest.fixture(scope="session")
def aligned(made_once):
    """Turned faces in pictures of another shape, their aligned and recompressed copies, and a model of these."""

    def make(root: Path) -> None:
        rng, gray = np.random.default_rng(0), (120, 130, 140)
        for name, generator in (("real/Photos", None), ("fake/Gan", "OffAxisMouth")):
            (root / "raw" / name).mkdir(parents=True)
            for i in range(15):
                face, angle = Image.fromarray(draw_face(rng, generator, 360)), rng.uniform(-12, 12)
                canvas = Image.new("RGB", (520, 400), gray)
                canvas.paste(face.rotate(angle, Image.Resampling.BICUBIC, fillcolor=gray), (70, 20))
                canvas.save(root / "raw" / name / f"{i:02}.jpg", quality=90)
            options = ("--directory", root / "raw" / name, "--output_dir", root / "data" / name)
            options += tuple("--align --recompress 60-90 --target_height 160 --target_width 160".split())
            run_script("preprocess.py", *options, cwd=root)
        options = "--data_root data --output_dir features --img_size 112 --patch_size 28 --workers 1".split()
        run_script("feature_extraction.py", *options, cwd=root)
        options = "--features features --output_dir model --patch_size 28 --embed_dim 24 --depth 2".split()
        run_script("train.py", *options, "--epochs", 1, "--batch_size", 8, cwd=root)

    return made_once("aligned", make)


@pytest.mark.slow
def test_loose_pictures_are_aligned_for_a_model_of_aligned_images(aligned, finder, tmp_path):
    """Originals and their prepared copies have the score that they have by way of the features."""
    model, checkpoint = load_checkpoint(aligned / "model/best_model.pth")
    assert checkpoint["framing"]["treatment"] == "aligned 0.6 on grey, JPEG 60-90, 160x160"
    expected = {}
    for split in ("train", "val", "test"):
        dataset = FaceDataset(
            list(find_feature_files(aligned / "features", split).values()),
            model.config.grid_size,
            checkpoint["mask_style"],
        )
        expected |= dict(
            zip((path.removesuffix(".png") for path in dataset.column("paths")), predict_scores(model, dataset))
        )
    picture = drawn(1, 360)
    picture.crop((100, 80, 270, 270)).save(tmp_path / "close.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
        tmp_path / "nobody.png"
    )
    picture.resize((500, 360)).save(tmp_path / "squashed.jpg")
    run_script("preprocess.py", "--directory", tmp_path, "--output_dir", tmp_path.with_name("prepared"), cwd=tmp_path)
    shutil.copy(tmp_path.with_name("prepared") / "squashed.png", tmp_path / "squashed.png")
    done = run_script(
        "inference.py",
        "--images",
        aligned / "raw",
        aligned / "data",
        tmp_path,
        "--checkpoint",
        aligned / "model/best_model.pth",
        cwd=tmp_path,
        expect=3,
    )
    rows = {row["path"]: row for row in rows_of(done.stdout)}
    framings = Counter()
    for name, score in expected.items():
        original, copy = rows[str(aligned / "raw" / f"{name}.jpg")], rows[str(aligned / "data" / f"{name}.png")]
        assert original["framing"] == "aligned" and float(original["probability"]) == pytest.approx(score, abs=1e-4)
        framings[copy["framing"]] += 1
        if copy["framing"] == "whole":
            assert float(copy["probability"]) == pytest.approx(score, abs=1e-4)
        box = finder.detect(np.asarray(Image.open(original["path"])))
        left, top, right, bottom = (int(original[side]) for side in ("left", "top", "right", "bottom"))
        if original["face"] == "frontal":  # dlib's boxes lie on a coarse grid
            assert (
                np.hypot((left + right - box.left() - box.right()) / 2, (top + bottom - box.top() - box.bottom()) / 2)
                < 0.25 * box.width()
            )
            assert 0.7 < (right - left) / box.width() < 1.6
    assert framings["whole"] >= 0.9 * len(expected) > 20
    close = rows[str(tmp_path / "close.png")]
    assert close["framing"] == "aligned" and 0.02 < float(close["filled"]) < 0.6 and 0 < float(close["probability"]) < 1
    assert rows[str(tmp_path / "nobody.png")]["reason"].startswith("no face found")
    # A model of an earlier version gets what it was trained on: a mirror image where its picture ends
    framing = framing_of(model, checkpoint, whole_image=False)
    earlier = framing._replace(treatment=framing.treatment.replace(" on grey", ""))
    grey, mirrored = (
        faces_in_file(tmp_path / "close.png", one, 1, finder)[0].image.astype(int) for one in (framing, earlier)
    )
    share = [(np.abs(image - GREY).max(axis=2) < 12).mean() for image in (grey, mirrored)]
    assert share[0] > float(close["filled"]) - 0.05 > share[1]
    whole = run_script(
        "inference.py",
        "--images",
        tmp_path / "close.png",
        tmp_path / "nobody.png",
        "--whole_image",
        "--checkpoint",
        aligned / "model/best_model.pth",
        cwd=tmp_path,
    )
    assert [(row["face"] == "mean", row["framing"], row["left"]) for row in rows_of(whole.stdout)] == [
        (False, "aligned", close["left"]),
        (True, "whole", ""),
    ]
    assert all(0 < float(row["probability"]) < 1 for row in rows_of(whole.stdout))
    assert "was resized already, it was a JPEG 500x360" in rows[str(tmp_path / "squashed.png")]["reason"]


@pytest.mark.slow
def test_what_was_treated_otherwise_than_the_training_images_has_no_score(aligned, trained):
    copy = next((aligned / "data/fake/Gan").iterdir())
    done = run_script(
        "inference.py", "--images", copy, "--checkpoint", trained / "best_model.pth", cwd=aligned, expect=3
    )
    assert (
        rows_of(done.stdout)[0]["reason"]
        == "is aligned 0.6 on grey, JPEG 60-90, 160x160, and the training images are not; take the original"
    )


@pytest.mark.slow
def test_images_that_were_not_treated_alike_are_named_and_not_trained_on(aligned, tmp_path):
    shutil.copytree(aligned / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/fake/Gan")
    run_script(
        "preprocess.py",
        "--directory",
        aligned / "raw/fake/Gan",
        "--output_dir",
        tmp_path / "data/fake/Gan",
        cwd=tmp_path,
    )
    options = ("--data_root", "data", "--output_dir", "features", "--img_size", 112, "--patch_size", 28)
    done = run_script("feature_extraction.py", *options, cwd=tmp_path)
    assert (
        "WARNING: preprocess.py treated images differently: real/Photos: aligned 0.6 on grey, JPEG 60-90, 160x160;"
        " fake/Gan: resized alone" in done.stdout
    )
    refused = run_script(
        "train.py", *"--features features --patch_size 28 --embed_dim 24 --depth 1".split(), cwd=tmp_path, expect=1
    )
    assert "not treated alike (resized alone; aligned 0.6 on grey, JPEG 60-90, 160x160)" in error_line(refused)


@pytest.mark.slow
def test_pictures_on_their_way(aligned, trained, finder, tmp_path, monkeypatch):
    large = Image.open(aligned / "raw/real/Photos/00.jpg").resize((2000, 1538))
    large.save(tmp_path / "large.png")
    made = wild.variants(tmp_path / "large.png", finder)
    assert made.pop(wild.AS_IT_IS) == tmp_path / "large.png"
    assert made["messenger, twice"].size == (1280, 984) and made["screenshot"].size == wild.SCREEN
    assert made["margin 300%"].width == pytest.approx(7 * made["margin 0%"].width, abs=7)
    # In the middle of the black screen, as wide as that
    shown = np.asarray(made["screenshot"]).max(axis=(1, 2)).nonzero()[0]
    assert (shown[0] + shown[-1], len(shown)) == pytest.approx((wild.SCREEN[1] - 1, 1538 * 1080 / 2000), abs=2)
    changed = [made[name] for name in made if name.startswith(("JPEG", "blur", "noise", "50%", "25%"))]
    differences = [np.abs(np.asarray(image).astype(int) - np.asarray(large)).mean() for image in changed]
    assert len(changed) == 8 and min(differences) > 0 and differences[:4] == sorted(differences[:4])

    monkeypatch.setattr(FaceFinder, "detect_cnn", lambda *_: None)  # half a second each time, and finds nobody here
    folder, fakes = tmp_path / "real", tmp_path / "fake"
    for one, name in ((folder, "real/Photos"), (fakes, "fake/Gan")):
        one.mkdir()
        for path in sorted((aligned / "raw" / name).iterdir())[:2]:
            shutil.copy(path, one)
    Image.new("RGB", (40, 40), (120, 130, 140)).save(folder / "nobody.png")
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:2000])

    def table(model: Path, fake: Path = fakes, expect: int = 0) -> subprocess.CompletedProcess:
        options = ("--checkpoint", model / "best_model.pth", "--real", folder, "--fake", fake, "--images", 5)
        return run_script("benchmarks/wild.py", *options, cwd=tmp_path, expect=expect)

    done = table(aligned / "model")
    assert f"{folder / 'broken.jpg'}: left out" in done.stderr
    rows = (re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines() if " of 2" in line)
    rows = {name: cells for name, *cells in rows}
    assert list(rows) == [wild.AS_IT_IS, *made]
    for auc, found, drift, flagged, *of_fake in rows.values():
        assert 0 <= float(auc) <= 1 and int(found[0]) <= 2 and found.endswith("of 3") and of_fake[0].endswith("of 2")
        assert float(drift) < 1 and flagged in ("0%", "50%", "100%")
    assert rows[wild.AS_IT_IS][2] == rows[wild.AS_IT_IS][5] == "0.000" and rows[wild.AS_IT_IS][1] == "2 of 3"
    assert error_line(table(aligned / "model", tmp_path / "none", expect=1))
    assert "the margin is a cue" in error_line(table(trained, expect=1))


def test_drift_is_of_pictures_found_before_and_after():
    scores = [
        {wild.AS_IT_IS: (0.2, False), "blur": (0.6, True)},
        {wild.AS_IT_IS: (0.9, True), "blur": (0.8, False)},
        {wild.AS_IT_IS: (0.1, False)},
        {"blur": (0.7, True)},
        {},
    ]
    assert wild.columns(scores, "blur") == ([0.6, 0.8], ["3 of 5", "0.250", "50%"])
    assert wild.columns(scores[3:], "blur") == ([], ["1 of 2", "–", "–"])
