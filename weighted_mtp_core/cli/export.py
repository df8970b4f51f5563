"""Write a finished run as a model.

The best policy of the run is written as a transformers directory. The directory contains head 1 as an
ordinary language model that loads without this package, the other heads in a folder of their own (heads
that came with the base model are in the files of the language model instead), and a manifest with the
SHA-256 of every file. `evaluate DIR`, `generate DIR` and recipes with `model.base = "DIR"` load all heads.

examples:
  export 20261123-140924 --to models/sorter
  export 20261123-140924 --to models/sorter --force       replace an existing exported model
  export 20261123-140924 --to models/sorter --dtype bfloat16   half the size
  export 20261123-140924 --to models/sorter --serve vllm      also write the heads as vLLM reads them
  export 20261123-140924 --to models/adapter --adapter        only the adapter, as peft reads it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from weighted_mtp_core.cli.arguments import add_run_arguments
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.run_folder import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace an exported model in DIR")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the parameters in the files (default: float32)",
    )
    parser.add_argument(
        "--serve",
        metavar="SERVER",
        choices=("transformers", "vllm", "sglang"),
        help="also write heads 2..K in the form with which this server (transformers, vllm, sglang) drafts, "
        "and print the command that serves the model; if the server does not support the kind of heads, the "
        "command ends with an error",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write only the adapter of the base model, in the format of peft, without heads 2..K",
    )


def main(args: argparse.Namespace) -> None:
    import torch

    from weighted_mtp_core.evaluation.finished_run import export_run
    from weighted_mtp_core.export.transformers import refuse_to_replace

    if args.adapter and args.serve:
        raise WmtpError("`--adapter` writes no heads, so no server drafts", hint="leave out `--serve`")
    refuse_to_replace(args.to, force=args.force)
    command = export_run(
        find_run(args.runs, args.run),
        args.to,
        dtype=getattr(torch, args.dtype),
        serve=args.serve,
        adapter=args.adapter,
        log=lambda text: print(text, file=sys.stderr),
    )
    print(args.to)
    if command is not None:
        print(command)
