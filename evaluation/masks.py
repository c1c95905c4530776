"""Do the region masks count? The scores of a model with its own masks, and with four kinds of wrong ones.

A model whose scores stay as they are does not look where the masks say, whatever its accuracy is.
"""

from collections.abc import Iterator

import numpy as np
import torch

from dataset import FaceDataset
from evaluation.scoring import fake_probability
from faces.regions import REGIONS, draw_region_masks
from model import LAMMViT

OWN = "own masks"
WRONG = ("another face's", "none", "eyes and mouth exchanged", "moved by a third of the face")
# The eyes and brows get the masks of the lips and corners of the mouth, and the other way round
PARTNERS = {
    "left_eye": "upper_lip",
    "right_eye": "lower_lip",
    "eyebrows": "mouth_corners",
    "upper_lip": "left_eye",
    "lower_lip": "right_eye",
    "mouth_corners": "eyebrows",
}
EXCHANGED = [list(REGIONS).index(PARTNERS.get(name, name)) for name in REGIONS]
MOVED = 1 / 3  # down, of the height of the landmarks


def wrong_masks(samples: dict[str, np.ndarray], others: np.ndarray, how: str, dataset: FaceDataset) -> np.ndarray:
    """
    Args:
        samples: of dataset.read.
        others: (B, 8, G, G), region masks of other samples.
        how: OWN or one of WRONG.

    Returns:
        (B, 8, G, G) float32.
    """
    masks = samples["region_masks"]
    if how == WRONG[0]:
        return others
    if how == WRONG[1]:
        return np.zeros_like(masks)
    if how == WRONG[2]:
        return np.ascontiguousarray(masks[:, EXCHANGED])
    if how == WRONG[3]:
        size = (dataset.img_size, dataset.img_size)
        moved = samples["landmarks"].copy()
        moved[..., 1] += MOVED * np.ptp(moved[..., 1], axis=1, keepdims=True)
        return np.stack([draw_region_masks(one, size, masks.shape[-1], dataset.mask_style) for one in moved])
    return masks


@torch.inference_mode()
def scores_by_masks(model: LAMMViT, dataset: FaceDataset, batch_size: int = 64) -> dict[str, np.ndarray]:
    """{OWN, and each of WRONG: the probability of a fake (N,)} of all samples of a dataset, without a transform; OWN
    alone of a model that uses no masks."""
    order = np.random.default_rng(0).permutation(len(dataset))

    def batches(how: str) -> Iterator[np.ndarray]:
        for start in range(0, len(dataset), batch_size):
            samples = dataset.read(range(start, min(start + batch_size, len(dataset))))
            others = dataset.read(order[start : start + batch_size])["region_masks"] if how == WRONG[0] else None
            masks = wrong_masks(samples, others, how, dataset)
            yield fake_probability(model, torch.from_numpy(samples["image"]), torch.from_numpy(masks))

    return {how: np.concatenate(list(batches(how))) for how in (OWN, *(WRONG if model.config.uses_masks else ()))}
