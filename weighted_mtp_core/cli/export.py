"""`export`: the best policy of a finished run as a directory that transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from weighted_mtp_core.cli.run_arguments import add_run_arguments
from weighted_mtp_core.exit_codes import EXIT_DONE

_DESCRIPTION = """\
Write the best policy of a finished run as a transformers directory: head 1 as an ordinary language model that
loads without this package, the other heads in a file beside it, and the SHA-256 of every file. A recipe
(`model.base = "DIR"`), `evaluate DIR` and `generate DIR` load all heads."""
_EPILOG = """\
examples:
  export 20261123-140924 --to models/sorter
  export 20261123-140924 --to models/sorter --force       replace an existing exported model"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export", help="write a finished run as a model", description=_DESCRIPTION, epilog=_EPILOG
    )
    add_run_arguments(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace an exported model")
    return parser


def main(args: argparse.Namespace) -> int:
    """Write the directory and print its path."""
    from weighted_mtp_core.evaluation.finished_run import export_run
    from weighted_mtp_core.export.transformers import refuse_to_replace
    from weighted_mtp_core.tracking.run_folder import find_run

    refuse_to_replace(args.to, force=args.force)
    export_run(find_run(args.runs, args.run), args.to, log=lambda text: print(text, file=sys.stderr))
    print(args.to)
    return EXIT_DONE
