"""Images and what is true of them: folders and named data sets, COCO directories, scenes of digits, and how images are
prepared."""

from .images import (
    UNREADABLE,
    ImageData,
    ImageStream,
    collate,
    data_config,
    eval_transform,
    open_dataset,
    to_rgb,
    upright,
)

__all__ = [
    "UNREADABLE", "ImageData", "ImageStream", "collate", "data_config", "eval_transform", "open_dataset", "to_rgb",
    "upright",
]
