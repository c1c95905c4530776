"""What becomes of the scores of pictures on their way: smaller, compressed, through a messenger, from a screenshot; and
with more or less margin around the face.

    python benchmarks/wild.py --checkpoint output_model/best_model.pth --real FFHQ/ --fake StyleGAN/

Photographs and fakes are treated alike. Drift is the change of the probability of a fake against that of the file as it
is. Flagged is who is not called real: a false alarm among photographs, a find among fakes. Both, and the AUC, are of
the pictures whose face is found before and after, the largest one in each. For a model of recompressed images a quality
is drawn for each picture, from its bytes. "In memory" has the same pixels and another quality: drift begins there.
Margins are put around the face's square, from the brows to the chin: of the picture itself, and beyond that of its
border drawn on. For a model of aligned images (preprocess.py --align).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.detector import Detector
from evaluation.metrics import roc_auc
from evaluation.operating import REAL
from evaluation.typeset import as_text
from faces.alignment import find_landmarks
from faces.finder import FaceFinder, finder_files, search_copy
from faces.images import list_images, load_rgb
from faces.rejection import Rejected
from samples.transforms import gaussian_blur, gaussian_noise, jpeg_compression, rescale

AS_IT_IS = "as it is"
QUALITIES = (90, 70, 50, 30)  # of one JPEG
MESSENGER = 1280, 70, 2  # longer side in pixels, quality of the JPEG, how often it is sent on
SCREEN = 1080, 2340  # width and height of a phone's, in pixels
MARGINS = (0.0, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 3.0)  # of the face's side, on each of the four sides
LONGEST = 512  # longer side in pixels of what the margin is put around


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.fromarray(jpeg_compression(np.asarray(image), quality))


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


def variants(path: Path, finder: FaceFinder) -> dict[str, Path | Image.Image]:
    """{what was done: the picture then}. Without margins where no face is found.

    Raises:
        Rejected, OSError: it cannot be read.
    """
    image = load_rgb(path)
    image.info = {}  # what preprocess.py notes of a file is not true of what comes below
    pixels, rng = np.asarray(image), np.random.default_rng(list(path.name.encode()))
    made = {AS_IT_IS: path, "in memory": image}
    made |= {f"JPEG {quality}": as_jpeg(image, quality) for quality in QUALITIES}
    made |= {f"{factor:.0%} of its sides": Image.fromarray(rescale(pixels, factor)) for factor in (0.5, 0.25)}
    made["blur, 1 pixel"] = Image.fromarray(gaussian_blur(pixels, 1.0))
    made["noise, 2 %"] = Image.fromarray(gaussian_noise(pixels, 0.02, rng))
    made["messenger, twice"] = sent_on(image)
    made["screenshot"] = on_screen(image)
    small = search_copy(image, LONGEST)
    found = find_landmarks(small, finder)
    if found is None:
        return made
    return made | {f"margin {margin:.0%}": with_margin(small, found[0], margin) for margin in MARGINS}


def score_variants(detector: Detector, paths: list[Path], finder: FaceFinder) -> list[dict[str, tuple[float, bool]]]:
    """Of each picture that can be read {what was done: the probability of a fake, and whether it is flagged}; what has
    no face is missing.
    """
    scores = []
    for path in tqdm(paths, desc=str(paths[0].parent), unit="picture"):
        try:
            made = variants(path, finder)
        except (Rejected, OSError) as reason:
            tqdm.write(f"{path}: left out, {reason}", file=sys.stderr)  # above the bar
            continue
        largest = {name: judged.faces[0] for name, judged in zip(made, detector(made.values())) if judged.faces}
        scores.append({name: (row.probability, row.verdict != REAL) for name, row in largest.items()})
    return scores


def columns(scores: list[dict[str, tuple[float, bool]]], name: str) -> tuple[list[float], list[str]]:
    """The probabilities of the pictures whose face is found before and after; faces found, drift and flagged."""
    both = [(*of_one[name], of_one[AS_IT_IS][0]) for of_one in scores if name in of_one and AS_IT_IS in of_one]
    found = f"{sum(name in of_one for of_one in scores)} of {len(scores)}"
    if not both:
        return [], [found, "–", "–"]
    after, flagged, before = map(np.array, zip(*both))
    return after.tolist(), [found, f"{np.abs(after - before).mean():.3f}", f"{flagged.mean():.0%}"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a model of aligned images")
    parser.add_argument("--real", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--fake", type=Path, required=True, help="folder of fakes")
    parser.add_argument("--images", type=int, default=100, help="of each folder, evenly spread (default: 100)")
    return parser


def main(args: argparse.Namespace) -> None:
    detector, finder = Detector(args.checkpoint), FaceFinder(finder_files())
    if not detector.framing.treatment.startswith("aligned"):
        raise ValueError(f"{args.checkpoint}: was not trained on aligned images; with others the margin is a cue")
    both = []
    for folder in (args.real, args.fake):
        paths = list_images(folder)
        if not paths or args.images < 1:
            raise ValueError(f"{folder}: no images are there, or --images is below 1")
        chosen = np.linspace(0, len(paths) - 1, min(args.images, len(paths))).round().astype(int)
        both.append(score_variants(detector, [paths[i] for i in chosen], finder))
    rows = []
    for name in dict.fromkeys(name for scores in both for of_one in scores for name in of_one):
        (real, of_real), (fake, of_fake) = (columns(scores, name) for scores in both)
        labels = np.repeat([0, 1], [len(real), len(fake)])
        auc = f"{roc_auc(labels, np.array(real + fake)):.3f}" if real and fake else "–"
        rows.append([name, auc, *of_real, *of_fake])
    kinds = [f"{kind}: {what}" for kind in ("real", "fake") for what in ("found", "drift", "flagged")]
    print(as_text(["", "AUC", *kinds], rows, left=1))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
