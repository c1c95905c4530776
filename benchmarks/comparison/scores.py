"""What the models of a comparison said of the test images, and what they say of them with other region masks."""

import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from dataset import FaceDataset
from evaluation.masks import OWN, WRONG, scores_by_masks
from evaluation.typeset import as_markdown
from runtime.checkpoint import load_checkpoint
from runtime.devices import pick_device
from runtime.files import save_arrays
from samples.feature_files import find_feature_files

TABLE = "prediction_results.csv"  # of inference.py, in a model's folder


def read_table(folder: Path) -> dict[str, dict[tuple[int, str], float]]:
    """{generator: {(label, path): score}} of a model, from inference.py's CSV file."""
    table = defaultdict(dict)
    with open(folder / TABLE, newline="", encoding="utf-8", errors="surrogateescape") as file:
        for line in csv.DictReader(file):
            table[line["generator"]][int(line["label"]), line["path"]] = float(line["score"])
    return table


def read_scores(folders: list[Path]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """{generator: labels (N,) and the scores of all seeds (S, N) of the images that stand against each other}, and how
    many real images there are in all. These are in an order in which each generator has the first ones.

    Raises:
        ValueError: the folders are of different images.
    """
    tables = []
    for folder in folders:
        tables.append(read_table(folder))
        if {name: of.keys() for name, of in tables[-1].items()} != {name: of.keys() for name, of in tables[0].items()}:
            raise ValueError(
                f"{folder}: tested on other images than {folders[0]}; remove it and run the same command again"
            )
    times = Counter(image for of in tables[0].values() for image in of)
    scores = {}
    for generator, of in tables[0].items():
        images = sorted(of, key=lambda image: (image[0], -times[image], image[1]))
        scores[generator] = (
            np.array([label for label, _ in images]),
            np.array([[table[generator][image] for image in images] for table in tables]),
        )
    return scores, sum(label == 0 for label, _ in times)


def read_masks(folder: Path, files: list[Path]) -> dict[str, dict[str, float]]:
    """{evaluation.masks' own and wrong masks: {path: score}} of a folder's model, for the samples of these feature
    files.

    It takes about as long as a training: the scores stay in masks.npz, and are read from it where that is not older
    than the model's own scores.
    """
    kept = folder / "masks.npz"
    if not kept.exists() or kept.stat().st_mtime < (folder / TABLE).stat().st_mtime:
        model, checkpoint = load_checkpoint(folder / "best_model.pth", pick_device("auto"))
        dataset = FaceDataset(files, model.config.grid_size, checkpoint["mask_style"])
        paths = [path.encode("utf-8", "surrogateescape") for path in dataset.column("paths")]
        save_arrays(kept, paths=paths, **scores_by_masks(model, dataset))
    with np.load(kept) as scores:
        paths = [path.decode("utf-8", "surrogateescape") for path in scores["paths"].tolist()]
        return {how: dict(zip(paths, scores[how])) for how in scores if how != "paths"}


def compare_masks(scores: dict[str, dict[str, float]], folder: Path) -> dict[str, tuple[float, float]]:
    """{own and wrong masks, as of read_masks: the mean change of a score, the mean AUC over generators}, for the images
    and generators of the folder's CSV file."""
    results = {}
    for how, of_path in scores.items():
        changes, aucs = [], []
        for of in read_table(folder).values():
            labels = [label for label, _ in of]
            values = np.array([of_path[path] for _, path in of])
            changes.append(np.abs(values - [scores[OWN][path] for _, path in of]).mean())
            aucs.append(roc_auc_score(labels, values))
        results[how] = float(np.mean(changes)), float(np.mean(aucs))
    return results


def masks_of_models(features: Path, models: dict[str, list[Path]]) -> tuple[dict[str, dict], str]:
    """compare_masks of each model, the mean over its seeds, and a table of them, with the AUC's deviation over seeds.

    Args:
        features: whose test split the models were tested on.
        models: {name: folders of its seeds}.
    """
    means, rows = {}, []
    files = list(find_feature_files(features, "test").values())
    bar = tqdm(desc="masks", total=sum(map(len, models.values())), unit="model")
    for name, folders in models.items():
        results = []
        for folder in folders:
            results.append(compare_masks(read_masks(folder, files), folder))
            bar.update()
        means[name] = {how: np.mean([one[how] for one in results], axis=0).tolist() for how in results[0]}
        of_wrong = [f"{auc:.4f} ({change:.4f})" for how, (change, auc) in means[name].items() if how != OWN]
        own = [one[OWN][1] for one in results]
        spread = f" ± {np.std(own, ddof=1):.4f}" if len(own) > 1 else ""
        rows.append([name, f"{np.mean(own):.4f}{spread}", *of_wrong, *[""] * (len(WRONG) - len(of_wrong))])
    bar.close()
    return means, as_markdown(["AUC (mean change of a score)", OWN, *WRONG], rows)
