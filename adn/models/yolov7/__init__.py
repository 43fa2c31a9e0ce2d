"""YOLOv7 (Wang et al., CVPR 2023), and the links that make two of them a cascade (DynamicDet, Lin et al., CVPR 2023).
Written from descriptions of what the published implementations compute, without their code."""
