"""inference.py: the checkpoint, the metrics, the draw of real images, scores that depend on nothing but the image."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import GENERATORS, SMALL, error_line, refusal, run_script
from PIL import Image
from sklearn.metrics import roc_auc_score

import inference
from dataset import FaceDataset, find_feature_files
from inference import CheckpointError, binary_metrics, choose_threshold, draw_comparisons, load_batches, load_checkpoint, normalize, predict_scores

# ----------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.4, 0.8, 0.35, 0.6, 0.9])
    metrics = binary_metrics(labels, scores, threshold=0.3)
    assert metrics["accuracy"] == pytest.approx(100 * 4 / 6)
    assert metrics["real_accuracy"] == pytest.approx(100 * 2 / 3) and metrics["fake_accuracy"] == pytest.approx(100 * 2 / 3)
    assert metrics["accuracy_val_threshold"] == pytest.approx(100 * 4 / 6)  # 0.1 is real, all others are called fake
    assert metrics["auc"] == pytest.approx(6 / 9)  # pairs in the right order
    assert metrics["ap"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert metrics["n_real"] == metrics["n_fake"] == 3


def test_threshold_separates_in_the_middle():
    labels = np.array([0, 0, 0, 1, 1])
    assert choose_threshold(labels, np.array([0.01, 0.02, 0.04, 0.10, 0.30])) == pytest.approx(0.07)
    assert choose_threshold(labels, np.array([0.01, 0.02, 0.50, 0.10, 0.30])) == pytest.approx(0.06)  # 4 of 5, 0.02 | 0.10
    hopeless = choose_threshold(np.array([1, 0]), np.array([0.2, 0.7]))
    assert hopeless > 0.7  # nothing beats calling all of them real


# -------------------------------------------------------------------------------------------------------- the comparisons


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
        return {name: {hashes[i].tobytes() for i in chosen} for name, chosen in draw_comparisons(data, order, 0).items()}

    assert len(hashes) == len(dataset) and drawn(dataset, names) == drawn(reordered, names[::-1])


# ------------------------------------------------------------------------------------------------------------------ scores


def test_normalize_is_imagenets():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    low, high = normalize(images)
    torch.testing.assert_close(low[:, 0, 0], -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close((high - low)[:, 0, 0], 1 / torch.tensor([0.229, 0.224, 0.225]))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_whoever_reads_them(test_set, num_workers):
    dataset, _ = test_set
    batches = [np.random.default_rng(i).permutation(len(dataset))[: i % 5 + 1] for i in range(20)]
    for indices, batch in zip(batches, load_batches(dataset, ((indices,) for indices in batches), num_workers), strict=True):
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


# -------------------------------------------------------------------------------------------------------------- checkpoint


def spoiled(checkpoint: dict, how: str) -> object:
    if how == "other architecture":
        return checkpoint | {"config": checkpoint["config"] | {"depth": 5}}
    if how == "unknown option":
        return checkpoint | {"config": checkpoint["config"] | {"registers": 4}}
    if how == "bare weights":
        return checkpoint["model"]
    if how == "other version":
        return checkpoint | {"version": 99}
    return [1, 2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other architecture", "another architecture than its config"),
        ("unknown option", "another architecture than its config"),
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
    for name, message in (("half", "not a whole checkpoint"), ("text", "not a whole"), ("empty", "not a whole"), ("missing", "no such checkpoint; run train.py")):
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


# -------------------------------------------------------------------------------------------------------------- whole runs


def test_table_and_json(features, trained, tmp_path):
    done = run_script("inference.py", "--features", features, "--checkpoint", trained / "best_model.pth", cwd=tmp_path)
    results = json.loads((tmp_path / "prediction_results.json").read_text())
    assert set(results) == {*GENERATORS, "Mean"}
    for name, row in results.items():
        assert name in done.stdout and 0 <= row["accuracy"] <= 100 and 0 <= row["ap"] <= 1
    for column in ("accuracy", "ap", "auc", "real_accuracy"):
        assert results["Mean"][column] == pytest.approx(np.mean([results[name][column] for name in GENERATORS]))

    # The rows are what the model says, computed here step by step.
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    files = find_feature_files(features, "test")
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    scores = predict_scores(model, dataset)
    for name, chosen in draw_comparisons(dataset, list(files), seed=0).items():
        assert results[name]["auc"] == pytest.approx(roc_auc_score(dataset.labels[chosen], scores[chosen]))
        at_threshold = (scores[chosen] >= checkpoint["val_threshold"]) == dataset.labels[chosen]
        assert results[name]["accuracy_val_threshold"] == pytest.approx(100 * np.mean(at_threshold))
        assert results[name]["accuracy"] == pytest.approx(100 * np.mean((scores[chosen] >= 0.5) == dataset.labels[chosen]))


def test_refusals(features, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(features, tmp_path / "cut")
    victim = tmp_path / "cut/fake/OffAxisMouth/test_features.h5"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    checkpoint = ("--checkpoint", trained / "best_model.pth")
    for arguments, messages in (
        (("--features", "cut"), (str(victim.relative_to(tmp_path)), "cut off")),
        (("--features", "nowhere"), ("nowhere", "run feature_extraction.py")),
        (("--features", features, "--datasets", "Consistent", "NoSuchGenerator"), ("no data set NoSuchGenerator", "fake/OffAxisMouth")),
        (("--features", features, "--datasets", "OffAxisMouth"), ("holds one class only",)),
        (("--images", "empty"), ("empty: no images there",)),
        (("--device", "cuda"), ("no GPU",)) if not torch.cuda.is_available() else (("--features", "nowhere"), ("nowhere",)),
    ):
        line = refusal(inference, *arguments, *checkpoint)
        assert all(message in line for message in messages), line
    assert "nowhere" in error_line(run_script("inference.py", "--checkpoint", "nowhere.pth", cwd=tmp_path, expect=1))
    assert not (tmp_path / "prediction_results.json").exists()


def test_features_of_another_size_are_refused(datasets, trained, tmp_path):
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", "features", "--img_size", 112, cwd=tmp_path)
    line = refusal(inference, "--checkpoint", trained / "best_model.pth", "--features", tmp_path / "features")
    assert "112 px" in line and "--img_size 224" in line


def test_loose_images_score_as_in_the_features(datasets, features, trained, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    Image.open(datasets / "fake/OffAxisMouth/noise.png").save(tmp_path / "noise.png")
    done = run_script(
        "inference.py", "--checkpoint", trained / "best_model.pth", "--images", datasets / "real", tmp_path / "text.jpg", tmp_path / "noise.png", cwd=tmp_path, expect=1
    )
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 62 and "text.jpg: cannot be read" in lines[-2] and "noise.png: no face found" in lines[-1]
    printed = {line.split()[-1]: float(line.split()[0]) for line in lines[:60]}
    model, checkpoint = load_checkpoint(trained / "best_model.pth")
    dataset = FaceDataset([find_feature_files(features, "test", ["Consistent"])["real/Consistent"]], model.config.grid_size, checkpoint["mask_style"])
    for path, score in zip(dataset.column("paths"), predict_scores(model, dataset)):
        assert printed[str(datasets / path)] == pytest.approx(score, abs=1e-4)


def test_gaussian_masks_travel_with_the_checkpoint(features, tmp_path):
    run_script("train.py", "--features", features, *SMALL, "--epochs", 1, "--mask_style", "gaussian", cwd=tmp_path)
    assert load_checkpoint(tmp_path / "output_model/best_model.pth")[1]["mask_style"] == "gaussian"
    run_script("inference.py", "--features", features, cwd=tmp_path)
