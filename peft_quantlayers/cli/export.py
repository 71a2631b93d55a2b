"""``peft-quantlayers export MODEL DESTINATION --format FORMAT``: a quantized model as inference engines read it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..exports import export, export_formats
from ..exports.formats.base import APPROXIMATIONS

EXPORT_HELP = "write a quantized model as an inference engine reads it"


def add_export(verbs: argparse._SubParsersAction) -> None:
    """Add the verb and its arguments."""
    formats = export_formats()
    parser = verbs.add_parser(
        "export",
        help=EXPORT_HELP,
        description="Write a quantized model as an inference engine reads it, exactly or not at all.\n\nFormats:\n  "
        + "\n  ".join(map(str, formats.values())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of a quantized model")
    parser.add_argument("destination", type=Path, help="folder to write to")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join(formats)}")
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter of PEFT, written beside the model"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of dense tensors and scales")
    parser.add_argument("--approximate", choices=APPROXIMATIONS, help="how to store what the format does not hold")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: the one in the model's folder")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text for --approximate requantize")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text on which the export is compared with the model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the destination")


def run_export(options: argparse.Namespace) -> int:
    """Export, print the report, and give the exit code."""
    try:
        report = export(
            options.model,
            options.destination,
            options.format,
            adapter=options.adapter,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            approximate=options.approximate,
            tokenizer=options.tokenizer,
            calibration=options.calibration,
            text=None if options.text is None else options.text.read_text(encoding="utf-8"),
            overwrite=options.overwrite,
        )
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        print(f"peft-quantlayers export: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0
