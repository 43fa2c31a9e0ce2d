"""One ONNX file for every depth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import few, randomise
from torch import Tensor, nn

import adn
from adn.cli import main
from adn.runtime.onnx import entries_of, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSIFIERS: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [8, 16, 24, 32]}, "mobilenetv2_050": {}, "regnetx_002": {}, "resnetv2_50": {},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "num_heads": 2, "depth": 6},
    "convnext_atto": {}, "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "window_size": 4},
    "efficientnet_b0": {}, "eva02_tiny_patch14_224": {"img_size": 56, "depth": 6},
}


def classifier(name: str = "resnet18") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = randomise(adn.convert(timm.create_model(name, num_classes=7, **CLASSIFIERS[name]))).eval()
    size = CLASSIFIERS[name].get("img_size", 64)
    return net, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def rtdetr() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = adn.convert(adn.create_model(
        "rtdetr_r18vd", num_classes=5, queries=20, hidden=32, decoder_hidden=32, feedforward=32, heads=4,
        decoder_feedforward=32, decoder_layers=3, backbone_args={"width": 8}))
    return randomise(net).eval(), torch.rand(2, 3, 64, 96)


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def agree(path: Path, net: nn.Module, x: Tensor) -> None:
    """At every depth, of batches of one and of several; what is written and read here is not what the export compares.
    """
    session = session_of(path)
    seen = set()
    for depth in adn.depths(net):
        for batch in (x, x[1:2]):
            logits, = session.run(["logits"], {"images": batch.numpy(), "depth": entries_of(depth)})
            with adn.at_depth(net, depth), torch.no_grad():
                wanted = net(batch)
            torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-3,
                                       atol=1e-4 * wanted.abs().max().item())
        seen.add(wanted.sum().item())
    assert len(seen) == len(adn.depths(net)), "every depth computes something else"


@pytest.mark.parametrize("name", few(CLASSIFIERS, ("resnet18", "convnext_atto", "vit_tiny_patch16_224").__contains__))
def test_every_depth_from_one_file(name: str, tmp_path: Path) -> None:
    net, x = classifier(name)
    path = tmp_path / "net.onnx"
    found = export_onnx(net, path, x[:1], progress=False)
    assert [*found] == adn.depths(net)
    assert max(found.values()) < 1e-4
    agree(path, net, x)


def nodes(graph: Any, kinds: str) -> int:
    """How many of these run whatever the depth."""
    return sum(node.op_type == kinds for node in graph.node)


def test_what_a_depth_leaves_out_is_in_a_branch(tmp_path: Path) -> None:
    """Of a net with batch norms both paths of each stage, of one with layer norms the refinement blocks alone. Weights
    are outside, each once."""
    for name, always in (("resnet18", "Conv"), ("vit_tiny_patch16_224", "Softmax"),
                         ("swin_tiny_patch4_window7_224", "MatMul")):
        net, x = classifier(name)
        export_onnx(net, tmp_path / f"{name}.onnx", x[:1], progress=False)
        file = onnx.load(tmp_path / f"{name}.onnx")
        flags = len(adn.get_depth(net))
        assert nodes(file.graph, "If") == (6 if name.startswith("swin") else flags)  # 1, 1, 3 and 1 blocks
        branches = [attribute.g for node in file.graph.node if node.op_type == "If" for attribute in node.attribute]
        assert not any(branch.initializer for branch in branches)
        assert sum(nodes(branch, always) for branch in branches) >= flags
        essential = nodes(file.graph, always)
        # Of six blocks four; of twelve blocks six, with six products each.
        assert essential == {"resnet18": 1, "vit_tiny_patch16_224": 4}.get(name, essential)
        if name.startswith("swin"):
            assert sum(nodes(branch, always) for branch in branches) == 6 * 6
        stored = sum(np.prod(each.dims) for each in file.graph.initializer)
        held = sum(value.numel() for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked"))
        assert stored <= 1.02 * held


def test_a_stack_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adn.runtime.onnx.MOST_CHECKED", 8)
    net, x = rtdetr()
    path = tmp_path / "net.onnx"
    found = export_onnx(net, path, x[:1], progress=False)
    assert len(found) == 8  # of 96
    session = session_of(path)
    assert {each.name: each.type for each in session.get_inputs()} == {
        "images": "tensor(float)", "depth": "tensor(int32)"}
    for depth in ("FFFFF|3", "TFTFT|1", "TTTTT|2"):
        outputs = dict(zip(("pred_logits", "pred_boxes", "query_index"), session.run(
            ["pred_logits", "pred_boxes", "query_index"], {"images": x.numpy(), "depth": entries_of(adn.Depth(depth))}),
            strict=True))
        with adn.at_depth(net, depth), torch.no_grad():
            wanted = net(x)
        for key, value in outputs.items():
            torch.testing.assert_close(torch.from_numpy(value), wanted[key], rtol=1e-3, atol=1e-4)


def test_one_depth_alone(tmp_path: Path) -> None:
    net, x = classifier()
    net.__dict__["_adn"].class_names = [f"c{i}" for i in range(7)]
    path = tmp_path / "base.onnx"
    assert [*export_onnx(net, path, x[:2], depth="base", dynamic_batch=False, extra={"data": {"size": 64}},
                         progress=False)] == [adn.Depth("TTTT")]
    session = session_of(path)
    assert [each.name for each in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == [2, 3, 64, 64]
    properties = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert properties["adn.depths"] == ["TTTT"]
    assert properties["adn.classes"] == [f"c{i}" for i in range(7)]
    assert properties["adn.data"] == {"size": 64}
    assert properties["adn.input"] == [3, 64, 64]
    with adn.at_depth(net, "base"), torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": x[:2].numpy()})[0]), net(x[:2]),
                                   rtol=1e-3, atol=1e-4)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = classifier()
    path = tmp_path / "net.onnx"
    path.write_text("what was there")
    monkeypatch.setattr("adn.runtime.onnx._essential_once", lambda segment: False)
    monkeypatch.setattr("adn.runtime.onnx._chosen", lambda segment, entry, inputs: segment.run(False, *inputs))
    with pytest.raises(ValueError, match="something else than the net at depth FFFT: a difference of"):
        export_onnx(net, path, x, progress=False)
    assert path.read_text() == "what was there"
    assert [*tmp_path.iterdir()] == [path]


class Branches(nn.Module):
    """Asks how large an image is, which torch.fx does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=7, channels=[8, 16, 24, 32])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.shape[-1] > 32 else self.net(-x)


def test_what_is_refused(tmp_path: Path) -> None:
    net, x = classifier()
    path = tmp_path / "net.onnx"
    for message, call in {
        "call net.eval\\(\\) first": lambda: export_onnx(classifier()[0].train(), path, x),
        "opset=12; pass 18 or later": lambda: export_onnx(net, path, x, opset=12),
        "a batch of images as the example": lambda: export_onnx(net, path, x[:0]),
        "has 2 flags, this net has 4": lambda: export_onnx(net, path, x, depth="TT"),
        "not any-depth": lambda: export_onnx(timm.create_model("resnet18").eval(), path, x),
        "depends on values": lambda: export_onnx(
            adn.convert(adn.create_model("fasterrcnn_resnet18_fpn", num_classes=3)).eval(), path, x),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(OSError, match="cannot write"):
        export_onnx(net, tmp_path / "nowhere" / "net.onnx", x, depth="base")
    branches = adn.convert(Branches(), plan=["net.layer1", "net.layer2"]).eval()
    with pytest.raises(ValueError, match=r"Branches: .* write each depth to a file of its own, depth="):
        export_onnx(branches, path, x)
    assert not path.exists()
    export_onnx(branches, path, x, depth="base", progress=False)  # as it says


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomise(adn.create_model("anydepth_resnet18", num_classes=7, channels=[8, 16, 24, 32])).eval()
    x = torch.randn(3, 3, 64, 64)
    checkpoint, path = tmp_path / "net.safetensors", tmp_path / "out" / "net.onnx"
    adn.save(net, checkpoint, extra={"data": {"size": 64, "resize": 72}})
    assert main(["export", "--checkpoint", str(checkpoint), "--onnx", str(path)]) == 0
    said = capsys.readouterr().out
    assert "compared at all 16 depths, the largest difference is" in said
    assert "images: float32 (B, 3, 64, 64)" in said
    assert "depth:  bool (4,), of the base-net [True, True, True, True]" in said
    agree(path, net, x)
    prepared = json.loads(session_of(path).get_modelmeta().custom_metadata_map["adn.data"])
    assert (prepared["size"], prepared["resize"]) == (64, 72)
    assert main(["export", "--checkpoint", str(checkpoint), "--onnx", str(path), "--batch", "0"]) == 2
    assert "--batch 0; pass at least 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", "--checkpoint", str(checkpoint), "--onnx", str(path)]) == 2
    assert 'ONNX files need onnxruntime: pip install "adn[onnx]"' in capsys.readouterr().err


def test_served_without_this_library(tmp_path: Path) -> None:
    """By a script that has neither it nor torch."""
    net, x = classifier()
    export_onnx(net, tmp_path / "net.onnx", x[:1], progress=False)
    script = Path(__file__).resolve().parents[2] / "bench" / "serve_onnx.py"
    run = ("import runpy, sys; sys.modules |= {'torch': None, 'adn': None, 'timm': None}; "
           f"sys.argv = ['serve', {str(tmp_path / 'net.onnx')!r}, '--frames', '20', '--threads', '1']; "
           f"runpy.run_path({str(script)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("quiet: TTTT ")
    assert "FFFF" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["quiet", "busy", "quiet"]
    assert all("% over the budget; " in line for line in lines[2:])


def test_the_budget_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_onnx import AnyDepth, Budget

    assert AnyDepth.entries("TFT|12") == [1, 0, 1, 12]
    budget = Budget([1.0, 2.0, 3.0], 3.5)
    assert budget.choose() == 2
    for _ in range(20):
        i = budget.choose()
        budget.took(i, 2 * budget.costs[i])  # twice as slow as when it was quiet
    assert budget.choose() == 0
    for _ in range(20):
        i = budget.choose()
        budget.took(i, budget.costs[i])
    assert budget.choose() == 2


def test_queries_that_change_places_are_the_same() -> None:
    """Not those of which many are others."""
    net, x = rtdetr()
    with torch.no_grad():
        wanted = net(x)
    order = torch.randperm(20)
    swapped = {name: value[:, order] for name, value in wanted.items()}
    for a, b in zip(*(each.values() for each in net.comparable(swapped, wanted)), strict=True):
        assert torch.equal(a, b)
        assert len(a) == 40
    swapped["query_index"] = swapped["query_index"].clone()
    swapped["query_index"][0, :4] = 1000
    found, reference = net.comparable(swapped, wanted)
    assert found is swapped
    assert reference is wanted


class OneByOne(nn.Module):
    """Counts its images in Python, so that it is for batches of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=7, channels=[8, 16, 24, 32])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x[i : i + 1]) for i in range(x.shape[0])])


def test_a_batch_of_one_size(tmp_path: Path) -> None:
    net, x = adn.convert(OneByOne(), plan=["net.layer1", "net.layer2"]).eval(), torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="pass dynamic_batch=False"):
        export_onnx(net, tmp_path / "net.onnx", x, depth="base", progress=False)
    export_onnx(net, tmp_path / "net.onnx", x, depth="base", dynamic_batch=False, progress=False)  # as it says
