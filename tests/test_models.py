"""Models by name."""

from __future__ import annotations

import pytest
import timm
import torch

import adn
from adn.core.state import state_of
from adn.models.registry import build_source, create_model, list_models


def test_list_models_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_a, **_k: pytest.fail("built a model"))
    names = list_models()
    assert len(names) == len(set(names)) > 400
    assert {"anydepth_resnet50", "anydepth_mobilenetv2_100", "anydepth_vit_base_patch16_224",
            "anydepth_swin_tiny_patch4_window7_224", "anydepth_convnext_tiny", "anydepth_regnety_004"} <= set(names)
    assert not {"anydepth_vgg16", "anydepth_lcnet_050"} & set(names)
    assert "anydepth_seresnet50" in list_models("*resnet50")
    assert all(name.endswith("resnet50") for name in list_models("*resnet50"))
    assert list_models("resnet*") == []


def test_create_model_converts_and_remembers() -> None:
    net = create_model("anydepth_resnet18", num_classes=7, channels=(8, 16, 24, 32), drop_path_rate=0.1).eval()
    assert [str(d) for d in adn.depths(net)][-1] == "TTTT"
    assert net(torch.randn(2, 3, 33, 33)).shape == (2, 7)
    assert state_of(net).origin == {
        "name": "anydepth_resnet18",
        "kwargs": {"num_classes": 7, "channels": (8, 16, 24, 32), "drop_path_rate": 0.1},
    }
    assert state_of(net).twins == "copy"
    assert state_of(create_model("anydepth_test_vit", twins="fresh")).twins == "fresh"


def test_a_tag_of_timm_is_part_of_the_name() -> None:
    net = create_model("anydepth_test_vit.r160_in1k")
    assert net.pretrained_cfg["tag"] == "r160_in1k"
    with pytest.raises(ValueError, match=r"nonsense.*r160_in1k"):
        create_model("anydepth_test_vit.nonsense")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "pass 'anydepth_resnet50'"),
        ("resnet50.a1_in1k", "pass 'anydepth_resnet50.a1_in1k'"),
        ("anydepth_resnet51", "did you mean anydepth_resnet5"),
        ("anydepth_vgg16", "pass adn.convert a plan"),
        ("anydepth_resnet10t", "adn.list_models"),
        ("anydepth_hf-hub:someone/something", "adn.list_models"),
        ("", "adn.list_models"),
        (None, "adn.list_models"),
    ],
)
def test_unknown_names(name: object, message: str) -> None:
    with pytest.raises(ValueError, match="unknown model") as error:
        create_model(name)
    assert message in str(error.value)


def test_without_a_connection_it_is_said_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, pretrained: bool, **__: object) -> None:
        raise FileNotFoundError("Please check your connection" if pretrained else "something else")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(OSError, match=r"timm's weights of resnet18 .*check your connection.*adn train --weights"):
        create_model("anydepth_resnet18", pretrained=True)
    with pytest.raises(FileNotFoundError, match="something else"):
        create_model("anydepth_resnet18")


@pytest.mark.parametrize("name", ["anydepth_hf-hub:a/b", "hf_hub:a/resnet50", "local-dir:/etc", "nothing"])
def test_rebuilding_fetches_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="has no model"):
        build_source(name, {})


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_rebuilding_reads_no_other_weights(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        build_source("anydepth_test_vit", {argument: "x"})
