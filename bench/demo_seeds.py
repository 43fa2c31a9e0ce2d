"""`adn demo` for several seeds: the accuracy of all 16 depths on the held-out digits, and of the two networks trained
separately.

    python bench/demo_seeds.py --csv bench/results/demo_seeds_cpu.csv
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import columns, header, write_rows

from adn import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as out:
            result = demo.run(out, seed=seed, compare=True, progress=False)
        rows += [{"seed": seed, "network": "any-depth", "depth": str(p.depth), "mmacs": round(p.macs / 1e6, 2),
                  "top1": round(p.top1, 2)} for p in result.profile]
        macs = {"super": result.profile[0].macs, "base": result.profile[-1].macs}
        depth = {"super": str(result.profile[0].depth), "base": str(result.profile[-1].depth)}
        rows += [{"seed": seed, "network": "separate", "depth": depth[which], "mmacs": round(macs[which] / 1e6, 2),
                  "top1": round(top1, 2)} for which, top1 in result.separate.items()]
        lowest = min(result.profile, key=lambda p: p.top1)
        print(f"seed {seed}: lowest {lowest.top1:.2f} % at {lowest.depth}", flush=True)
    table = [("network", "depth", "MMACs", "top-1 mean", "lowest", "highest")]
    for key in dict.fromkeys((row["network"], row["depth"], row["mmacs"]) for row in rows):
        values = [row["top1"] for row in rows if (row["network"], row["depth"], row["mmacs"]) == key]
        table.append((*key, f"{np.mean(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"))
    print(columns(table))
    if args.csv:
        write_rows(args.csv, rows, header())


if __name__ == "__main__":
    main()
