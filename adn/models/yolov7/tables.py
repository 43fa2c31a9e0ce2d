"""The layers of the three YOLOv7, as published."""

from __future__ import annotations

from typing import NamedTuple


class Elan(NamedTuple):
    """Two 1x1 convolutions, a chain of 3x3 ones after the second, and a 1x1 one of what is kept of all these.

    Attributes:
        hidden: channels of the first two.
        chain: those of the 3x3 ones.
        outputs: those of the last.
        convs: how many are in the chain.
        every: how many of them it takes until one is kept, counted from the end.
    """

    hidden: int
    chain: int
    outputs: int
    convs: int = 4
    every: int = 2


def e4(hidden: int, outputs: int) -> Elan:
    return Elan(hidden, hidden, outputs)


def e6(hidden: int, outputs: int) -> Elan:
    return Elan(hidden, hidden, outputs, convs=6)


def eh(hidden: int, chain: int, outputs: int) -> Elan:
    return Elan(hidden, chain, outputs, every=1)


class Table(NamedTuple):
    """One of the published tables; all channels as published.

    Attributes:
        stem: channels and strides of the first convolutions.
        stages: of the backbone: channels of what halves the size, and a block.
        pyramid: channels of the pooling on top.
        top_down, bottom_up: blocks of the neck, the latter with channels of what halves the size.
        ends: channels of what the boxes are made from, of the map of stride 8 first.
        anchors: of each of these maps, width and height of three boxes in pixels.
        reorg: the stem reads a pixel and its neighbours as channels.
        pooled: after the first stage, what halves the size is a `Part.down`; else always a convolution.
        rep: the ends are made by a `Rep` each, not by a convolution.
        crossed: of two detectors in a cascade, the second one's first `Part.down` has a convolution that reads the
            second map of the first detector: an index of the published model was wrong, and it was trained like that.
    """

    stem: tuple[tuple[int, int], ...]
    stages: tuple[tuple[int, Elan], ...]
    pyramid: int
    top_down: tuple[Elan, ...]
    bottom_up: tuple[tuple[int, Elan], ...]
    ends: tuple[int, ...]
    anchors: tuple[tuple[int, ...], ...]
    reorg: bool = False
    pooled: bool = True
    rep: bool = False
    crossed: bool = False


_ANCHORS = ((12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401))

TABLES = {
    "yolov7": Table(
        stem=((32, 1), (64, 2), (64, 1)),
        stages=((128, e4(64, 256)), (128, e4(128, 512)), (256, e4(256, 1024)), (512, e4(256, 1024))),
        pyramid=512, top_down=(eh(256, 128, 256), eh(128, 64, 128)),
        bottom_up=((128, eh(256, 128, 256)), (256, eh(512, 256, 512))),
        ends=(256, 512, 1024), anchors=_ANCHORS, rep=True),
    "yolov7x": Table(
        stem=((40, 1), (80, 2), (80, 1)),
        stages=((160, e6(64, 320)), (160, e6(128, 640)), (320, e6(256, 1280)), (640, e6(256, 1280))),
        pyramid=640, top_down=(e6(256, 320), e6(128, 160)),
        bottom_up=((160, e6(256, 320)), (320, e6(512, 640))),
        ends=(320, 640, 1280), anchors=_ANCHORS, crossed=True),
    "yolov7_w6": Table(
        stem=((64, 1),), reorg=True, pooled=False,
        stages=((128, e4(64, 128)), (256, e4(128, 256)), (512, e4(256, 512)), (768, e4(384, 768)),
                (1024, e4(512, 1024))),
        pyramid=512, top_down=(eh(384, 192, 384), eh(256, 128, 256), eh(128, 64, 128)),
        bottom_up=((256, eh(256, 128, 256)), (384, eh(384, 192, 384)), (512, eh(512, 256, 512))),
        ends=(256, 512, 768, 1024),
        anchors=((19, 27, 44, 40, 38, 94), (96, 68, 86, 152, 180, 137), (140, 301, 303, 264, 238, 542),
                 (436, 615, 739, 380, 925, 792))),
}
