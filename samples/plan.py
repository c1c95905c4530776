"""What an extraction has to do: which images, with which settings, and what of it is there already."""

import argparse
import hashlib
import json
import shutil

from faces.finder import CNN_SIDE, PADDING, SEARCH_SIDE
from faces.regions import REGIONS
from samples.extracted import Plan, find_extracted, publish
from samples.feature_files import SCHEMA_VERSION, open_features
from samples.manifest import read_manifest
from samples.sources import Source, find_sources, is_named
from samples.splits import SHARES


def make_plan(args: argparse.Namespace, checksums: list[str | None]) -> Plan:
    """What is to do; prints in what the images and options differ from those of the feature files that are there.

    Args:
        checksums: of the finder's files.
    """
    if args.manifest:
        sources, others = read_manifest(args.manifest, args.data_root), []
    else:
        sources, others = find_sources(args.data_root)
    settings = {
        "schema": SCHEMA_VERSION,
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "search": [SEARCH_SIDE, PADDING, CNN_SIDE],
        "search_again": args.search_again,
        "finder": checksums,
    }
    if unknown := [name for name in args.test_only if not any(is_named(source.data_set, [name]) for source in sources)]:
        raise ValueError(f"--test_only {', '.join(unknown)}: no such data set in {args.manifest or args.data_root}")
    for source in sources:
        if source.split not in ("", "test") and is_named(source.data_set, args.test_only):
            raise ValueError(
                f"{args.manifest}: {source.path} is for {source.split}, and --test_only names its data set"
            )
    plan = Plan(sources, others, settings, fingerprint_of(sources, settings, args), published=False, missing=[])
    if publish(plan, args.output_dir):
        return plan._replace(published=True)

    extracted = find_extracted(sources, args.output_dir, settings, check=True)
    for line in extracted.unused[:3]:
        print(line)
    if len(extracted.unused) > 3:
        print(f"... {len(extracted.unused)} such files in all")
    plan = plan._replace(missing=[source for source, row in zip(sources, extracted.rows) if row < 0])
    done = len(sources) - len(plan.missing)
    if held := extracted.held:
        with open_features(extracted.files[0]) as file:  # feature files come first
            earlier = json.loads(file.attrs["dealing"])
        changes = {
            "not in it yet": sum(source.path not in held for source in sources),
            "changed": sum(source.path in held for source in plan.missing),
            "removed": len(held - {source.path for source in sources}),
        }
        changes = [f"{count} images {what}" for what, count in changes.items() if count]
        changes += [
            f"--{name} {earlier.get(name)} -> {value}"
            for name, value in dealing(args).items()
            if earlier.get(name) != value
        ]
        print(
            f"{args.output_dir}: {', '.join(changes) or 'some files are missing or of an earlier run'}; the splits are"
            " dealt anew"
        )
    if done:
        print(f"going on: {done} of {len(sources)} images are extracted already")
    need, free = (len(sources) + len(plan.missing)) * sample_bytes(args), shutil.disk_usage(args.output_dir).free
    if need > free:
        print(
            f"WARNING: {args.output_dir}: needs about {need / 1e9:.2f} GB while it is made, {free / 1e9:.2f} GB are"
            " free"
        )
    return plan


def fingerprint_of(sources: list[Source], settings: dict, args: argparse.Namespace) -> str:
    digest = hashlib.sha256(
        json.dumps([settings, dealing(args), [share / sum(args.shares) for share in args.shares]]).encode()
    )
    for source in sources:
        digest.update(json.dumps(source).encode())
    return digest.hexdigest()


def dealing(args: argparse.Namespace) -> dict:
    """The options that need no image to be extracted again."""
    return {
        "seed": args.seed,
        "group_by_folder": args.group_by_folder,
        "test_only": sorted(args.test_only),
        "compress": args.compress,
    } | ({} if tuple(args.shares) == SHARES else {"shares": list(args.shares)})


def sample_bytes(args: argparse.Namespace) -> int:
    return 3 * args.img_size**2 + 4 * len(REGIONS) * (args.img_size // args.patch_size) ** 2 + 1000
