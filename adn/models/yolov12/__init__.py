"""YOLOv12 (Tian et al., 2025, arXiv:2502.12524), which `adn.convert` makes AnyDepth-YOLO. Written from descriptions of
what the published implementations compute, without their code."""

STRIDE = 32
