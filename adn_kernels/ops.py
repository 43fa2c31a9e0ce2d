"""All ops under one roof: `from adn_kernels import ops`, then `ops.conv(...)`.

Each is documented where it is defined, in the module of its name. (The package itself exports modules, not functions:
`adn_kernels.conv` is the file.)
"""

from .activation import ACTIVATIONS
from .batch_norm import batch_norm
from .batch_norm_eval import batch_norm_eval
from .conv import conv, conv_, fold, lay_out
from .deformable_attention import deformable_attention
from .epilogue import fold_norm
from .layer_norm import layer_norm, layer_norm_
from .linear import linear_

__all__ = [
    "ACTIVATIONS",
    "batch_norm",
    "batch_norm_eval",
    "conv",
    "conv_",
    "deformable_attention",
    "fold",
    "fold_norm",
    "lay_out",
    "layer_norm",
    "layer_norm_",
    "linear_",
]
