"""Shared by all tests: small data sets, made once a session by the project's own scripts, and a runner for the scripts."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():  # before attention.py is imported: its kernels then run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
GENERATORS = ("BlurredRegion", "OffAxisMouth")


def run_script(*command: object, cwd: Path, expect: int | None = 0, processes: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python script.py ...`, or torchrun with `processes` of it, as a user would, and checks the exit code."""
    script, *arguments = map(str, command)
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(ROOT / script), *arguments], cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True, timeout=300
    )
    if expect is not None:
        assert done.returncode == expect, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    """The message of a script that refused. It has to be a sentence for its user, not a traceback."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def refusal(script: ModuleType, *arguments: object) -> str:
    """The message with which a script refuses; here in this process, which saves starting one."""
    with pytest.raises((ValueError, OSError, SystemExit)) as error:  # what every script's guard turns into one line
        script.main(script.get_args_parser().parse_args([str(argument) for argument in arguments]))
    return str(error.value)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    """A data root of synthetic faces in the documented layout: 60 real, 2 generators of 30, one picture without a face."""
    from demo import draw_face

    root = tmp_path_factory.mktemp("data") / "datasets"
    rng = np.random.default_rng(0)
    for folder, generator, count in (("real/Consistent", None, 60), *((f"fake/{name}", name, 30) for name in GENERATORS)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_face(rng, generator)).save(root / folder / f"{i:03}.png")
    Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(root / "fake/OffAxisMouth/noise.png")
    return root


@pytest.fixture(scope="session")
def features(datasets) -> Path:
    """The features of `datasets`."""
    folder = datasets.parent / "features"
    run_script("feature_extraction.py", "--data_root", datasets, "--output_dir", folder, cwd=datasets.parent)
    return folder


SMALL = ("--patch_size", 56, "--embed_dim", 24, "--depth", 2, "--batch_size", 16, "--accum_steps", 2, "--num_workers", 0)


@pytest.fixture(scope="session")
def trained(features) -> Path:
    """The output folder of a short training of a tiny model on `features`."""
    folder = features.parent / "output_model"
    run_script("train.py", "--features", features, "--output_dir", folder, *SMALL, "--epochs", 2, cwd=features.parent)
    return folder
