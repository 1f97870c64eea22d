"""The hypothesis strategy of whole networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fxopt.errors import UsageError
from fxopt.testing import attention, branches, layers, moves
from fxopt.testing.builder import Builder, Unfit
from fxopt.testing.network import Network

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Word = Callable[[Builder], None]

SHAPES = ((2, 4, 4, 4), (2, 4, 6, 4), (2, 6, 4), (3, 4), (4, 4, 4, 4), (3, 4, 5, 4), (2, 4, 4), (1, 4, 4, 4),
          (2, 2, 5, 3), (2, 8, 2, 2))  # fmt: skip
STRUCTURES = ("{0}", "{0}", "{0}, {1}", "{{'a': {0}, 'b': {1}}}", "({0}, [{1}, {2}])", "{0}, {1}, {2}",
              "{{'a': ({0}, {1}), 'b': None}}", "[{0}]")  # fmt: skip
#: Bytes for one word's choices.
CHOICES = 32


def words(*, exact: bool, writes: bool) -> list[Word]:
    """Each word as often as it is to be drawn, the simplest first."""
    drawn = [*layers.WORDS, *branches.WORDS, *moves.WORDS, *attention.WORDS]
    drawn += [] if exact else attention.INEXACT_WORDS
    drawn += moves.WRITES if writes else []
    return [word for word, often in drawn for _ in range(often)]


def build(
    steps: list[tuple[Word, bytes]], shape: tuple[int, ...], results: bytes, seed: int, *, exact: bool
) -> Network:
    """The network of some words, each with its choices."""
    builder = Builder(shape, seed, exact=exact)
    for word, choices in steps:
        builder.take(word, choices)
    builder.choose(results)
    structure, prune = builder.pick(STRUCTURES), builder.pick((True, True, False))
    last = list(builder.values)[-1]
    handed_out = [last if builder.pick((True, True, True, False)) else builder.any(), builder.any(), builder.any()]
    return builder.network(handed_out, structure, prune=prune)


def networks(*, exact: bool = False, writes: bool = True, max_steps: int = 8) -> SearchStrategy[Network]:
    """Whole networks in eval mode, each with an input of its own: `Network.example_inputs()`.

    They have branches, residuals, concats, splits, views, shared and tied layers, several dtypes, attention, and with
    `writes` in-place operations, and hand out any of their values, in any structure. `max_steps` is how many words (a
    layer, a block, an attention) make one at most. With `exact`, arithmetic on their numbers does not round in float64,
    so that rewrites that are exact in exact arithmetic must give `torch.equal` results.

    Raises UsageError where hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise UsageError(
            "fxopt.testing.networks draws by hypothesis, which is not installed", hint="pip install hypothesis"
        ) from error

    @st.composite
    def drawn(draw: Any) -> Network:
        choices = st.binary(min_size=CHOICES, max_size=CHOICES)
        step = st.tuples(st.sampled_from(words(exact=exact, writes=writes)), choices)
        steps = draw(st.lists(step, min_size=1, max_size=max_steps))
        shape, results = draw(st.sampled_from(SHAPES)), draw(st.binary(min_size=6, max_size=6))
        return build(steps, shape, results, draw(st.integers(0, 2**16)), exact=exact)

    return drawn()


__all__ = ["Network", "Unfit", "build", "networks"]
