"""What may tell the class beside the face: formats, sizes and treatment of the files that the images came from."""

import math
from collections import Counter

import numpy as np

from evaluation.metrics import roc_curve
from evaluation.protocol import TestSet
from faces.treatment import describe_treatment


def count_originals(test_set: TestSet) -> dict[str, Counter]:
    """{data set: how many of its compared images were of which format and size before preprocess.py}, the most frequent
    first.
    """
    originals, needed = test_set.dataset.column("originals"), test_set.needed
    ends = dict(zip(test_set.files, zip(test_set.dataset.starts, test_set.dataset.ends)))
    counts = {
        name: Counter(originals[needed[(needed >= start) & (needed < end)]].tolist())
        for name, (start, end) in ends.items()
    }
    return {name: Counter(dict(count.most_common())) for name, count in counts.items() if count}


def warn_of_treatment(test_set: TestSet, trained_on: str) -> list[str]:
    """A sentence where preprocess.py has treated some of the images otherwise than those of the training."""
    others = set(test_set.dataset.column("treatments")[test_set.needed]) - {trained_on}
    return (
        [
            f"the model was trained on images that were {describe_treatment(trained_on)}; images tested here are"
            f" {', '.join(map(describe_treatment, sorted(others)))}"
        ]
        if others
        else []
    )


def warn_of_traces(test_set: TestSet, protocol: str) -> list[str]:
    """A sentence where the formats or sizes of the original files differ between a generator and the real images. What
    no --protocol makes alike, sizes, is told under all of them."""
    originals, warnings = test_set.dataset.column("originals"), []
    for generator, chosen in test_set.comparisons.items():
        labels, kinds = test_set.dataset.labels[chosen], [original.split() for original in originals[chosen]]
        pixels = [math.prod(map(int, size.split("x"))) for _, size in kinds]
        formats = [
            np.mean([[kind == name for (kind, _), of in zip(kinds, labels) if of == label] for label in (0, 1)], axis=1)
            for name in {kind for kind, _ in kinds}
        ]
        apart = 0.5 * float(np.sum([abs(real - fake) for real, fake in formats]))  # total variation
        false_positive, true_positive, _ = roc_curve(labels, pixels)
        bound = max(0.1, 1.36 * math.sqrt(4 / len(labels)))  # no chance difference, to 95 % (Kolmogorov and Smirnov)
        traces = [
            what
            for what, distance in (("format", apart), ("size", np.abs(true_positive - false_positive).max()))
            if distance > bound
        ]
        if "format" in traces and protocol != "native":
            traces.remove("format")
        if traces:
            shown = [
                ", ".join(
                    f"{name} {100 * n / len(labels) * 2:.0f} %"
                    for name, n in Counter(originals[chosen[labels == label]]).most_common(3)
                )
                for label in (0, 1)
            ]
            warnings.append(
                f"{generator}: the {' and '.join(traces)} of its files tell{'' if len(traces) > 1 else 's'} it from the"
                f" real ones ({shown[1]}; real:"
                f" {shown[0]}){'; --protocol all_jpeg96 makes formats more alike' if 'format' in traces else ''}"
            )
    return warnings
