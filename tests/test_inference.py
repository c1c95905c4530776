"""inference.py: the checkpoint, the metrics, the draw of real images, scores that depend on nothing but the image."""

import argparse
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import GENERATORS, ROOT, SMALL, error_line, refusal, run_script
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, recall_score, roc_auc_score

import inference
from dataset import FaceDataset
from evaluation.groups import rate
from evaluation.metrics import METRICS
from evaluation.protocol import draw_comparisons, load_test_set, score
from evaluation.robustness import ROBUSTNESS, finder_again
from evaluation.scoring import load_batches, predict_scores
from evaluation.tables import results_as_latex, results_as_markdown
from faces.finder import finder_files
from model import LAMMViT, LAMMViTConfig
from runtime.checkpoint import CheckpointError, load_checkpoint
from samples.feature_files import find_feature_files
from samples.transforms import TestTransform

# ------------------------------------------------------------------------------------------------------ the comparisons


@pytest.fixture(scope="module")
def test_set(features) -> tuple[FaceDataset, list[str]]:
    files = find_feature_files(features, "test")
    return FaceDataset(list(files.values()), grid_size=4), list(files)


def test_equal_counts_drawn_by_seed(test_set):
    dataset, names = test_set
    comparisons = draw_comparisons(dataset, names, seed=0)
    assert set(comparisons) == set(GENERATORS)
    paths = dataset.column("paths")
    for generator, chosen in comparisons.items():
        labels = dataset.labels[chosen]
        assert (labels == 0).sum() == (labels == 1).sum() == 6 + (generator == "OffAxisMouth" and len(chosen) > 12)
        assert all(path.startswith("real/") or f"/{generator}/" in path for path in paths[chosen])
    again, other = draw_comparisons(dataset, names, seed=0), draw_comparisons(dataset, names, seed=1)
    assert all(np.array_equal(comparisons[name], again[name]) for name in comparisons)
    assert any(not np.array_equal(comparisons[name], other[name]) for name in comparisons)


def test_the_draw_does_not_depend_on_names_or_order(test_set):
    dataset, names = test_set
    hashes = dataset.column("sha256")
    reordered = FaceDataset(dataset.files[::-1], grid_size=4)

    def drawn(data: FaceDataset, order: list[str]) -> dict[str, set[bytes]]:
        hashes = data.column("sha256")
        return {
            name: {hashes[i].tobytes() for i in chosen} for name, chosen in draw_comparisons(data, order, 0).items()
        }

    assert len(hashes) == len(dataset) and drawn(dataset, names) == drawn(reordered, names[::-1])


# --------------------------------------------------------------------------------------------------------------- scores


def test_normalize_is_imagenets_unless_the_trunk_has_its_own():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    small = {"img_size": 16, "embed_dim": 12, "depth": 1}
    low, high = LAMMViT(LAMMViTConfig(**small)).normalize(images)
    torch.testing.assert_close(low[:, 0, 0], -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close((high - low)[:, 0, 0], 1 / torch.tensor([0.229, 0.224, 0.225]))
    other = LAMMViT(LAMMViTConfig(**small, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)))
    assert other.normalize(images).unique().tolist() == [-1, 1]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_whoever_reads_them(test_set, num_workers):
    dataset, _ = test_set
    batches = [np.random.default_rng(i).permutation(len(dataset))[: i % 5 + 1] for i in range(20)]
    for indices, batch in zip(
        batches, load_batches(dataset, ((indices,) for indices in batches), num_workers), strict=True
    ):
        np.testing.assert_array_equal(batch["index"], indices)
        np.testing.assert_array_equal(batch["image"], dataset.read(indices)["image"])


def test_a_reader_that_fails_is_heard_and_one_that_is_left_ends(test_set):
    dataset, _ = test_set
    with pytest.raises(IndexError):
        list(load_batches(dataset, [([0],), ([1],), ([10**9],), ([2],)], 2))
    before = threading.active_count()
    loader = load_batches(dataset, [([0],)] * 100, 2)
    next(loader)
    loader.close()
    assert threading.active_count() == before


def test_scores_depend_on_the_image_alone(test_set, trained):
    dataset, _ = test_set
    model, _ = load_checkpoint(trained / "best_model.pth")
    reference = predict_scores(model, dataset, batch_size=64)
    assert reference.shape == (len(dataset),) and ((reference > 0) & (reference < 1)).all()
    np.testing.assert_array_equal(predict_scores(model, dataset, batch_size=64, num_workers=2), reference)
    np.testing.assert_allclose(predict_scores(model, dataset, batch_size=5), reference, atol=1e-6)
    backwards = np.arange(len(dataset))[::-1]
    np.testing.assert_allclose(predict_scores(model, dataset, indices=backwards), reference[::-1], atol=1e-6)


def test_predicting_leaves_the_model_in_its_mode(test_set, trained):
    model, _ = load_checkpoint(trained / "best_model.pth")
    model.train()
    predict_scores(model, test_set[0], indices=np.array([0]))
    assert model.training


# ----------------------------------------------------------------------------------------------------------- checkpoint


def spoiled(checkpoint: dict, how: str) -> object:
    if how == "other architecture":
        return checkpoint | {"config": checkpoint["config"] | {"depth": 5}}
    if how == "unknown option":
        return checkpoint | {"config": checkpoint["config"] | {"registers": 4}}
    if how == "bare weights":
        return checkpoint["model"]
    if how == "other version":
        return checkpoint | {"version": 99}
    if how == "numbered weights":
        return checkpoint | {"model": dict(enumerate(checkpoint["model"].values()))}
    return [1, 2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other architecture", "another architecture than its config"),
        ("unknown option", "another architecture than its config"),
        ("numbered weights", "another architecture than its config"),
        ("bare weights", "not a checkpoint of train.py"),
        ("other version", "checkpoint version 99"),
        ("a list", "not a checkpoint of train.py"),
    ],
)
def test_foreign_checkpoints_are_refused(trained, tmp_path, how, message):
    checkpoint = torch.load(trained / "best_model.pth", weights_only=True)
    torch.save(spoiled(checkpoint, how), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "other.pth")
    assert "other.pth" in str(error.value)


def test_damaged_and_missing_checkpoints_are_refused(trained, features, tmp_path):
    content = (trained / "best_model.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, message in (
        ("half", "not a whole checkpoint"),
        ("text", "not a whole"),
        ("empty", "not a whole"),
        ("missing", "no such checkpoint; run train.py"),
    ):
        line = refusal(inference, "--features", features, "--checkpoint", tmp_path / f"{name}.pth")
        assert f"{name}.pth" in line and message in line


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def evaluated(features, trained, made_once) -> tuple[Path, str]:
    """The folder that an evaluation with all it can do has left, and what it printed."""

    def test_it(folder: Path) -> None:
        options = ("--features", features, "--checkpoint", trained / "best_model.pth")
        options += tuple("--bootstrap 200 --robustness --report report".split())
        (folder / "said.txt").write_text(run_script("inference.py", *options, cwd=folder).stdout)

    folder = made_once("evaluated", test_it)
    return folder, (folder / "said.txt").read_text()


def read_scores(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{generator: (labels, scores)} of the CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    of = {name: [row for row in rows if row["generator"] == name] for name in {row["generator"] for row in rows}}
    return {
        name: (np.array([int(row["label"]) for row in rows]), np.array([float(row["score"]) for row in rows]))
        for name, rows in of.items()
    }


@pytest.mark.slow
def test_metrics_are_scikit_learns_on_the_scores_of_the_csv_file(evaluated, trained):
    folder, printed = evaluated
    results = json.loads((folder / "prediction_results.json").read_text())
    assert set(results) == {*GENERATORS, "Mean", "Std", "Worst", "Run", "Operating", "Robustness"}
    threshold = load_checkpoint(trained / "best_model.pth")[1]["val_threshold"]
    scores = read_scores(folder / "prediction_results.csv")
    assert scores.keys() == set(GENERATORS)
    for name, (labels, values) in scores.items():
        row = results[name]
        assert row["n_real"] == row["n_fake"] == (labels == 0).sum() == (labels == 1).sum()
        expected = {
            "accuracy": 100 * accuracy_score(labels, values >= 0.5),
            "accuracy_val_threshold": 100 * accuracy_score(labels, values >= threshold),
            "real_accuracy": 100 * recall_score(labels, values >= 0.5, pos_label=0),
            "fake_accuracy": 100 * recall_score(labels, values >= 0.5),
            "ap": average_precision_score(labels, values),
            "auc": roc_auc_score(labels, values),
            "tpr_at_fpr1": 100 * np.mean(values[labels == 1] > values[labels == 0].max()),  # 6 or 7 real images
            "tpr_at_fpr10": 100 * np.mean(values[labels == 1] > values[labels == 0].max()),
        }
        assert row["log_loss"] == pytest.approx(log_loss(labels, values)) and 0 <= row["ece"] <= 1
        assert f"{row['log_loss']:.4f}" in printed and f"{row['ece']:.4f}" in printed
        for metric, value in expected.items():
            assert row[metric] == pytest.approx(value, abs=1e-9)
            low, high = row["intervals"][metric]
            assert low <= row[metric] <= high
            assert f"{row[metric]:.4f}" in printed or f"{row[metric]:.2f}" in printed
        assert row["seen"] is True
    for metric in METRICS:
        values = [results[name][metric] for name in GENERATORS]
        assert results["Mean"][metric] == pytest.approx(np.mean(values)) and results["Std"][metric] == pytest.approx(
            np.std(values, ddof=1)
        )
    assert results["Worst"]["generator"] == min(GENERATORS, key=lambda name: results[name]["auc"])
    assert results["Run"]["checkpoint_sha256"] == hashlib.sha256((trained / "best_model.pth").read_bytes()).hexdigest()
    assert results["Run"]["sources"]["real/Consistent"] == {
        "PNG 224x224": max(results[name]["n_real"] for name in GENERATORS)
    }


@pytest.mark.slow
def test_the_scores_are_what_the_model_says(evaluated, features, trained):
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    files = find_feature_files(features, "test")
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    scores = predict_scores(model, dataset)
    for name, chosen in draw_comparisons(dataset, list(files), seed=0).items():
        labels, written = read_scores(evaluated[0] / "prediction_results.csv")[name]
        np.testing.assert_array_equal(labels, dataset.labels[chosen])
        np.testing.assert_allclose(written, scores[chosen], atol=1e-6)


@pytest.mark.slow
def test_rows_for_a_paper(evaluated):
    folder, _ = evaluated
    results = json.loads((folder / "prediction_results.json").read_text())
    markdown = [" ".join(line.split()) for line in (folder / "prediction_results.md").read_text().splitlines()]
    assert {line.count("|") for line in markdown[:7]} == {11}
    latex = re.sub(" +", " ", (folder / "prediction_results.tex").read_text())
    for name in GENERATORS:
        row = next(line for line in markdown if f"| {name} |" in line)
        assert (
            f"{results[name]['accuracy']:.2f}" in row
            and "| seen |" in row
            and f"| {2 * results[name]['n_real']} |" in row
        )
        row = next(line for line in latex.splitlines() if line.startswith(name))
        assert row.endswith(r" \\") and row.count("&") == 12 and f"{100 * results[name]['auc']:.1f}" in row
    assert "Mean & " in latex and r"$\pm$" in latex and f"Worst: {results['Worst']['generator']}" in latex


@pytest.mark.slow
def test_names_that_mean_something_to_markdown_and_latex(evaluated):
    results = json.loads((evaluated[0] / "prediction_results.json").read_text())
    odd = {r"A & B_50%, v|2 ~x^y\z {#1} $": results[GENERATORS[0]]} | {name: results[name] for name in ("Mean", "Std")}
    tables = results_as_markdown(odd, None).split("\n\n")
    counts = [{line.replace(r"\|", "").count("|") for line in table.splitlines()} for table in tables]
    assert counts == [{11}, {8}]
    row = " ".join(results_as_latex(odd).splitlines()[1].split())
    broken = {"new\nline": results[GENERATORS[0]]} | {name: results[name] for name in ("Mean", "Std")}
    assert results_as_markdown(broken, None).count("new line") == 2, "one row in each table"
    assert results_as_latex(broken).count("new line") == 1
    assert row.startswith(r"A \& B\_50\%, v|2 \textasciitilde{}x\^{}y\textbackslash{}z \{\#1\} \$ & seen")


@pytest.mark.slow
def test_under_every_corruption(evaluated):
    folder, printed = evaluated
    rows = json.loads((folder / "prediction_results.json").read_text())["Robustness"]
    assert [(row["corruption"], row["level"]) for row in rows] == [("none", 0)] + [
        (name, level) for name, levels in ROBUSTNESS.items() for level in levels
    ]
    assert all(set(METRICS) <= row[name].keys() for row in rows for name in (*GENERATORS, "Mean"))
    assert len({row["Mean"]["auc"] for row in rows}) > 5 and "under corruptions" in printed
    with Image.open(folder / "prediction_results_robustness.png") as picture:
        assert min(picture.size) > 200
    assert "<html" in (folder / "report/report.html").read_text()


@pytest.mark.slow
def test_two_processes_and_other_workers_give_the_same_numbers(evaluated, features, trained, tmp_path):
    arguments = (
        "--features",
        features,
        "--checkpoint",
        trained / "best_model.pth",
        *"--bootstrap 200 --num_workers 0".split(),
    )
    run_script("inference.py", *arguments, "--batch_size", 64, cwd=tmp_path, processes=2)
    assert (tmp_path / "prediction_results.csv").read_bytes() == (evaluated[0] / "prediction_results.csv").read_bytes()
    mine, others = (json.loads((folder / "prediction_results.json").read_text()) for folder in (tmp_path, evaluated[0]))
    assert all(mine[name] == others[name] for name in (*GENERATORS, "Mean", "Std", "Worst"))


def options(*arguments: object) -> argparse.Namespace:
    return inference.get_args_parser().parse_args(list(map(str, arguments)))


def test_protocols_recompress_what_they_say(features, trained):
    args = {
        protocol: options("--features", features, "--protocol", protocol)
        for protocol in ("native", "fakes_jpeg96", "all_jpeg96")
    }
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    test_set = load_test_set(model, checkpoint, args["native"])
    native, fakes, both = (score(model, test_set, args[protocol]) for protocol in args)
    real, fake = ((test_set.dataset.labels == label) & ~np.isnan(native) for label in (0, 1))
    np.testing.assert_allclose(fakes[real], native[real], atol=1e-6)
    assert (np.abs(fakes[fake] - native[fake]) > 1e-7).all() and (np.abs(both[real] - native[real]) > 1e-7).all()
    np.testing.assert_allclose(fakes[fake], both[fake], atol=1e-6)


def test_corruptions_depend_on_the_image_alone(test_set):
    dataset, _ = test_set
    noisy = TestTransform([("noise", 0.1)])
    sample = dataset.read([0, 3])
    images = sample["image"].transpose(0, 2, 3, 1)
    out = [
        noisy(image, points, masks, np.random.default_rng(i))[0]
        for i, (image, points, masks) in enumerate(zip(images, sample["landmarks"], sample["region_masks"]))
    ]
    np.testing.assert_array_equal(
        out[0], noisy(images[0].copy(), sample["landmarks"][0], sample["region_masks"][0], np.random.default_rng(9))[0]
    )
    assert np.std(out[0].astype(float) - images[0]) == pytest.approx(25, rel=0.3) and not np.array_equal(
        out[0].astype(int) - images[0], out[1].astype(int) - images[1]
    )
    assert np.array_equal(
        TestTransform([("resize", 1.0)])(images[0], *images[:2], np.random.default_rng(0))[0], images[0]
    )
    flat = TestTransform([("resize", 0.25)])(images[0], *images[:2], np.random.default_rng(0))[0]
    assert (
        flat.shape == images[0].shape
        and np.abs(np.diff(flat.astype(int), axis=0)).mean() < np.abs(np.diff(images[0].astype(int), axis=0)).mean()
    )


@pytest.mark.slow
def test_landmarks_are_kept_or_found_again(features, trained):
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    test_set = load_test_set(model, checkpoint, options("--features", features))
    find = finder_again(test_set, checkpoint, finder_files())
    index = int(np.flatnonzero(test_set.dataset.column("found_by") == 0)[0])
    sample = test_set.dataset.read([index])
    shift = np.roll(sample["image"][0].transpose(1, 2, 0), 20, axis=1)  # (3, h, w) -> (h, w, 3), 20 pixels to the right
    landmarks, masks = find(np.ascontiguousarray(shift))
    assert (
        np.median(landmarks[:, 0] - sample["landmarks"][0, :, 0]) == pytest.approx(20, abs=4)
        and masks.shape == sample["region_masks"][0].shape
    )
    nothing, _ = find(np.zeros_like(shift))
    np.testing.assert_array_equal(nothing, test_set.dataset.mean_landmarks)
    kept = TestTransform([("blur", 3)])(shift, landmarks, masks, None)
    again = TestTransform([("blur", 3)], find)(shift, landmarks, masks, None)
    assert kept[1] is landmarks and again[1] is not landmarks


def test_formats_and_sizes_that_tell_the_class_are_named(features, trained, tmp_path, capsys):
    shutil.copytree(features, tmp_path / "features")
    with h5py.File(tmp_path / "features/real/Consistent/test_features.h5", "r+") as file:
        file["originals"][:] = ["JPEG 1024x1024"] * len(file["originals"])
    arguments = (
        "--features",
        tmp_path / "features",
        "--checkpoint",
        trained / "best_model.pth",
        "--output",
        tmp_path / "out.json",
        "--bootstrap",
        0,
    )
    inference.main(options(*arguments))
    warnings = json.loads((tmp_path / "out.json").read_text())["Run"]["warnings"]
    assert len(warnings) == 2 and all(
        "the format and size of its files tell it" in line and "real: JPEG 1024x1024 100 %" in line for line in warnings
    )
    assert all(f"WARNING: {line}" in capsys.readouterr().out for line in warnings[:1])
    inference.main(options(*arguments, "--features", features))
    assert json.loads((tmp_path / "out.json").read_text())["Run"]["warnings"] == []


@pytest.mark.slow
def test_generators_kept_from_training_are_marked(features, tmp_path, capsys):
    run_script(
        "train.py",
        "--features",
        features,
        *SMALL,
        "--epochs",
        1,
        "--datasets",
        "Consistent",
        "OffAxisMouth",
        cwd=tmp_path,
    )
    inference.main(
        options(
            "--features",
            features,
            "--checkpoint",
            tmp_path / "output_model/best_model.pth",
            "--output",
            tmp_path / "out.json",
            "--bootstrap",
            0,
        )
    )
    results = json.loads((tmp_path / "out.json").read_text())
    assert (results["OffAxisMouth"]["seen"], results["IrisMismatch"]["seen"]) == (True, False)
    lines = {
        line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith(GENERATORS)
    }
    assert lines == {"OffAxisMouth": "seen", "IrisMismatch": "unseen"}


def test_verdicts_and_what_came_of_the_thresholds(features, trained, tmp_path):
    """Thresholds in the midst of the scores, so that each verdict is there."""
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    given = ("--features", features, "--bootstrap", 0, "--output", tmp_path / "out.json")
    of_test = load_test_set(model, checkpoint, options(*given))
    low, high = np.quantile(predict_scores(model, of_test.dataset)[of_test.needed], (0.4, 0.7))
    torch.save(checkpoint | {"thresholds": {"0.01": float(high), "0.05": float(low)}}, tmp_path / "new.pth")
    del checkpoint["thresholds"], checkpoint["temperature"]
    torch.save(checkpoint, tmp_path / "old.pth")

    def run(name: str, *further: object) -> tuple[dict, list[dict], str]:
        done = run_script("inference.py", *given, "--checkpoint", tmp_path / name, *further, cwd=tmp_path)
        with open(tmp_path / "out.csv", newline="") as file:
            rows = [row | {"score": float(row["score"])} for row in csv.DictReader(file)]
        return json.loads((tmp_path / "out.json").read_text()), rows, done.stdout

    results, rows, printed = run("new.pth", "--report", tmp_path / "report")
    assert {row["verdict"] for row in rows} == {"fake", "real", "uncertain"}
    for row in rows:
        expected = "fake" if row["score"] >= high else "real" if row["score"] < low else "uncertain"
        assert row["verdict"] == expected
    operating, real = results["Operating"], {row["path"]: row["score"] for row in rows if row["label"] == "0"}
    assert list(operating["collections"]) == ["real/Consistent"]
    collection = operating["collections"]["real/Consistent"]
    assert collection["n"] == len(real), "each photograph once, however many generators it stands against"
    for name, threshold in (("0.01", high), ("0.05", low)):
        hits = np.array(list(real.values())) >= threshold
        assert collection["false_alarms"][name] == rate(hits)
        for generator in GENERATORS:
            fakes = [row["score"] for row in rows if row["label"] == "1" and row["generator"] == generator]
            assert operating["generators"][generator]["n"] == len(fakes)
            assert operating["generators"][generator]["found"][name] == rate(np.array(fakes) >= threshold)
    share = collection["false_alarms"]["0.05"]
    cell = f"{100 * share['rate']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    for text in (printed, (tmp_path / "out.md").read_text(), (tmp_path / "report/report.html").read_text()):
        assert cell in text and "false alarms by collection" in text and f"% at {low:.4f} (5 %)" in text
    assert f"fake from {high:.4f} on, real below {low:.4f}" in (tmp_path / "report/report.html").read_text()

    results, rows, _ = run("new.pth", "--fpr", 0.05, "--by", "dataset")
    assert [row["verdict"] for row in rows] == ["fake" if row["score"] >= low else "real" for row in rows]
    assert results["By"]["dataset"]["real/Consistent"]["false_alarms"] == share
    assert list(results["Operating"]["thresholds"]) == ["0.05"] and results["Run"]["arguments"]["fpr"] == 0.05

    results, rows, printed = run("old.pth")
    verdicts = ["fake" if row["score"] >= checkpoint["val_threshold"] else "real" for row in rows]
    assert [row["verdict"] for row in rows] == verdicts and results["Run"]["temperature"] is None
    assert results["Operating"]["thresholds"] == {"validation": checkpoint["val_threshold"]}
    assert "(validation)" in printed
    line = refusal(inference, *given, "--checkpoint", tmp_path / "new.pth", "--fpr", 0.1)
    assert line.endswith("new.pth has thresholds for 0.01 and 0.05; take one of these")


def test_refusals(features, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.csv").mkdir()
    shutil.copytree(features, tmp_path / "cut")
    shutil.copytree(features, tmp_path / "reserved")
    (tmp_path / "reserved/fake/OffAxisMouth").rename(tmp_path / "reserved/fake/level")
    victim = tmp_path / "cut/fake/OffAxisMouth/test_features.h5"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    checkpoint = ("--checkpoint", trained / "best_model.pth")
    for arguments, messages in (
        (("--features", "cut"), (str(victim.relative_to(tmp_path)), "cut off")),
        (("--features", "nowhere"), ("nowhere", "run feature_extraction.py")),
        (
            ("--features", features, "--datasets", "Consistent", "NoSuchGenerator"),
            ("no data set NoSuchGenerator", "fake/OffAxisMouth"),
        ),
        (("--features", features, "--datasets", "OffAxisMouth"), ("holds one class only",)),
        (("--images", "empty"), ("empty: no images there",)),
        (("--images", "empty", "--output", "rows.json"), ("rows.json: the rows of --images are CSV",)),
        (("--features", features, "--output", "scores.csv"), ("has to end in .json",)),
        (("--features", features, "--report", checkpoint[1]), ("File exists",)),
        (("--features", features, "--output", "taken.json"), ("taken.csv: is a folder",)),
        (("--features", "reserved"), ("reserved/fake/level: this name means something else",)),
        (("--features", features, "--bootstrap", 5), ("--bootstrap 0 or at least 100",)),
        (
            (("--device", "cuda"), ("no GPU",))
            if not torch.cuda.is_available()
            else (("--features", "nowhere"), ("nowhere",))
        ),
    ):
        line = refusal(inference, *arguments, *checkpoint)
        assert all(message in line for message in messages), line
    assert "nowhere" in error_line(run_script("inference.py", "--checkpoint", "nowhere.pth", cwd=tmp_path, expect=1))
    assert not (tmp_path / "prediction_results.json").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_costs_no_results(features, trained, tmp_path):
    command = [
        sys.executable,
        "-u",
        str(ROOT / "inference.py"),
        "--features",
        features,
        "--checkpoint",
        trained / "best_model.pth",
        "--bootstrap",
        0,
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, cwd=tmp_path)
    process.stdout.close()
    assert process.wait(120) == 0
    assert {f"prediction_results.{kind}" for kind in ("json", "csv", "md", "tex")} == {
        path.name for path in tmp_path.iterdir()
    }


def test_images_of_the_training_are_not_tested_on(features, trained, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    for path in (tmp_path / "features").glob("*/*/test_features.h5"):
        shutil.copy(path.with_name("val_features.h5"), path)
    counts = [len(FaceDataset([path], grid_size=4)) for path in (tmp_path / "features").glob("*/*/test_features.h5")]
    line = refusal(inference, "--features", tmp_path / "features", "--checkpoint", trained / "best_model.pth")
    assert (
        f"was trained or validated on {sum(counts)} of these {sum(counts)} test images" in line
        and "best_model.pth" in line
    )
    inference.main(
        options(
            "--features",
            tmp_path / "features",
            "--checkpoint",
            trained / "best_model.pth",
            "--split",
            "val",
            "--output",
            tmp_path / "out.json",
            "--bootstrap",
            0,
        )
    )


def test_images_treated_otherwise_than_the_training_images_are_told(features, trained, tmp_path):
    checkpoint = torch.load(trained / "best_model.pth", weights_only=True)
    torch.save(
        checkpoint | {"framing": checkpoint["framing"] | {"treatment": "aligned 0.6, 160x160"}},
        tmp_path / "aligned.pth",
    )
    inference.main(
        options(
            "--features",
            features,
            "--checkpoint",
            tmp_path / "aligned.pth",
            "--output",
            tmp_path / "out.json",
            "--bootstrap",
            0,
        )
    )
    assert json.loads((tmp_path / "out.json").read_text())["Run"]["warnings"] == [
        "the model was trained on images that were aligned 0.6, 160x160; images tested here are resized alone"
    ]


@pytest.mark.slow
def test_features_of_another_size_are_refused(datasets, trained, tmp_path):
    run_script(
        "feature_extraction.py", "--data_root", datasets, "--output_dir", "features", "--img_size", 112, cwd=tmp_path
    )
    line = refusal(inference, "--checkpoint", trained / "best_model.pth", "--features", tmp_path / "features")
    assert "112 px" in line and "--img_size 224" in line


@pytest.mark.slow
def test_gaussian_masks_travel_with_the_checkpoint(features, tmp_path):
    run_script("train.py", "--features", features, *SMALL, "--epochs", 1, "--mask_style", "gaussian", cwd=tmp_path)
    assert load_checkpoint(tmp_path / "output_model/best_model.pth")[1]["mask_style"] == "gaussian"
    assert "OffAxisMouth" in run_script("inference.py", "--features", features, "--bootstrap", 0, cwd=tmp_path).stdout
