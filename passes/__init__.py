"""The built-in rewrites, one file each, written against fxopt's public names only, as anybody's plugin would be.

`PASSES` is the default pipeline in its order.
"""

from __future__ import annotations

from fxopt import Pass

from .cancel_casts import PASS as CANCEL_CASTS
from .drop_identities import PASS as DROP_IDENTITIES
from .eliminate_dead_code import PASS as ELIMINATE_DEAD_CODE
from .fold_affine import PASS as FOLD_AFFINE
from .fold_batchnorm import PASS as FOLD_BATCHNORM
from .fuse_conv_activation import PASS as FUSE_CONV_ACTIVATION
from .fuse_linear_activation import PASS as FUSE_LINEAR_ACTIVATION
from .fuse_normalisation import PASS as FUSE_NORMALISATION
from .recognise_activations import PASS as RECOGNISE_ACTIVATIONS
from .simplify_activations import PASS as SIMPLIFY_ACTIVATIONS

PASSES: tuple[Pass, ...] = (
    DROP_IDENTITIES,  # first: a dropout between two layers hides them from every pattern
    CANCEL_CASTS,  # so does a cast that is taken back
    SIMPLIFY_ACTIVATIONS,  # before fusion, which takes one activation behind a layer
    RECOGNISE_ACTIVATIONS,  # before constants fold: the 3 and 6 of a hardswish would move into the layers beside it
    FUSE_NORMALISATION,  # before constants fold, which would take a norm's own weight into the layer behind it
    FOLD_AFFINE,  # before norms are folded: a constant between a layer and its norm keeps them apart
    FOLD_BATCHNORM,  # before fusion: a norm stands between a convolution and its activation
    FUSE_CONV_ACTIVATION,  # after folding: the activation now reads the convolution itself
    FUSE_LINEAR_ACTIVATION,
    ELIMINATE_DEAD_CODE,  # last: what the others left unread
)
