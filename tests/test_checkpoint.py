"""Files of converted nets: what comes back, and what damaged or foreign files and full disks do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import build, randomise
from torch import nn

import adn
from adn.core.behaviours import Swapped
from adn.core.files import atomic_write
from adn.core.state import state_of
from adn.models.registry import create_model
from adn.weights.checkpoint import load, read_metadata, save

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 5}


def small_net(seed: int = 0, **kwargs: object) -> nn.Module:
    """A small any-depth net whose every norm, twins too, has values of its own."""
    torch.manual_seed(seed)
    return randomise(create_model("anydepth_resnet18", **SMALL, **kwargs), seed).eval()


def outputs(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.eval()
    results = []
    for depth in adn.depths(net):
        with adn.at_depth(net, depth), torch.inference_mode():
            results.append(net(x))
    return results


def same_outputs(a: nn.Module, b: nn.Module, shape: tuple[int, ...] = (2, 3, 33, 33)) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(a.parameters()).dtype)
    return all(map(torch.equal, outputs(a, x), outputs(b, x)))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------------- round trips


def test_round_trip(tmp_path: Path, image: torch.Tensor) -> None:
    net, path = small_net(), tmp_path / "net.safetensors"
    adn.set_depth(net, "TFTF")
    save(net, path, class_names=list("abcde"), extra={"epoch": 3, "accuracy": 0.5})
    back = load(path)
    assert adn.get_depth(back) == adn.Depth("TFTF")
    assert state_of(back).class_names == list("abcde")
    assert not torch.equal(*outputs(back, image)[:: len(adn.depths(back)) - 1]), "base equals super: nothing is tested"
    assert same_outputs(net, back)
    assert back.state_dict().keys() == net.state_dict().keys()
    metadata = read_metadata(path)
    assert metadata["extra"] == {"epoch": 3, "accuracy": 0.5}
    assert adn.Plan.from_dict(metadata["plan"]) == state_of(net).plan
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    save(back, path)  # what was loaded saves the same again, names of classes included
    assert read_metadata(path) | {"extra": None} == metadata | {"extra": None}


def test_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save(small_net(), tmp_path / "net.safetensors")
    finally:
        os.umask(previous)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o640


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    net = small_net()
    before = torch.get_rng_state()
    save(net, tmp_path / "net.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("twins", ["copy", "fresh"])
def test_twins_setting_is_kept(tmp_path: Path, twins: str) -> None:
    save(small_net(twins=twins), tmp_path / "net.safetensors")
    assert state_of(load(tmp_path / "net.safetensors")).twins == twins


def test_a_plan_of_ones_own_is_kept(tmp_path: Path) -> None:
    net = adn.convert(build("resnet18", num_classes=5), plan=["layer2", "layer4"])
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    assert [stage.name for stage in adn.stages(back)] == ["layer2", "layer4"]
    assert same_outputs(net, back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    net = small_net().to(dtype)
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    assert {name: t.dtype for name, t in back.state_dict().items()} == {n: t.dtype for n, t in net.state_dict().items()}
    assert same_outputs(net, back)


def test_mixed_dtypes_come_back(tmp_path: Path) -> None:
    net = small_net()
    net.layer1.half()
    net.fc.bfloat16()
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    for name, tensor in net.state_dict().items():
        assert back.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(back.state_dict()[name], tensor)


def test_channels_last(tmp_path: Path) -> None:
    net = small_net().to(memory_format=torch.channels_last)
    assert not net.layer1[0].conv1.weight.is_contiguous()
    save(net, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors").layer1[0].conv1.weight, net.layer1[0].conv1.weight)


def test_tied_tensors(tmp_path: Path) -> None:
    net = small_net()
    net.layer1[1].conv2.weight = net.layer1[0].conv2.weight
    save(net, tmp_path / "net.safetensors")
    assert same_outputs(net, load(tmp_path / "net.safetensors"))


@pytest.mark.parametrize("name", ["test_vit", "swinv2_tiny_window8_256", "swin_s3_tiny_224"])
def test_computed_buffers_are_rebuilt(tmp_path: Path, name: str) -> None:
    kwargs = {"img_size": 64} if "swin" in name else {}
    net = randomise(create_model(f"anydepth_{name}", num_classes=3, **kwargs))
    save(net, tmp_path / "net.safetensors")
    back, size = load(tmp_path / "net.safetensors"), 64 if "swin" in name else net.pretrained_cfg["input_size"][-1]
    assert {n for n, _ in net.named_buffers()} == {n for n, _ in back.named_buffers()}
    x = torch.randn(1, 3, size, size)
    for depth in ("super", "base"):
        with adn.at_depth(net, depth), adn.at_depth(back, depth), torch.inference_mode():
            assert torch.equal(net.eval()(x), back.eval()(x))


def test_a_model_that_asks_for_the_version_of_what_it_loads(tmp_path: Path) -> None:
    net = adn.convert(build("tv_mnasnet0_5", num_classes=5))
    save(net, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", build("tv_mnasnet0_5", num_classes=5))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    adn.load_weights(again, net.state_dict())


def test_a_wrapped_net(tmp_path: Path) -> None:
    net = small_net()
    wrapper = nn.Module()
    wrapper.module = net  # what DistributedDataParallel looks like
    save(wrapper, tmp_path / "net.safetensors")
    assert same_outputs(net, load(tmp_path / "net.safetensors"))


# ------------------------------------------------------------------------------------------- where the model comes from


def test_a_timm_model_converted_by_hand_needs_no_model(tmp_path: Path) -> None:
    net = adn.convert(build("resnet18", num_classes=7))
    save(net, tmp_path / "net.safetensors")
    assert read_metadata(tmp_path / "net.safetensors")["origin"] == {
        "name": "anydepth_resnet18", "kwargs": {"num_classes": 7}}
    assert same_outputs(net, load(tmp_path / "net.safetensors"))


def test_another_head_is_noticed(tmp_path: Path) -> None:
    net = small_net()
    net.reset_classifier(9)
    save(net, tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors").num_classes == 9


@pytest.mark.parametrize(
    ("what", "build_again"),
    [
        ("torchvision", lambda: torchvision.models.resnet18(num_classes=3)),
        # Same names and shapes as plain resnet18, another function: the name alone must not be trusted.
        ("altered timm", lambda: timm.create_model("resnet18", num_classes=3, act_layer=nn.SiLU)),
        ("altered pooling", lambda: timm.create_model("resnet18", num_classes=3, global_pool="max")),
        ("altered tokens", lambda: timm.create_model("test_vit", global_pool="")),
        ("altered widths", lambda: timm.create_model("resnet18", **SMALL)),
        ("features", lambda: timm.create_model("resnet18", features_only=True)),
    ],
)
def test_other_models_must_be_passed(tmp_path: Path, what: str, build_again) -> None:
    path = tmp_path / "net.safetensors"
    net = adn.convert(randomise(build_again()))
    save(net, path)
    assert read_metadata(path)["origin"] is None
    with pytest.raises(adn.CheckpointError, match=r"pass it, adn.load\(path, model="):
        load(path)
    model = build_again()
    back = load(path, model)
    assert back is model
    for name, tensor in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    if what != "features":
        assert same_outputs(net, back, (1, 3, 160, 160) if "tokens" in what else (2, 3, 33, 33))


def test_arguments_json_cannot_hold(tmp_path: Path) -> None:
    net = create_model("anydepth_resnet18", act_layer=nn.SiLU, **SMALL)
    save(net, tmp_path / "net.safetensors")  # a training run must not end here
    with pytest.raises(adn.CheckpointError, match="model="):
        load(tmp_path / "net.safetensors")
    load(tmp_path / "net.safetensors", timm.create_model("resnet18", act_layer=nn.SiLU, **SMALL))


def test_a_model_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "net.safetensors")
    model = timm.create_model("resnet18", num_classes=4, channels=SMALL["channels"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(adn.CheckpointError, match=r"fc.bias is \(5,\) in the file, \(4,\) in the net"):
        load(tmp_path / "net.safetensors", model)
    assert not isinstance(model.layer1[0].bn1, Swapped)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(adn.ConversionError):
        load(tmp_path / "net.safetensors", timm.create_model("test_vit"))
    with pytest.raises(adn.ConversionError, match="already"):
        load(tmp_path / "net.safetensors", small_net())


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_arguments(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="not any-depth"):
        save(timm.create_model("resnet18", **SMALL), path)
    with pytest.raises(ValueError, match="2 class names for a net of 5 classes"):
        save(small_net(), path, class_names=["a", "b"])
    with pytest.raises(ValueError, match="JSON"):
        save(small_net(), path, extra={"net": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 1000, -7])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "net.safetensors"
    save(small_net(), path)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (load, read_metadata):
        with pytest.raises(adn.CheckpointError, match="cut short"):
            read(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    with pytest.raises(adn.CheckpointError, match="folder"):
        load(tmp_path)
    for name in ("last.pt", "best.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(adn.CheckpointError, match=r"--resume needs, not a net; the net is in best\.safetensors beside"):
        load(tmp_path / "last.pt")
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(adn.CheckpointError, match="no safetensors file"):
        load(page)
    pickled = tmp_path / "net.pth"
    torch.save(small_net().state_dict(), pickled)
    with pytest.raises(adn.CheckpointError, match="load_weights"):
        load(pickled)
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, plain)
    with pytest.raises(adn.CheckpointError, match="load_weights"):
        load(plain)


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    """The same file with other metadata or tensors; a change to None removes a field."""
    metadata = {k: v for k, v in {**read_metadata(path), **changes}.items() if k not in changes or v is not None}
    tensors = tensors or safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"adn": json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "adn": "9.9"}, "written by adn 9.9 in format 2.*upgrade"),
        ({"format": "one"}, "cannot be read"),
        ({"plan": None}, "cannot be read.*plan"),
        ({"plan": {"stages": [{"nome": "a"}], "family": "x"}}, "cannot be read"),
        ({"depth": None}, "cannot be read.*depth"),
        ({"origin": {"name": "anydepth_resnet9000", "kwargs": {}}}, "cannot be built.*model="),
        ({"origin": {"name": "anydepth_resnet18", "kwargs": {"colour": "red"}}}, "cannot be built.*model="),
        ({"origin": {"name": "hf-hub:someone/something", "kwargs": {}}}, "cannot be built.*has no model"),
        ({"origin": {"name": "anydepth_resnet18", "kwargs": {"checkpoint_path": "x"}}}, "where weights come from"),
        ({"origin": {"name": "anydepth_resnet18", "kwargs": {}}}, "does not fit this ResNet: .*and .* more"),
    ],
)
def test_bad_descriptions(tmp_path: Path, changes: dict, message: str) -> None:
    save(small_net(), tmp_path / "net.safetensors")
    path = rewritten(tmp_path / "net.safetensors", **changes)
    with pytest.raises(adn.CheckpointError, match=message):
        load(path)


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(small_net(), path)
    tensors = safetensors.torch.load_file(path)
    tensors["fc.wait"] = tensors.pop("fc.weight")
    rewritten(path, tensors)
    with pytest.raises(adn.CheckpointError, match=r"fc.wait is not in the net; fc.weight is not in the file"):
        load(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"adn": "{"})
    with pytest.raises(adn.CheckpointError, match="cannot be read"):
        load(path)


# -------------------------------------------------------------------------------------------------------------- disks


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "one"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as temporary:  # noqa: PT012
            temporary.write_text("two")
            raise error
        assert path.read_text() == "one"
        assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, path = small_net(), tmp_path / "net.safetensors"
    save(net, path)
    former = path.read_bytes()

    def full(_tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(filename))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*net.safetensors: No space left on device") as error:
        save(net, path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_system_keeps_the_former_file(tmp_path: Path) -> None:
    """No pretence: the system refuses to write more than 64 KiB."""
    path = tmp_path / "net.safetensors"
    save(small_net(), path)
    former = path.read_bytes()
    assert len(former) > 2**16
    script = (
        "import resource, sys, adn\nfrom adn.weights.checkpoint import load, save\n"
        "net = load(sys.argv[1])\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "try:\n    save(net, sys.argv[1])\nexcept OSError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert f"cannot write {path}: File too large" in run.stdout, run.stderr
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    with pytest.raises(FileNotFoundError, match=r"cannot write .*No such file or directory"):
        save(net, tmp_path / "missing" / "net.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write"):
        save(net, tmp_path / "file" / "net.safetensors")
    with pytest.raises(IsADirectoryError, match="cannot write"):
        save(net, tmp_path)

    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)  # tests may run as root, whom no folder refuses
    with pytest.raises(PermissionError, match=r"cannot write .*net\.safetensors: Permission denied"):
        save(net, tmp_path / "net.safetensors")


def quantised_by_torch(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8, inplace=True)


def quantised_by_torchao(net: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


@pytest.mark.parametrize("quantise", [quantised_by_torch, quantised_by_torchao])
def test_quantised_nets_run_at_every_depth_and_are_not_written(quantise, tmp_path: Path) -> None:
    net = adn.convert(build("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=6)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = {depth: at(net, depth, x) for depth in adn.depths(net)}
        quantise(net)
        for depth, y in expected.items():
            found = at(net, depth, x)
            assert F.cosine_similarity(found, y).min() > 0.99, depth
            assert not torch.equal(found, y)
    file = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="save the net before it is quantised"):
        save(net, file)
    assert not file.exists()


def at(net: nn.Module, depth: adn.Depth, x: torch.Tensor) -> torch.Tensor:
    with adn.at_depth(net, depth):
        return net(x)
