"""Count and time a net at every depth, and pick one for a time budget.

Prints one line per depth: its name, multiply-adds per image (in millions),
parameters in use, median and 99th percentile of the measured time of a forward,
and a star if no other depth is both faster and better (more accurate where
accuracy is given, else more multiply-adds).

examples:
  adn profile --model resnet50 --threads 1
  adn profile --checkpoint net.safetensors --accuracy accuracy.csv --plot profile.png
  adn profile --checkpoint net.safetensors --budget 20 --percentile 99
"""

from __future__ import annotations

import argparse

from .eval import example, load_net, pick_device

# A net of more depths than this is profiled along its chain unless all are asked for: time doubles with every stage.
MOST_BY_DEFAULT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a model of timm, converted, with random weights")
    source.add_argument("--checkpoint", metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (default: the net's own)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward (default: 1)")
    parser.add_argument(
        "--depth", metavar="DEPTHS",
        help='which depths: "all", "chain" (FFFF, TFFF, TTFF to TTTT), or a list such as super,TTFF,base '
             f"(default: all, or if more than {MOST_BY_DEFAULT} the chain; with --accuracy, those in that file)",
    )
    parser.add_argument("--accuracy", metavar="FILE", help="what adn eval --csv wrote, to be joined by depth")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="timed forwards per depth (default: 50)")
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy, or MACs if unknown, against latency (png, pdf)")
    parser.add_argument("--budget", type=float, metavar="MS", help="name the deepest depth that runs in this time")
    parser.add_argument("--percentile", type=int, choices=(50, 99), default=50,
                        help="of the times that must fit the budget (default: 50)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..data import data_config
    from ..evaluate import choose_depths
    from ..models import PREFIX, create_model
    from ..profile import fit_budget, profile, read_table, require_matplotlib
    from ..state import depths as all_depths

    if args.plot:
        require_matplotlib()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.checkpoint:
        net, config = load_net(args)
    else:
        args.device = pick_device(args.device)
        net = create_model(PREFIX + args.model.removeprefix(PREFIX)).to(args.device).eval()
        config = data_config(net, size=args.size)
    accuracy = None
    if args.accuracy:
        _, rows = read_table(args.accuracy, ("depth", "top1"))
        accuracy = {row["depth"]: float(row["top1"]) for row in rows}
    every = len(all_depths(net))
    if args.depth is None and accuracy:
        depths = list(accuracy)
    else:
        depths = choose_depths(net, args.depth or ("all" if every <= MOST_BY_DEFAULT else "chain"))
    result = profile(net, example(net, config["size"], args.batch_size), depths=depths, rounds=args.rounds,
                     accuracy=accuracy, progress=True)
    print(result)
    print(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    if args.depth is None and accuracy is None and len(result) < every:
        print(f"{len(result)} of {every} depths; --depth all measures every one")
    if args.csv:
        result.to_csv(args.csv)
    if args.plot:
        result.plot(args.plot)
    if args.budget is not None:
        print(f"{fit_budget(result, ms=args.budget, percentile=args.percentile)} fits {args.budget:g} ms "
              f"(p{args.percentile})")
    return 0
