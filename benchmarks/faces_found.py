"""How many faces `preprocess.py --align` finds and can use, data set by data set, and what the crops' borders tell.

    python benchmarks/faces_found.py --data_root faces more_faces      some minutes for 10,000 images on two cores
    python benchmarks/faces_found.py --data_root faces --without_cnn   what dlib's frontal detector finds alone

Beside the table stand two probes, logistic regressions that tell real from fake by what is not worth learning: the
share of a crop that lies beyond its picture and was filled, and the pixels along the border of the crop. A probe of
0.45 to 0.60 has found nothing. Its folds are made of images, so that it may also learn data sets: real ones from fake
ones of other collections, as a detector could.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.typeset import as_text
from faces.alignment import align_face
from faces.finder import FOUND_BY, finder_files
from faces.images import FILLED, FOUND, load_rgb
from faces.rejection import Rejected
from faces.treatment import ALIGNED_CROP
from faces.workers import face_workers, this_finder
from runtime.processes import default_workers
from samples.sources import Source, find_sources

SIDE = 224
BORDER = 8  # pixels
NOT_FOUND = "mean"
WAYS = tuple(way for way in FOUND_BY if way not in ("original", NOT_FOUND))


class Seen(NamedTuple):
    found_by: str  # NOT_FOUND where there is no face, "" where the file is no image
    filled: float = 0.0
    border: np.ndarray | None = None  # (4 x SIDE / BORDER x 3) mean colours along the four borders of the crop
    seconds: float = 0.0  # for finding and cutting


def look(path: Path, crop: float) -> Seen:
    """In a process of faces/workers.py."""
    try:
        image = load_rgb(path)
    except Rejected:
        return Seen("")
    start = time.perf_counter()
    aligned = align_face(image, this_finder(), SIDE, crop)
    seconds = time.perf_counter() - start
    if aligned is None:
        return Seen(NOT_FOUND, seconds=seconds)
    small = cv2.resize(np.asarray(aligned), (SIDE // BORDER,) * 2, interpolation=cv2.INTER_AREA)
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]).ravel()
    return Seen(aligned.info[FOUND], aligned.info[FILLED], border, seconds)


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """AUC of a logistic regression on (N, D), each score from a model that has not seen the image."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1, class_weight="balanced"))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
    return roc_auc_score(labels, scores)


def row_of(name: str, seen: list[Seen]) -> list[str]:
    images = [one for one in seen if one.found_by]
    found = [one for one in images if one.found_by != NOT_FOUND]
    ways, total = Counter(one.found_by for one in found), max(len(images), 1)
    over = [one.filled for one in found if one.filled]
    return [
        name,
        str(len(images)),
        *(str(ways[way]) for way in WAYS),
        f"{len(found) / total:.1%}",
        f"{len(over) / total:.1%}",
        f"{np.mean(over) if over else 0:.1%}",
        f"{1000 * np.mean([one.seconds for one in images]):.0f}",
    ]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, nargs="+", required=True, help="folders with real/ and fake/")
    parser.add_argument(
        "--align",
        type=float,
        default=ALIGNED_CROP,
        metavar="CROP",
        help=f"as of preprocess.py (default: {ALIGNED_CROP})",
    )
    parser.add_argument("--images", type=int, help="of each data set, evenly spread (default: all)")
    parser.add_argument("--without_cnn", action="store_true", help="as of preprocess.py")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> None:
    by_data_set: dict[str, list[tuple[Path, Source]]] = {}
    for root in args.data_root:
        for source in find_sources(root)[0]:
            by_data_set.setdefault(source.data_set, []).append((root / source.path, source))
    if args.images:
        for name, members in by_data_set.items():
            chosen = np.linspace(0, len(members) - 1, min(args.images, len(members))).round().astype(int)
            by_data_set[name] = [members[i] for i in chosen]
    names = [name for name, members in by_data_set.items() for _ in members]
    paths = [path for members in by_data_set.values() for path, _ in members]
    with face_workers(finder_files(cnn=not args.without_cnn), args.workers) as pool:
        results = pool.map(look, paths, [args.align] * len(paths), chunksize=4)
        seen = list(tqdm(results, total=len(paths), unit="image"))

    rows = [row_of(name, [one for one, of in zip(seen, names) if of == name]) for name in dict.fromkeys(names)]
    for kind in ("real", "fake"):
        rows.append(row_of(f"all {kind}", [one for one, of in zip(seen, names) if of.startswith(kind)]))
    heads = ["data set", "images", *WAYS, "found and used", "reach over", "of these filled", "ms an image"]
    print("\n" + as_text(heads, rows))

    used = [i for i, one in enumerate(seen) if one.border is not None]
    labels = np.array([names[i].startswith("fake") for i in used])
    if len(set(labels)) == 2:
        filled = np.array([(seen[i].filled, seen[i].filled > 0) for i in used], float)
        border = np.stack([seen[i].border for i in used]).astype(float)
        aucs = probe(filled, labels), probe(border, labels)
        print("\nprobes, AUC: filled share {:.3f}, pixels along the border {:.3f}".format(*aucs))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
