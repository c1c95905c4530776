"""Tests a trained model against each generator, or scores loose images.

    output_model/best_model.pth + features/  ->  a table, prediction_results.json
    output_model/best_model.pth + images     ->  one line an image

    python inference.py                                      every generator in ./features, its test split
    python inference.py --datasets FFHQ StyleGAN3            these alone
    python inference.py --images photo.jpg folder/           loose images: probability of a fake, verdict, how the face was found

Each generator's fakes stand against as many real images, drawn by seed from the pool of all real data sets. The model is
rebuilt from the checkpoint alone. train.py uses predict_scores and the metrics for its validation.
"""

import argparse
import json
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchvision.transforms import v2
from tqdm import tqdm

from dataset import FaceDataset, FeatureFileError, draw_region_masks, find_feature_files
from model import LAMMViT, LAMMViTConfig
from preprocess import Rejected, list_images, load_rgb, map_ahead

CHECKPOINT_VERSION = 2
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names it and the way out."""


# --------------------------------------------------------------------------------------------------------------- checkpoint


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[LAMMViT, dict]:
    """Rebuilds the model that train.py saved, in eval mode, and returns it with everything else in the file.

    Raises:
        CheckpointError: missing, damaged, foreign, or of another architecture than it says.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run train.py first, or name one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch looks at no checksum
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words are about how to load it all the same
        raise CheckpointError(f"{path}: not a checkpoint of train.py: it holds more than tensors and settings; run train.py again") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not a whole checkpoint ({cause}); take another one or run train.py again") from error
    if not isinstance(checkpoint, dict) or not {"version", "config", "model", "mask_style", "val_threshold"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of train.py: it does not say what model it is; run train.py again")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint version {checkpoint['version']}, this program reads {CHECKPOINT_VERSION}; run train.py again")
    try:
        model = LAMMViT(LAMMViTConfig(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(f"{path}: its weights are of another architecture than its config {checkpoint['config']}: {lines[:400]}") from error
    return model.eval(), checkpoint


def pick_device(name: str) -> torch.device:
    """"auto" -> the GPU where there is one, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no GPU that torch can use; leave the option away to use the CPU")
    return device


# ---------------------------------------------------------------------------------------------- samples -> the model's input


def load_batches(dataset: FaceDataset, batches: Iterable[tuple], num_workers: int, pin_memory: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """What dataset.read makes of each of `batches`, (indices,) or (indices, draws), in order, as tensors, read by
    `num_workers` threads ahead of their use.

    Threads, since what takes time (reading, JPEG, blur, noise) runs outside of Python's lock, and since processes would have
    to send every batch through shared memory: benchmarks/data_speed.py measures torch's DataLoader beside this.
    """

    def read(batch: tuple) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(values) for name, values in dataset.read(*batch).items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors

    return map_ahead(read, batches, num_workers, ahead=num_workers) if num_workers else map(read, batches)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, h, w) uint8 RGB -> float32, zero mean and unit variance over ImageNet. On the device that the images are on."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), IMAGE_MEAN, IMAGE_STD)


# ------------------------------------------------------------------------------------------------------- scores and metrics


def fake_probability(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> (B,) float64.

    In double precision from the logits on: in single precision all confident scores would be 1 and tie.
    """
    device = next(model.parameters()).device
    outputs = model(normalize(images.to(device, non_blocking=True)), region_masks.to(device, non_blocking=True))
    return outputs["logits"].double().softmax(dim=-1)[:, 1].cpu().numpy()


@torch.inference_mode()
def predict_scores(
    model: LAMMViT, dataset: FaceDataset, batch_size: int = 64, num_workers: int = 0, title: str = "", indices: np.ndarray | None = None
) -> np.ndarray:
    """The probability of a fake for the samples of a dataset with these indices, all if None; (N,) float64 in their order.

    In a process group, every process returns all scores. Batches, not samples, are divided among the processes: each batch
    is the same as in a single process, so nobody's score depends on the number of processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = np.arange(len(dataset)) if indices is None else indices
    size = len(indices)
    starts = range(rank * batch_size, size, world * batch_size)
    loader = load_batches(dataset, ((indices[start : start + batch_size],) for start in starts), num_workers, torch.cuda.is_available())
    was_training = model.training
    model.eval()
    bar = tqdm(loader, desc=title, unit="batch", total=len(starts), leave=False, disable=rank > 0 or not title)
    mine = [(start, fake_probability(model, batch["image"], batch["region_masks"])) for start, batch in zip(starts, bar)]
    model.train(was_training)

    everyone = [mine]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    scores = np.empty(size)
    for start, values in (part for parts in everyone for part in parts):
        scores[start : start + len(values)] = values
    return scores


def binary_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Metrics of one real-against-fake comparison. labels (N,) 1 = fake, both classes present; scores (N,) in [0, 1].

    accuracy is in percent at 0.5, and so are real_accuracy and fake_accuracy, its two halves; accuracy_val_threshold is at
    the threshold that was chosen on validation. ap and auc are in 0-1.
    """
    predicted = scores >= 0.5
    return {
        "accuracy": 100 * float(np.mean(predicted == labels)),
        "accuracy_val_threshold": 100 * float(np.mean((scores >= threshold) == labels)),
        "real_accuracy": 100 * float(np.mean(~predicted[labels == 0])),
        "fake_accuracy": 100 * float(np.mean(predicted[labels == 1])),
        "ap": float(average_precision_score(labels, scores)),
        "auc": float(roc_auc_score(labels, scores)),
        "n_real": int(np.sum(labels == 0)),
        "n_fake": int(np.sum(labels == 1)),
    }


def choose_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold of the best balanced accuracy, in the middle between the two scores that it separates.

    For validation scores only: chosen on test, it would make the test's accuracy too good.
    """
    false_positive, true_positive, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    best = thresholds[np.argmax(true_positive - false_positive)]
    below = scores[scores < best]
    if not np.isfinite(best):  # no threshold is better than calling everything real
        return float(np.nextafter(scores.max(), 2))
    return float((best + below.max()) / 2) if len(below) else float(best)


# ------------------------------------------------------------------------------------------------------- against generators


def draw_comparisons(dataset: FaceDataset, names: list[str], seed: int) -> dict[str, np.ndarray]:
    """{generator: indices of as many real as fake samples}. The draw depends on the seed and the images' content alone.

    Args:
        names: the data set of each file of `dataset`, "real/FFHQ".
    """
    files = {name: np.arange(start, end) for name, start, end in zip(names, dataset.starts, dataset.ends)}
    contents = [row.tobytes() for row in dataset.column("sha256")]

    def shuffled(indices: np.ndarray) -> np.ndarray:
        in_order = np.array(sorted(indices, key=lambda i: contents[i]), dtype=int)
        return np.random.default_rng(seed).permutation(in_order)

    real = shuffled(np.flatnonzero(dataset.labels == 0))
    comparisons = {}
    for name, indices in files.items():
        kind, generator = name.split("/")
        if kind == "fake" and not len(indices):
            print(f"{name}: no image in this split, left out")
        elif kind == "fake":
            count = min(len(real), len(indices))
            comparisons[generator] = np.sort(np.concatenate([real[:count], shuffled(indices)[:count]]))
    return comparisons


def evaluate(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The metrics of each generator, and their mean under "Mean"."""
    files = find_feature_files(args.features, args.split, args.datasets)
    dataset = FaceDataset(list(files.values()), model.config.grid_size, checkpoint["mask_style"])
    if dataset.img_size != model.config.img_size:
        raise FeatureFileError(
            f"{args.features}: images of {dataset.img_size} px, but {args.checkpoint} takes {model.config.img_size} px; "
            f"run feature_extraction.py --img_size {model.config.img_size}"
        )
    if set(dataset.labels) != {0, 1}:
        raise FeatureFileError(f"{args.features}: the {args.split} split of {', '.join(files)} holds one class only; both are needed")
    comparisons = draw_comparisons(dataset, list(files), args.seed)
    if "Mean" in comparisons:
        raise FeatureFileError(f"{args.features}/fake/Mean: this name is taken by the mean over generators; give the data set another")

    needed = np.unique(np.concatenate(list(comparisons.values())))
    scores = np.full(len(dataset), np.nan)
    scores[needed] = predict_scores(model, dataset, args.batch_size, args.num_workers, "scoring", needed)
    results = {
        generator: binary_metrics(dataset.labels[chosen], scores[chosen], checkpoint["val_threshold"])
        for generator, chosen in comparisons.items()
    }
    columns = next(iter(results.values()))
    results["Mean"] = {column: float(np.mean([row[column] for row in results.values()])) for column in columns if not column.startswith("n_")}
    return results


def print_table(results: dict[str, dict[str, float]]) -> None:
    width = max(len(name) for name in results) + 2
    print(f"{'generator':<{width + 1}}{'ACC %':>8}{'at val. threshold':>19}{'real ACC %':>12}{'fake ACC %':>12}{'AP':>9}{'AUC':>9}{'images':>9}")
    for name, row in results.items():
        accuracies = f"{row['accuracy']:>9.2f}{row['accuracy_val_threshold']:>19.2f}{row['real_accuracy']:>12.2f}{row['fake_accuracy']:>12.2f}"
        count = f"{row['n_real'] + row['n_fake']:>9}" if "n_real" in row else ""
        print(f"{name:<{width}}{accuracies}{row['ap']:>9.4f}{row['auc']:>9.4f}{count}")


# ------------------------------------------------------------------------------------------------------------- loose images


@torch.inference_mode()
def score_images(model: LAMMViT, checkpoint: dict, args: argparse.Namespace) -> int:
    """Prints a line for each image: probability, verdict, how the face was found, path. Returns how many got no score.

    An image is treated as in the features: found, resized and masked by feature_extraction's own functions. It is meant to
    be a picture of one face; of several, the largest guides the masks.
    """
    from feature_extraction import FaceFinder, find_face, find_predictor  # dlib, where it is needed

    finder = FaceFinder(find_predictor(args.predictor))
    side, grid, threshold = model.config.img_size, model.config.grid_size, checkpoint["val_threshold"]
    paths = [image for path in args.images for image in (list_images(path) if path.is_dir() else [path])]
    unscored = 0
    print(f"{'P(fake)':>8}  {'verdict':<8}{'face':<11}path          (fake from {threshold:.4f} on, the threshold chosen on validation)")
    for path in paths:
        try:
            image = load_rgb(path)
        except Rejected as reason:
            print(f"{'-':>8}  {'-':<8}{'-':<11}{path}: {reason}")
            unscored += 1
            continue
        stored, landmarks, found_by = find_face(image, finder, side)
        if landmarks is None:
            print(f"{'-':>8}  {'-':<8}{'none':<11}{path}: no face found")
            unscored += 1
            continue
        masks = torch.from_numpy(draw_region_masks(landmarks, (side, side), grid, checkpoint["mask_style"]))
        pixels = torch.from_numpy(stored.copy()).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        score = fake_probability(model, pixels[None], masks[None]).item()
        print(f"{score:>8.4f}  {'fake' if score >= threshold else 'real':<8}{found_by:<11}{path}")
    if not paths:
        raise FileNotFoundError(f"{', '.join(map(str, args.images))}: no images there")
    return unscored


# ------------------------------------------------------------------------------------------------------------------ script


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("output_model/best_model.pth"), help="model to test (default: output_model/best_model.pth)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    against = parser.add_argument_group("against generators")
    against.add_argument("--features", type=Path, default=Path("features"), help="folder of feature_extraction.py (default: features)")
    against.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets to use, real ones included (default: all)")
    against.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default: test)")
    against.add_argument("--output", type=Path, default=Path("prediction_results.json"), help="(default: prediction_results.json)")
    against.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    against.add_argument("--num_workers", type=int, default=2, help="threads that read features (default: 2)")
    against.add_argument("--seed", type=int, default=0, help="of the draw of real images (default: 0)")
    loose = parser.add_argument_group("loose images")
    loose.add_argument("--images", nargs="+", type=Path, metavar="PATH", help="images or folders of images to score")
    loose.add_argument("--predictor", type=Path, help="dlib's 68-point predictor, as for feature_extraction.py")
    return parser


def main(args: argparse.Namespace) -> None:
    model, checkpoint = load_checkpoint(args.checkpoint, pick_device(args.device))
    if args.images:
        sys.exit(1 if score_images(model, checkpoint, args) else 0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = evaluate(model, checkpoint, args)
    print_table(results)
    partial = args.output.with_name(f".{args.output.name}.partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:  # FeatureFileError and CheckpointError among them
        sys.exit(f"{error}")
