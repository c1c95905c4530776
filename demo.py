"""Draw a small labelled data set of procedural faces: a first run with no download.

Every picture is computed, none is a photograph. A *real* face is consistent: two eyes of one colour, one
light, a mouth on the face's axis, one sharpness. Each *generator* breaks exactly one of these relations
between regions and draws the rest alike, which is the paper's idea of a fake in its simplest form: broken
so plainly that a small model can learn it in minutes. The set proves that the pipeline runs and learns; it
says nothing about real fakes.

Input:   nothing
Output:  OUTPUT_DIR/real/Consistent/00000.png ...  and  OUTPUT_DIR/fake/<Generator>/00000.png ...
         (8-bit RGB PNG, the same format for every class)

    python demo.py                                             # 1200 real + 4 x 300 fake, 224 px
    python demo.py --real 2000 --fake 500 --workers 8          # more, in parallel; the same bytes
    python demo.py --output_dir /tmp/faces --size 448          # larger pictures of the same faces

Pictures that are there already are kept, so an interrupted run goes on where it stopped.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from drawing.face import GENERATORS
from drawing.render import draw_file


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo_run/datasets"), help="data root to write (default: %(default)s)"
    )
    parser.add_argument("--real", type=int, default=1200, help="number of consistent faces (default: %(default)s)")
    parser.add_argument("--fake", type=int, default=300, help="number of faces per generator (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> None:
    classes = [("real/Consistent", None, args.real)]
    classes += [(f"fake/{name}", name, args.fake) for name in GENERATORS]
    jobs = []
    for index, (folder, generator, number) in enumerate(classes):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            path = args.output_dir / folder / f"{i:05d}.png"
            if not path.exists():
                jobs.append((path, generator, [args.seed, index, i]))
    # One thread a process: the processes already fill the machine.
    with ProcessPoolExecutor(args.workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        done = pool.map(partial(draw_file, size=args.size), jobs, chunksize=8)
        for _ in tqdm(done, total=len(jobs), desc="drawing", unit="face"):
            pass
    print(f"{args.output_dir}: {args.real} real, {len(GENERATORS)} x {args.fake} fake ({len(jobs)} drawn now)")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
