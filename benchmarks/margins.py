"""How far a score drifts with the margin around a face, beside what a JPEG of quality 90 does to it.

    python benchmarks/margins.py --checkpoint output_model/best_model.pth --real FFHQ/ --fake StyleGAN/

Each picture is cut to its face, from the brows to the chin, and given 0 % to 300 % of the face's side as margin: from
the picture itself, and beyond that by drawing its border on. Drift is the change of the probability against that of the
picture as it is: mean, and 95th percentile. For a model of aligned images (preprocess.py --align).
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.pictures import score_pictures
from evaluation.typeset import as_text
from faces.alignment import find_landmarks
from faces.finder import FaceFinder, finder_files, search_copy
from faces.images import list_images, load_rgb
from runtime.checkpoint import load_checkpoint
from runtime.processes import default_workers

MARGINS = (0.0, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 3.0)  # of the face's side, on each of the four sides
LONGEST = 512  # longer side in pixels of what the margin is put around
AS_IT_IS, JPEG = "as it is", "JPEG 90"


def with_margin(image: Image.Image, landmarks: np.ndarray, margin: float) -> Image.Image:
    """The face's square, and so much around it: of the image, and where that ends, of its border drawn on. (Reflected,
    it would hold the face again.)
    """
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    side, centre = (high - low).max(), (low + high) / 2
    left, top = np.rint(centre - side * (0.5 + margin)).astype(int)
    size = round(side * (1 + 2 * margin))
    pixels = np.asarray(image)
    before = [max(0, -top), max(0, -left)]
    after = [max(0, top + size - image.height), max(0, left + size - image.width)]
    padded = np.pad(pixels, [*zip(before, after), (0, 0)], mode="edge")
    top, left = top + before[0], left + before[1]
    return Image.fromarray(padded[top : top + size, left : left + size])


def variants(path: Path, finder: FaceFinder) -> dict[str, Image.Image]:
    """{what was done: picture}; empty where no face is found."""
    image = search_copy(load_rgb(path), LONGEST)
    found = find_landmarks(image, finder)
    if found is None:
        return {}
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    image.info = {}
    made = {AS_IT_IS: image, JPEG: Image.open(stream).convert("RGB")}
    return made | {f"{margin:.0%}": with_margin(image, found[0], margin) for margin in MARGINS}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a model of aligned images")
    parser.add_argument("--real", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--fake", type=Path, required=True, help="folder of fakes")
    parser.add_argument("--images", type=int, default=100, help="of each folder, evenly spread (default: 100)")
    return parser


def main(args: argparse.Namespace) -> None:
    model, checkpoint = load_checkpoint(args.checkpoint)
    if not checkpoint["framing"]["treatment"].startswith("aligned"):
        raise SystemExit(f"{args.checkpoint}: was not trained on aligned images; with others the margin is a cue")
    finder, rows = FaceFinder(finder_files()), []
    for kind, folder in (("real", args.real), ("fake", args.fake)):
        paths = list_images(folder)
        chosen = np.linspace(0, len(paths) - 1, min(args.images, len(paths))).round().astype(int)
        scores: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as temporary:
            names, pictures = [], []
            for i in tqdm(chosen, desc=f"{kind}, margins"):
                for name, image in variants(paths[i], finder).items():
                    pictures.append((Path(temporary, f"{len(pictures)}.png"), ""))
                    names.append(name)
                    image.save(pictures[-1][0], compress_level=1)
            options = argparse.Namespace(
                whole_image=False, workers=default_workers(), batch_size=64, predictor=None, without_cnn=False, frames=1
            )
            first: dict[Path, float] = {}  # the largest face of each
            for row in tqdm(score_pictures(model, checkpoint, pictures, options), total=len(pictures), desc="scores"):
                first.setdefault(row.path, row.probability)
        for name, (path, _) in zip(names, pictures):
            scores.setdefault(name, []).append(first[path])
        reference = np.array(scores[AS_IT_IS])
        for name, of_name in scores.items():
            drift = np.abs(np.array(of_name) - reference)
            found = np.isfinite(drift)
            cells = (f"{drift[found].mean():.4f}", f"{np.quantile(drift[found], 0.95):.4f}")
            rows.append([kind, name, *cells, f"{found.sum()} of {len(drift)}"])
    print(as_text(["", "margin", "drift, mean", "95 %", "faces found"], rows, left=2))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
