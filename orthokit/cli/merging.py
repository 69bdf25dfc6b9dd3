"""``orthokit merge``: model files into one."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthokit.cli.common import FAILED, OK, parameters, value
from orthokit.errors import OptionError, OrthokitError

if TYPE_CHECKING:
    from orthokit.merging import MergeProgress, MergeReport

__all__ = ["add"]


def add(commands: argparse._SubParsersAction) -> None:
    """The command that merges model files."""
    merge = commands.add_parser(
        "merge",
        help="merge model files, tensor by tensor",
        description="Merges models in safetensors files or Hugging Face folders with a few tensors in memory. A run "
        "that was interrupted is gone on with by the same command.",
    )
    merge.add_argument("--base", type=Path, metavar="PATH", help="the model that the experts were trained from")
    merge.add_argument(
        "--expert", type=Path, action="append", default=[], metavar="PATH", help="a model to merge; repeat it"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    merge.add_argument("--method", metavar="NAME", help="how (default orthomerge); an unknown name lists all")
    merge.add_argument(
        "--weight", type=float, action="append", default=[], metavar="W", help="one per expert, in their order"
    )
    merge.add_argument("--scale", type=float, metavar="S", help="factor on the merged change (default: the method's)")
    merge.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method; may be repeated"
    )
    merge.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="an adapter to merge without its base, of orthokit or PEFT; repeat it, in place of --base and --expert",
    )
    merge.add_argument(
        "--format", choices=["orthokit", "peft"], default="orthokit", help="for the merged adapter (default orthokit)"
    )
    merge.add_argument("--config", type=Path, metavar="FILE", help="a recipe for mergekit, instead of the above")
    merge.add_argument("--dtype", metavar="TYPE", help="of the result, such as bfloat16 (default: the base's)")
    merge.add_argument("--missing", choices=["error", "base"], default="error", help="for tensors an expert lacks")
    merge.add_argument("--seed", type=int, default=0, metavar="N", help="of random choices (default 0)")
    merge.add_argument("--threads", type=int, default=2, metavar="N", help="tensors at a time (default 2)")
    merge.add_argument(
        "--shard-bytes", type=int, default=5 * 10**9, metavar="N", help="bytes per file (default 5000000000)"
    )
    merge.add_argument("--json", type=Path, metavar="FILE", help="where to write the report, a row per tensor")
    merge.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with an interrupted run (default)"
    )
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    """Merges model files; 1 when that cannot be done."""
    terminal = sys.stderr.isatty()

    def show(at: MergeProgress) -> None:
        # The line is overwritten by the next one, and ended by the last.
        print(f"\r\x1b[2K{at.line()}", end="\n" if at.done == at.total else "", file=sys.stderr, flush=True)

    common: dict[str, Any] = {
        name: getattr(options, name) for name in ("missing", "seed", "threads", "shard_bytes", "resume")
    }
    common |= {"progress": show} if terminal else {}
    common |= {"dtype": options.dtype} if options.dtype is not None else {}
    own = [
        name
        for name in ("base", "expert", "adapter", "method", "weight", "scale", "option")
        if getattr(options, name) not in (None, [])
    ]
    try:
        if options.config is not None:
            if own:
                raise OptionError(f"--config says what to merge; leave out --{own[0]}.")
            from orthokit.merging.mergekit import read_mergekit

            recipe = read_mergekit(options.config)
            for note in recipe.notes:
                print(f"orthokit: {note}", file=sys.stderr)
            told = recipe.merge(options.out, **common)
        else:
            common |= {"method": options.method or "orthomerge", "weights": options.weight or None}
            common |= {"scale": options.scale}
            given = {name: value(text) for name, text in parameters(options.option, flag="--option").items()}
            if taken := sorted(given.keys() & {*common, "base", "experts", "out", "dtype", "progress"}):
                raise OptionError(f"{taken[0]} is no option of a method; it has a flag of its own.")
            told = _merge_models(options, common, given)
        if options.json is not None:
            told.to_json(options.json)
    except OrthokitError as error:
        print(f"orthokit: {error}", file=sys.stderr)
        return FAILED
    counts: dict[str, list[int]] = {}
    for row in told.rows:
        count = counts.setdefault(row["method"], [0, 0])
        count[0] += 1
        count[1] += math.prod(row["shape"])
    width = max(map(len, ("merged by", *counts)))
    print(f"{'merged by':<{width}}  tensors         numbers")
    for name, (tensors, numbers) in sorted(counts.items(), key=lambda item: -item[1][1]):
        print(f"{name:<{width}}  {tensors:>7}  {numbers:>14,}")
    print(told)
    return OK


def _merge_models(options: argparse.Namespace, common: dict[str, Any], given: dict[str, Any]) -> MergeReport:
    """Models or adapters, whichever were named."""
    from orthokit.merging import merge_adapters, merge_checkpoints

    if options.adapter:
        if options.base is not None or options.expert:
            raise OptionError("--adapter merges adapters without their base; leave out --base and --expert.")
        shared = {name: common[name] for name in ("method", "weights", "scale", "seed")}
        return merge_adapters(options.adapter, options.out, format=options.format, **shared, **given)
    if options.base is None or not options.expert:
        raise OptionError("name what to merge: --base PATH --expert PATH ..., --adapter DIR ..., or --config FILE.")
    return merge_checkpoints(options.base, options.expert, options.out, **common, **given)
