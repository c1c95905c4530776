"""What the models of a comparison said of the test images, and what they say of them with another face's masks."""

import argparse
import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.comparison.images import features_of
from dataset import FaceDataset
from evaluation.scoring import fake_probability
from runtime.checkpoint import load_checkpoint
from samples.feature_files import find_feature_files


def read_table(folder: Path) -> dict[str, dict[tuple[int, str], float]]:
    """{generator: {(label, path): score}} of a model, from inference.py's CSV file."""
    table = defaultdict(dict)
    with open(folder / "prediction_results.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
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


def swap_masks(args: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """What a model of equalised images makes of faces with the region masks of other faces: the mean change of a score,
    and the mean AUC over generators with the own masks and with others'."""
    model, checkpoint = load_checkpoint(folder / "best_model.pth")
    data = FaceDataset(
        list(find_feature_files(features_of(args, "equalised"), "test").values()),
        model.config.grid_size,
        checkpoint["mask_style"],
    )
    samples = data.read(np.arange(len(data)))
    images, masks = (
        torch.from_numpy(samples["image"]),
        torch.from_numpy(samples["region_masks"][np.random.default_rng(0).permutation(len(data))]),
    )
    with torch.inference_mode():
        swapped = np.concatenate([fake_probability(model, *part) for part in zip(images.split(64), masks.split(64))])
    scores = dict(zip(data.column("paths"), swapped))
    # (3, N) for each generator: label, score, score with another's masks
    tables = [
        np.array([(label, own, scores[path]) for (label, path), own in of.items()]).T
        for of in read_table(folder).values()
    ]
    changes = [np.abs(own - others).mean() for _, own, others in tables]
    aucs = [[roc_auc_score(labels, values) for values in (own, others)] for labels, own, others in tables]
    return float(np.mean(changes)), *np.mean(aucs, axis=0).tolist()
