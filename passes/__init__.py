"""The built-in rewrites, one file each, written against fxopt's public names only, as anybody's plugin would be.

`PASSES` is the default pipeline in order. An inner tuple is a group: one rewrite opens the way for another, so that it
is repeated until none of its passes rewrites anything (RepVGG: fold, then merge; GoogLeNet: fold, fuse, merge, concat).
"""

from __future__ import annotations

from fxopt import Pass

from .allocate_buffers import PASS as ALLOCATE_BUFFERS
from .cancel_casts import PASS as CANCEL_CASTS
from .cancel_transposes import PASS as CANCEL_TRANSPOSES
from .drop_identities import PASS as DROP_IDENTITIES
from .eliminate_common_subexpressions import PASS as ELIMINATE_COMMON_SUBEXPRESSIONS
from .eliminate_concat import PASS as ELIMINATE_CONCAT
from .eliminate_dead_code import PASS as ELIMINATE_DEAD_CODE
from .fold_affine import PASS as FOLD_AFFINE
from .fold_batchnorm import PASS as FOLD_BATCHNORM
from .fold_constants import PASS as FOLD_CONSTANTS
from .fold_padding import PASS as FOLD_PADDING
from .fuse_attention import PASS as FUSE_ATTENTION
from .fuse_conv_activation import PASS as FUSE_CONV_ACTIVATION
from .fuse_linear_activation import PASS as FUSE_LINEAR_ACTIVATION
from .fuse_normalisation import PASS as FUSE_NORMALISATION
from .merge_parallel_branches import PASS as MERGE_PARALLEL_BRANCHES
from .merge_siblings import PASS as MERGE_SIBLINGS
from .recognise_activations import PASS as RECOGNISE_ACTIVATIONS
from .simplify_activations import PASS as SIMPLIFY_ACTIVATIONS
from .simplify_shapes import PASS as SIMPLIFY_SHAPES
from .spell_linear import PASS as SPELL_LINEAR

PASSES: tuple[Pass | tuple[Pass, ...], ...] = (
    (
        ELIMINATE_DEAD_CODE,  # first: a reader that nobody reads would keep its operands from every fold
        DROP_IDENTITIES,  # a dropout between two layers hides them from every pattern
        CANCEL_CASTS,  # so does a cast that is taken back
        SIMPLIFY_SHAPES,  # two moves in a row hide from a pattern what one would show
        CANCEL_TRANSPOSES,  # behind shapes: a reshape that does nothing keeps two transposes apart
        ELIMINATE_COMMON_SUBEXPRESSIONS,  # a ReLU that is computed twice makes two readers of a layer
        SPELL_LINEAR,  # before anything looks for linear layers
        FOLD_CONSTANTS,  # before what asks for constants: a standardised weight, a reshaped scale become one
        SIMPLIFY_ACTIVATIONS,  # before fusion, which takes one activation behind a layer
        RECOGNISE_ACTIVATIONS,  # before affine folds: the 3 and 6 of a hardswish would move into the layers beside it
        FUSE_NORMALISATION,  # before affine folds, which would take a norm's own weight into the layer behind it
        FOLD_PADDING,  # before other folds: padding between a norm and a convolution keeps them apart
        FOLD_AFFINE,  # before norms are folded: a constant between a layer and its norm keeps them apart
        FOLD_BATCHNORM,  # before fusion: a norm stands between a convolution and its activation
        FUSE_ATTENTION,  # behind affine folds: a scale behind the projection of q is in its weight
        MERGE_PARALLEL_BRANCHES,  # after folding: each branch has its norm with it; before fusion, which takes sums
        FUSE_CONV_ACTIVATION,  # after folding: the activation now reads the convolution itself
        FUSE_LINEAR_ACTIVATION,
        MERGE_SIBLINGS,  # after fusion: siblings have their activations with them, and the wide layer one for all
        ELIMINATE_CONCAT,  # after merging: the parts of a concat are then pieces of one wide layer
    ),
    ALLOCATE_BUFFERS,  # last: who owns which memory is settled when no value comes or goes any more
)
