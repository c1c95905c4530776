"""Errors in the words of a program: what a script has as an option, a function has as an argument.

--fpr 0.02: m.pth has thresholds for 0.01 and 0.05   ->  fpr 0.02: m.pth has thresholds for 0.01 and 0.05
"""

import contextlib
import re
from collections.abc import Iterator

OPTIONS = re.compile(r"--(checkpoint|device|fpr|predictor|without_cnn)\b")  # of inference.py; Detector has these, too


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors that name options of inference.py name the arguments. Commands in them stay: `export.py --hub`."""
    try:
        yield
    except (ValueError, OSError) as error:
        if OPTIONS.search(str(error)):
            error.args = (OPTIONS.sub(r"\1", str(error)),)
        raise
