"""The built-in rewrites, one file each, written against fxopt's public names only, as anybody's plugin would be.

`PASSES` is the default pipeline in its order.
"""

from __future__ import annotations

from fxopt import Pass

from .cancel_transposes import PASS as CANCEL_TRANSPOSES
from .drop_identities import PASS as DROP_IDENTITIES
from .eliminate_dead_code import PASS as ELIMINATE_DEAD_CODE
from .fold_affine import PASS as FOLD_AFFINE
from .fold_batchnorm import PASS as FOLD_BATCHNORM
from .fuse_conv_activation import PASS as FUSE_CONV_ACTIVATION
from .fuse_linear_activation import PASS as FUSE_LINEAR_ACTIVATION
from .simplify_shapes import PASS as SIMPLIFY_SHAPES
from .spell_linear import PASS as SPELL_LINEAR

PASSES: tuple[Pass, ...] = (
    DROP_IDENTITIES,  # first: a dropout between two layers hides them from every pattern
    SIMPLIFY_SHAPES,  # early: two moves in a row hide from a pattern what one would show
    CANCEL_TRANSPOSES,  # behind shapes: a reshape that does nothing keeps two transposes apart
    SPELL_LINEAR,  # before anything looks for linear layers
    FOLD_AFFINE,  # before norms are folded: a constant between a layer and its norm keeps them apart
    FOLD_BATCHNORM,  # before fusion: a norm stands between a convolution and its activation
    FUSE_CONV_ACTIVATION,  # after folding: the activation now reads the convolution itself
    FUSE_LINEAR_ACTIVATION,
    ELIMINATE_DEAD_CODE,  # last: what the others left unread
)
