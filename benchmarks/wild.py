"""What becomes of the scores of pictures on their way: smaller, compressed, through a messenger, from a screenshot; and
with more or less margin around the face.

    python benchmarks/wild.py --checkpoint output_model/best_model.pth --real FFHQ/ --fake StyleGAN/

Photographs and fakes are treated alike. Drift is the change of the probability of a fake against that of the picture as
it is, mean over the pictures whose face is found in both. Flagged is who is not called real: a false alarm among
photographs, a find among fakes. Margins are put around the face's square, from the brows to the chin: of the picture
itself, and beyond that of its border drawn on. For a model of aligned images (preprocess.py --align).
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.metrics import roc_auc
from evaluation.operating import thresholds_of
from evaluation.pictures import score_pictures
from evaluation.typeset import as_text
from faces.alignment import find_landmarks
from faces.finder import FaceFinder, finder_files, search_copy
from faces.images import list_images, load_rgb
from runtime.checkpoint import load_checkpoint
from runtime.processes import default_workers
from samples.transforms import gaussian_blur, gaussian_noise, rescale

AS_IT_IS = "as it is"
QUALITIES = (90, 70, 50, 30)  # of one JPEG
MESSENGER = 1280, 70, 2  # longer side in pixels, quality of the JPEG, how often it is sent on
SCREEN = 1080, 2340  # width and height of a phone's, in pixels
MARGINS = (0.0, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 3.0)  # of the face's side, on each of the four sides
LONGEST = 512  # longer side in pixels of what the margin is put around


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def sent_on(image: Image.Image) -> Image.Image:
    """As messengers do it: made smaller where it is large, and compressed, by each who sends it on."""
    longest, quality, times = MESSENGER
    for _ in range(times):
        image = image.copy()
        image.thumbnail((longest, longest))
        image = as_jpeg(image, quality)
    return image


def on_screen(image: Image.Image) -> Image.Image:
    """A screenshot of the picture, shown as large as the screen allows."""
    screen = Image.new("RGB", SCREEN)
    scale = min(SCREEN[0] / image.width, SCREEN[1] / image.height)
    shown = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    screen.paste(shown, [(whole - part) // 2 for whole, part in zip(SCREEN, shown.size)])
    return screen


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


def variants(path: Path, finder: FaceFinder) -> Iterator[tuple[str, Image.Image]]:
    """What was done, and the picture then. Without margins where no face is found."""
    image = load_rgb(path)
    image.info = {}  # what preprocess.py has noted is of the picture as it is
    pixels, rng = np.asarray(image), np.random.default_rng(0)
    yield AS_IT_IS, image
    yield from ((f"JPEG {quality}", as_jpeg(image, quality)) for quality in QUALITIES)
    yield from ((f"{factor:g} of its sides", Image.fromarray(rescale(pixels, factor))) for factor in (0.5, 0.25))
    yield "blur, 1 pixel", Image.fromarray(gaussian_blur(pixels, 1.0))
    yield "noise, 2 %", Image.fromarray(gaussian_noise(pixels, 0.02, rng))
    yield "messenger, twice", sent_on(image)
    yield "screenshot", on_screen(image)
    small = search_copy(image, LONGEST)
    found = find_landmarks(small, finder)
    if found is not None:
        yield from ((f"margin {margin:.0%}", with_margin(small, found[0], margin)) for margin in MARGINS)


def score_variants(args: argparse.Namespace, folder: Path, finder: FaceFinder) -> dict[str, np.ndarray]:
    """{what was done: (N,) the probabilities of the largest face in each picture, NaN where none was found}."""
    model, checkpoint = load_checkpoint(args.checkpoint)
    paths = list_images(folder)
    chosen = np.linspace(0, len(paths) - 1, min(args.images, len(paths))).round().astype(int)
    scores: dict[str, np.ndarray] = {}
    options = argparse.Namespace(
        whole_image=False, workers=default_workers(), batch_size=64, predictor=None, without_cnn=False, frames=1
    )
    with tempfile.TemporaryDirectory() as temporary:
        pictures, made = [], []
        for k, i in enumerate(tqdm(chosen, desc=f"{folder.name}, variants")):
            for name, image in variants(paths[i], finder):
                pictures.append((Path(temporary, f"{len(pictures)}.png"), ""))
                made.append((name, k))
                image.save(pictures[-1][0], compress_level=1)
        first: dict[Path, float] = {}  # the largest face of each
        for row in tqdm(score_pictures(model, checkpoint, pictures, options), total=len(pictures), desc="scores"):
            first.setdefault(row.path, row.probability)
    for (name, k), (path, _) in zip(made, pictures):
        scores.setdefault(name, np.full(len(chosen), np.nan))[k] = first[path]
    return scores


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a model of aligned images")
    parser.add_argument("--real", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--fake", type=Path, required=True, help="folder of fakes")
    parser.add_argument("--images", type=int, default=100, help="of each folder, evenly spread (default: 100)")
    return parser


def main(args: argparse.Namespace) -> None:
    _, checkpoint = load_checkpoint(args.checkpoint)
    if not checkpoint["framing"]["treatment"].startswith("aligned"):
        raise SystemExit(f"{args.checkpoint}: was not trained on aligned images; with others the margin is a cue")
    lowest = min(thresholds_of(checkpoint, None, args.checkpoint).values())
    finder, rows = FaceFinder(finder_files()), []
    both = [score_variants(args, folder, finder) for folder in (args.real, args.fake)]
    for name in both[0]:
        of_real, of_fake = (scores[name][np.isfinite(scores[name])] for scores in both)
        labels = np.repeat([0, 1], [len(of_real), len(of_fake)])
        row = [name, f"{roc_auc(labels, np.r_[of_real, of_fake]):.3f}"]
        for scores in both:
            drift = np.abs(scores[name] - scores[AS_IT_IS])
            found, of_both = np.isfinite(scores[name]), np.isfinite(drift)
            flagged = (scores[name][found] >= lowest).mean()
            row += [f"{found.sum()} of {len(found)}", f"{drift[of_both].mean():.3f}", f"{flagged:.0%}"]
        rows.append(row)
    kinds = [f"{kind}: {what}" for kind in ("real", "fake") for what in ("found", "drift", "flagged")]
    print(as_text(["", "AUC", *kinds], rows, left=1))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
