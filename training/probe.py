"""A head that starts where linear probing ends: a logistic regression on what the frozen model lets the head read.

Linear probing, then fine-tuning (Kumar et al., ICLR 2022, arXiv 2202.10054): a head that starts at random pulls a good
trunk apart before it is of use itself.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from dataset import FaceDataset, source_numbers
from evaluation.scoring import predict
from model import LAMMViT
from runtime.processes import gather
from training.run import Run

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the regression; the best on validation is taken


def read_features(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> what the head reads (B, head_inputs)."""
    seen = []
    handle = model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    try:
        device = model.head.weight.device
        model(model.normalize(images.to(device)), region_masks.to(device))
    finally:
        handle.remove()
    return seen[0].float().cpu().numpy()


def balance(labels: np.ndarray, sources: np.ndarray | None) -> np.ndarray:
    """Weights (N,) of mean 1 by which both classes count alike, and with sources (N,) the data sets of a class, too."""
    groups = labels.astype(np.int64) if sources is None else sources
    weights = 1 / np.bincount(groups)[groups]
    for label in (0, 1):
        weights[labels == label] *= len(labels) / 2 / weights[labels == label].sum()
    return weights


def fit(
    inside: np.ndarray, labels: np.ndarray, weights: np.ndarray, outside: np.ndarray, outside_labels: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Weight (D,) and bias of the regression on features (N, D), and its AUC on others, by which its C was chosen.

    Args:
        weights: (N,) how much each sample counts.
    """
    scaler = StandardScaler().fit(inside, sample_weight=weights)
    inside, outside = scaler.transform(inside), scaler.transform(outside)
    best_auc, best = -1.0, None
    for strength in STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=2000).fit(inside, labels, weights)
        auc = roc_auc_score(outside_labels, probe.decision_function(outside))
        if auc > best_auc:
            best_auc, best = auc, probe
    weight = best.coef_[0] / scaler.scale_
    return weight, float(best.intercept_[0] - weight @ scaler.mean_), best_auc


def probe_head(run: Run) -> None:
    """Gives the head the weights of a logistic regression on the training images, as they are and --probe_views times
    as training would see them.

    All processes read a part of the images, the first one computes the regression.
    """
    args, files = run.args, run.train_set.files
    cached = args.cache_blocks  # which are of images as they are
    plain = run.train_set if cached else FaceDataset(files, run.train_set.grid_size, args.mask_style)
    sources = np.tile(source_numbers(plain), 1 + args.probe_views) if args.sampling == "sources" else None
    labels = np.tile(plain.labels, 1 + args.probe_views)
    seen = FaceDataset(files, plain.grid_size, args.mask_style, run.train_set.transform, args.seed)

    def read(dataset: FaceDataset, title: str) -> np.ndarray:
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            return predict(run.fed, dataset, read_features, args.batch_size, args.num_workers, title)

    inside = [read(plain, "probe")]
    for view in range(args.probe_views):
        seen.set_epoch(view)
        inside.append(read(seen, f"probe, view {view + 1} of {args.probe_views}"))
    outside = read(run.val_set, "probe, validation")
    found = None
    if run.rank == 0:
        found = fit(np.concatenate(inside), labels, balance(labels, sources), outside, run.val_set.labels)
    weight, bias, auc = gather(found)[0]
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-weight / 2, weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    if run.rank == 0:
        print(f"probe  validation AUC {auc:.4f} before the training", flush=True)
