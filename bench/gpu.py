"""Everything a GPU is needed for, in one command and under ten minutes: its tests, then its benchmarks.

    python bench/gpu.py --out bench/results [--data DIR_OF_CIFAR10]

Each step has a time limit of its own; a step that fails or runs out of time does not stop the others, and the exit
code says whether all of them passed. Result files carry device, versions, commit and date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR-10, for bench/cifar10.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    tag = torch.cuda.get_device_name().lower().replace(" ", "_")
    python = sys.executable
    steps: list[tuple[str, int, list[str]]] = [
        ("tests", 150, [python, "-m", "pytest", "-m", "cuda", str(HERE.parent / "tests")]),
        ("overhead of conversion", 90, [
            python, str(HERE / "conversion_overhead.py"), "--device", "cuda", "--rounds", "50",
            "--csv", str(args.out / f"conversion_overhead_{tag}.csv")]),
    ]
    for model in ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        for batch in (1, 64):
            steps.append((f"profile {model}, batch {batch}", 60, [
                python, "-m", "adn", "profile", "--model", model, "--batch-size", str(batch), "--device", "cuda",
                "--csv", str(args.out / f"profile_{model}_batch{batch}_{tag}.csv")]))
    if args.data is not None:
        steps.append(("CIFAR-10, one seed", 240, [
            python, str(HERE / "cifar10.py"), "--data", str(args.data), "--full", "--device", "cuda", "--epochs", "10",
            "--seeds", "0", "--csv", str(args.out / f"cifar10_10epochs_{tag}.csv")]))
    failed = []
    for what, limit, command in steps:
        print(f"\n=== {what}", flush=True)
        start = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"=== {what}: {'passed' if code == 0 else 'FAILED' if code > 0 else 'out of time'}, "
              f"{time.perf_counter() - start:.0f} s", flush=True)
        if code:
            failed.append(what)
    print("\nall passed" if not failed else f"\nnot passed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
