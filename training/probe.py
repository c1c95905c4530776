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
from training.run import Run

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the regression; the best on validation is taken


def read_features(model: LAMMViT, images: torch.Tensor, region_masks: torch.Tensor) -> np.ndarray:
    """images (B, 3, h, w) uint8 RGB, region_masks (B, 8, G, G) -> what the head reads (B, head_inputs)."""
    seen = []
    handle = model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    try:
        model(model.normalize(images.to(model.cls_token.device)), region_masks.to(model.cls_token.device))
    finally:
        handle.remove()
    return seen[0].float().cpu().numpy()


def probe_head(run: Run) -> None:
    """Gives the head the weights of a logistic regression on the training images as they are, without augmentation.

    All processes read a part of the images, and compute the same regression.
    """
    plain = FaceDataset(run.train_set.files, run.train_set.grid_size, run.args.mask_style)
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        inside, outside = (
            predict(run.model, dataset, read_features, run.args.batch_size, run.args.num_workers, title)
            for dataset, title in ((plain, "probe"), (run.val_set, "probe, validation"))
        )
    scaler = StandardScaler().fit(inside)
    probes = [
        LogisticRegression(C=strength, max_iter=2000, class_weight="balanced").fit(
            scaler.transform(inside), plain.labels
        )
        for strength in STRENGTHS
    ]
    aucs = [roc_auc_score(run.val_set.labels, probe.decision_function(scaler.transform(outside))) for probe in probes]
    best = probes[int(np.argmax(aucs))]
    weight = best.coef_[0] / scaler.scale_
    bias = best.intercept_[0] - weight @ scaler.mean_
    with torch.no_grad():  # of the two logits, half of the decision each
        run.model.head.weight.copy_(torch.from_numpy(np.stack([-weight / 2, weight / 2])))
        run.model.head.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    if run.rank == 0:
        print(f"probe  validation AUC {max(aucs):.4f} before the training, C {best.C:g}", flush=True)
