"""The `adn` command: one file of this package per subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

DESCRIPTION = """\
Any-depth networks: one set of weights, every depth, chosen at run time.

A depth is written with one letter per stage, nearest the input first: T bypasses
the stage's refinement path, F runs it. FFFF is the super-net, TTTT the base-net.
For a detector the number of decoder layers follows: "TTTTT|4".
"""

# In the order in which a user meets them.
COMMANDS = ("demo", "scenes", "train", "eval", "predict", "detect", "profile", "calibrate", "route", "export")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adn", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="adn COMMAND --help explains a command and gives examples.",
    )
    parser.add_argument("--version", action="version", version=f"adn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        summary = module.__doc__.strip().partition("\n")[0].rstrip(".")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where an error was raised")
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # with the usage of the command
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: nothing to report, and nobody to report it to.
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"adn {args.command}: error: {error}", file=sys.stderr)
        return 2
