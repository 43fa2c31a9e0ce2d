"""Serve an any-depth ONNX file within a latency budget while the load of the machine changes. It needs numpy and
onnxruntime, and nothing of the library that wrote the file.

    adn export --checkpoint net.safetensors --onnx net.onnx
    python bench/serve_onnx.py net.onnx --budget-ms 8

What each depth takes is measured first, on the quiet machine. Then frames come, in three phases: quiet, busy (other
threads compute), quiet again. The time of each frame over that of its depth when it was quiet says how busy the machine
is; the next frame runs at the deepest depth that fits the budget then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnxruntime

KEPT = 0.7  # of the estimate of how busy the machine is, with each frame


class AnyDepth:
    """A file: its depths from the base-net to the super-net, one more stage of full depth at a time.

    Args:
        path: of `adn export`.
        threads: of ONNX Runtime; 0 = all.
    """

    def __init__(self, path: str, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        properties = self.session.get_modelmeta().custom_metadata_map
        inputs = {each.name: each for each in self.session.get_inputs()}
        if "adn.depths" not in properties or "depth" not in inputs:
            raise SystemExit(f"{path} does not hold several depths: write it by adn export --onnx FILE")
        full, base = (self.entries(depth) for depth in json.loads(properties["adn.depths"]))
        kind = bool if inputs["depth"].type == "tensor(bool)" else np.int32
        # Later stages first: what is near the input is worth most.
        self.depths = [np.array([*base[:i], *full[i:]], dtype=kind) for i in range(len(full), -1, -1)]
        self.size = json.loads(properties["adn.input"])

    @staticmethod
    def entries(depth: str) -> list[int]:
        """Of "TFTF" or "TFTF|3" the entries of the input `depth`."""
        flags, *layers = depth.split("|")
        return [int(letter == "T") for letter in flags] + [int(count) for count in layers]

    def run(self, images: np.ndarray, depth: np.ndarray) -> tuple[list[np.ndarray], float]:
        """Outputs, and milliseconds."""
        start = time.perf_counter()
        outputs = self.session.run(None, {"images": images, "depth": depth})
        return outputs, 1e3 * (time.perf_counter() - start)


class Budget:
    """Chooses the depth of the next frame.

    Args:
        costs: of each depth on the quiet machine, in milliseconds.
        budget: of a frame, in milliseconds.
    """

    def __init__(self, costs: list[float], budget: float) -> None:
        self.costs, self.budget, self.busy = costs, budget, 1.0

    def choose(self) -> int:
        fitting = [i for i, cost in enumerate(self.costs) if cost * self.busy <= self.budget]
        return max(fitting, key=self.costs.__getitem__, default=0)

    def took(self, i: int, milliseconds: float) -> None:
        self.busy = KEPT * self.busy + (1 - KEPT) * milliseconds / self.costs[i]


@contextlib.contextmanager
def busy(threads: int) -> Iterator[None]:
    """Other threads compute meanwhile."""
    stop = threading.Event()

    def work() -> None:
        x = np.random.default_rng(0).random((256, 256))
        while not stop.is_set():
            x @ x

    others = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        stop.set()
        for other in others:
            other.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what adn export wrote")
    parser.add_argument("--budget-ms", type=float, help="of a frame (default: what the super-net takes when quiet, and "
                        "a fifth)")
    parser.add_argument("--frames", type=int, default=200, help="of each phase (default: %(default)s)")
    parser.add_argument("--load", type=int, default=2, help="threads that compute in the busy phase (default: 2)")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime (default: all)")
    args = parser.parse_args()
    net = AnyDepth(args.file, args.threads)
    frame = np.random.default_rng(0).random((1, *net.size), dtype=np.float32)  # where a camera's would be
    costs = [float(np.median([net.run(frame, depth)[1] for _ in range(20)][5:])) for depth in net.depths]
    names = ["".join("FT"[int(x)] if x in (0, 1) else f"|{x}" for x in depth.tolist()) for depth in net.depths]
    print("quiet: " + ", ".join(f"{name} {cost:.1f} ms" for name, cost in zip(names, costs)))
    budget = Budget(costs, args.budget_ms or 1.2 * max(costs))
    print(f"budget: {budget.budget:.1f} ms a frame")
    for phase, load in (("quiet", 0), ("busy", args.load), ("quiet", 0)):
        times, ran = [], Counter()
        with busy(load):
            for _ in range(args.frames):
                i = budget.choose()
                _, milliseconds = net.run(frame, net.depths[i])
                budget.took(i, milliseconds)
                times.append(milliseconds)
                ran[names[i]] += 1
        over = np.mean(np.array(times) > budget.budget)
        print(f"{phase:5}  median {np.median(times):6.1f} ms, {100 * over:3.0f} % over the budget; "
              + ", ".join(f"{name} {100 * count / args.frames:.0f} %" for name, count in ran.most_common()))


if __name__ == "__main__":
    main()
