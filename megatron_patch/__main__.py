"""Megatron-LM's scripts, unedited, with `--attention muse`:

    torchrun ... -m muse_dist.megatron_patch path/to/Megatron-LM/pretrain_gpt.py --attention muse --muse-block 4096 ...

adds --attention and the --muse-* options to the script's own, checks them while the script parses its command line,
before it touches a GPU, and gives the self-attention of the chosen layers MuSe as its core attention.
"""
from __future__ import annotations

import argparse
import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from muse_dist.megatron_patch.options import Choice, add_options, read_options
from muse_dist.megatron_patch.predict import read_step, report
from muse_dist.megatron_patch.refusals import argument_problems, refuse

USAGE = "python -m muse_dist.megatron_patch SCRIPT.py [--attention muse] [--muse-... VALUE] [the script's own options]"


def main(arguments: list[str] | None = None) -> None:
    """Run a script of Megatron-LM's as if it were started itself. SystemExit with a message for what cannot run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        add_options(argparse.ArgumentParser(usage=USAGE, description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter)).print_help()
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"{script}: no such file; the first argument is the script to run: {USAGE}")
    sys.path.insert(0, str(script.resolve().parent))  # where Python itself looks when it starts a script
    sys.argv = [str(script), *arguments[1:]]
    add_to_megatron()
    runpy.run_path(str(script), run_name="__main__")


def add_to_megatron() -> None:
    """Let Megatron-LM's command line choose the attention. It reads `add_megatron_arguments` whenever it parses."""
    try:
        from megatron.training import arguments as megatron
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise  # something that this Megatron itself needs
        raise SystemExit(f"{error}: give a script in the top folder of a Megatron-LM checkout, which has it, or use "
                         "`use_muse` with megatron-core alone") from error
    from megatron.core.transformer.attention import SelfAttention

    stock_arguments, stock_init = megatron.add_megatron_arguments, SelfAttention.__init__
    said: list[str] = []  # Megatron-LM parses its options several times

    @functools.wraps(stock_arguments)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_options(stock_arguments(parser))
        stock_parse = parser.parse_known_args

        def parse_known_args(*args: Any, **options: Any) -> Any:
            parsed, rest = stock_parse(*args, **options)
            choice, lines = _checked_choice(parsed)
            if lines and lines != said:
                print("\n".join(f"muse: {line}" for line in lines), flush=True)
                said[:] = lines
            SelfAttention.__init__ = stock_init if choice is None else _build_with(stock_init, choice)
            return parsed, rest

        parser.parse_known_args = parse_known_args  # type: ignore[method-assign]  # of this one parser
        return parser

    megatron.add_megatron_arguments = add_megatron_arguments


def _checked_choice(args: argparse.Namespace) -> tuple[Choice | None, list[str]]:
    """What the options ask for, if it can run; and lines that say what that is, for the first process."""
    try:
        choice = read_options(args)
        if choice is None:
            return None, []
        refuse(argument_problems(args, *choice))
        # torchrun's own variables: Megatron-LM reads its rank and size there too.
        lines = report(choice, read_step(args, int(os.environ.get("WORLD_SIZE", "1"))))
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"--attention {args.attention}: {error}") from error
    return choice, lines if int(os.environ.get("RANK", "0")) == 0 else []


def _build_with(stock_init: Any, choice: Choice) -> Any:
    """The constructor of self-attention with another core attention: below every layer spec, also of scripts' own."""
    from muse_dist.megatron_patch.spec import refuse_cache, with_muse

    @functools.wraps(stock_init)
    def build(self: Any, config: Any, submodules: Any, *args: Any, **options: Any) -> None:
        stock_init(self, config, with_muse(submodules, *choice), *args, **options)
        refuse_cache(self)

    return build


if __name__ == "__main__":
    main()
