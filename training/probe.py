"""A head that starts where linear probing ends: a logistic regression on what the frozen model lets the head read.

Linear probing, then fine-tuning (Kumar et al., ICLR 2022, arXiv 2202.10054): a head that starts at random pulls a good
trunk apart before it is of use itself.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from dataset import FaceDataset
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


def fit(
    inside: np.ndarray, labels: np.ndarray, outside: np.ndarray, outside_labels: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Weight (D,) and bias of the regression on features (N, D), and its AUC on others, by which its C was chosen."""
    scaler = StandardScaler().fit(inside)
    inside, outside = scaler.transform(inside), scaler.transform(outside)
    best_auc, best = -1.0, None
    for strength in STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced").fit(inside, labels)
        auc = roc_auc_score(outside_labels, probe.decision_function(outside))
        if auc > best_auc:
            best_auc, best = auc, probe
    weight = best.coef_[0] / scaler.scale_
    return weight, float(best.intercept_[0] - weight @ scaler.mean_), best_auc


def probe_head(run: Run) -> None:
    """Gives the head the weights of a logistic regression on the training images as they are, without augmentation.

    All processes read a part of the images, the first one computes the regression.
    """
    cached = run.args.cache_blocks  # which are of images as they are
    plain = run.train_set if cached else FaceDataset(run.train_set.files, run.train_set.grid_size, run.args.mask_style)
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        inside, outside = (
            predict(run.fed, dataset, read_features, run.args.batch_size, run.args.num_workers, title)
            for dataset, title in ((plain, "probe"), (run.val_set, "probe, validation"))
        )
    weight, bias, auc = gather(fit(inside, plain.labels, outside, run.val_set.labels) if run.rank == 0 else None)[0]
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-weight / 2, weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    if run.rank == 0:
        print(f"probe  validation AUC {auc:.4f} before the training", flush=True)
