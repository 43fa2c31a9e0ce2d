"""All ops under one roof: `from adn_kernels import ops`, then `ops.conv1x1(...)`.

Each is documented where it is defined, in the module of its name. (The package itself exports modules, not functions:
`adn_kernels.conv1x1` is the file.)
"""

from .activation import ACTIVATIONS
from .batch_norm import batch_norm
from .batch_norm_eval import batch_norm_eval, batch_norm_eval_
from .conv import conv, conv_, cudnn_conv, fold
from .conv1x1 import conv1x1, conv1x1_, linear, linear_
from .conv3x3 import conv3x3, conv3x3_
from .deformable_attention import deformable_attention
from .depthwise import depthwise, depthwise_, tap_major
from .epilogue import fold_norm
from .layer_norm import layer_norm, layer_norm_

__all__ = [
    "ACTIVATIONS",
    "batch_norm",
    "batch_norm_eval",
    "batch_norm_eval_",
    "conv",
    "conv1x1",
    "conv1x1_",
    "conv3x3",
    "conv3x3_",
    "conv_",
    "cudnn_conv",
    "deformable_attention",
    "depthwise",
    "depthwise_",
    "fold",
    "fold_norm",
    "layer_norm",
    "layer_norm_",
    "linear",
    "linear_",
    "tap_major",
]
