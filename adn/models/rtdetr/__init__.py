"""RT-DETR and AnyDepth-DETR: the model, its stages, its losses, its presets. Nothing outside knows what is in its
output but through the task."""

STRIDE = 32  # of the coarsest map: sides of images are multiples of it
