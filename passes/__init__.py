"""The built-in rewrites, one file each, written against fxopt's public names only, as anybody's plugin would be.

`PASSES` is the default pipeline in its order.
"""

from __future__ import annotations

from fxopt import Pass

from .allocate_buffers import PASS as ALLOCATE_BUFFERS
from .drop_identities import PASS as DROP_IDENTITIES
from .eliminate_concat import PASS as ELIMINATE_CONCAT
from .eliminate_dead_code import PASS as ELIMINATE_DEAD_CODE
from .fold_affine import PASS as FOLD_AFFINE
from .fold_batchnorm import PASS as FOLD_BATCHNORM
from .fuse_conv_activation import PASS as FUSE_CONV_ACTIVATION
from .fuse_linear_activation import PASS as FUSE_LINEAR_ACTIVATION
from .merge_siblings import PASS as MERGE_SIBLINGS

PASSES: tuple[Pass, ...] = (
    DROP_IDENTITIES,  # first: a dropout between two layers hides them from every pattern
    FOLD_AFFINE,  # before norms are folded: a constant between a layer and its norm keeps them apart
    FOLD_BATCHNORM,  # before fusion: a norm stands between a convolution and its activation
    FUSE_CONV_ACTIVATION,  # after folding: the activation now reads the convolution itself
    FUSE_LINEAR_ACTIVATION,
    MERGE_SIBLINGS,  # after fusion: siblings have their activations with them, and the wide layer has one for all
    ELIMINATE_CONCAT,  # after merging: the parts of a concat are then pieces of one wide layer
    ELIMINATE_DEAD_CODE,  # what the others left unread
    ALLOCATE_BUFFERS,  # last: who owns which memory is settled when no value comes or goes any more
)
