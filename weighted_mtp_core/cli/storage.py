"""Verify, add and upload models and data sets.

Models are stored in models_v2/<name>/<version>/ and data sets in datasets_v2/<name>/<version>/. Each version
has a manifest of SHA-256 checksums and never changes: if a byte has changed, a run that uses this version
stops before training.

examples:
  storage verify
  storage add-model smollm2 1 ~/downloads/SmolLM2-135M
  storage sync --to s3://team-bucket/storage --dry-run
  storage sync --to s3://team-bucket/storage --run 20261123-121856-4f1c9a
"""

from __future__ import annotations

import argparse
from pathlib import Path

from weighted_mtp_core.api import RunOutcome
from weighted_mtp_core.cli.arguments import add_actions, add_folder
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_DONE, EXIT_RUN_FAILED
from weighted_mtp_core.storage.manifest import verify_manifest
from weighted_mtp_core.storage.versions import Kind, add_version, derived, unlisted, versions
from weighted_mtp_core.tracking.dotenv import use_dotenv
from weighted_mtp_core.tracking.run_folder import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verify, add_model, add_dataset, sync = add_actions(parser, _verify, _add_model, _add_dataset, _sync)
    for add in (add_model, add_dataset):
        add.add_argument("name", metavar="NAME")
        add.add_argument("version", metavar="VERSION")
        add.add_argument("source", metavar="PATH", type=Path, help="a file or a folder")
    sync.add_argument("--to", metavar="S3URI", required=True, help="for example s3://bucket/storage")
    sync.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    sync.add_argument(
        "--run",
        metavar="RUN",
        help="set the tag `storage_sync` of this run: `False` if the upload fails, and the run becomes "
        "FAILED; `True` if the upload succeeds, and the run gets its own status again",
    )
    add_folder(sync, "--runs", default="storage/runs")
    for action in (verify, add_model, add_dataset, sync):
        add_folder(action, "--storage", default="storage")


def _verify(args: argparse.Namespace) -> int:
    """Compare every version with its manifest."""
    rows: list[tuple[str, ...]] = []
    faults = 0
    for version in versions(args.storage):
        for folder in (version.path, *derived(version)):
            address = folder.relative_to(args.storage).as_posix()
            try:
                rows.append(("ok", address, f"sha256 {verify_manifest(folder)[:12]}"))
            except WmtpError as error:
                faults += 1
                rows.append(("FAILED", address, str(error)))
    rows += [
        ("unknown", address, f"{count} files that no manifest lists")
        for address, count in unlisted(args.storage).items()
    ]
    print_rows(rows or [("nothing to verify in", f"`{args.storage}`")])
    return EXIT_RUN_FAILED if faults else EXIT_DONE


def _add_model(args: argparse.Namespace) -> None:
    """Copy a model into storage as a new version."""
    _add(args, kind="models_v2")


def _add_dataset(args: argparse.Namespace) -> None:
    """Copy a data set into storage as a new version."""
    _add(args, kind="datasets_v2")


def _add(args: argparse.Namespace, *, kind: Kind) -> None:
    version = add_version(args.storage, args.source, kind=kind, name=args.name, version=args.version)
    print(f"added {version.address}")


def _sync(args: argparse.Namespace) -> None:
    """Upload the files that S3 does not have."""
    if args.run is None or args.dry_run:
        _upload(args)
        return
    from weighted_mtp_core.tracking.sync import amend_run

    run = find_run(args.runs, args.run)
    try:
        _upload(args)
    except BaseException:
        # the run becomes FAILED whatever the exception is, so that an alarm on FAILED runs is triggered
        amend_run(run, tags={"storage_sync": "False"}, outcome=RunOutcome.FAILED, log=print)
        raise
    amend_run(run, tags={"storage_sync": "True"}, outcome=None, log=print)


def _upload(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from weighted_mtp_core.storage.s3_upload import plan_upload, upload

    use_dotenv()
    plan = plan_upload(args.storage, args.to)
    print(f"{plan.location}: {plan.stored} files are there, {len(plan.new)} are new ({plan.size:,} bytes)")
    for address, count in unlisted(args.storage).items():
        print(f"not uploaded: {count} files in `{address}`, which no manifest lists")
    if count := sum(len(derived(version)) for version in versions(args.storage)):
        print(f"not uploaded: {count} folders of derived files, which runs make again")
    if args.dry_run:
        print_rows([(f"{item.size:,}".rjust(15), item.key) for item in plan.new])
        return
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("upload", total=plan.size)
        upload(plan, on_done=lambda item: progress.update(task, advance=item.size))
    count = plan.stored + len(plan.new)
    print(f"{plan.location}: all {count} files of models and data sets are there, confirmed by checksum")
