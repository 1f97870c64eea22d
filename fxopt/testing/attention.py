"""What programs are made of, last part: attention and norms as they are written out, gates. Most of it rounds."""

from __future__ import annotations

from fxopt.testing.builder import Builder
from fxopt.testing.layers import activate, convolve, project


def attention(b: Builder) -> None:
    """softmax(q k^T * scale + mask) v over one or two heads, in one of its spellings."""
    rows = [name for name, value in b.values.items() if value.is_floating_point() and value.dim() == 3]
    source = b.real(3) if rows else b.let(f"{b.real(4)}.flatten(2).transpose(1, 2)")
    tokens = b.size(source, 1)
    q, k, v = (project(b, source, 4) for _ in range(3))
    heads = b.pick((1, 2))
    if heads > 1:
        form = f"{{0}}.view({source}.shape[0], {tokens}, 2, 2).transpose(1, 2)"
        q, k, v = (b.let(form.format(name)) for name in (q, k, v))
    scale = b.pick(("{0} * 0.5", "{0} / 2.0", "{0}", "{0} * 2 ** -0.5", "0.25 * {0}", "{0} * -1"))
    if b.pick((False, True)):
        q, scale = b.let(scale.format(q)), "{0}"
    weights = b.let(_weights(b, b.let(scale.format(f"({_product(b, q, k, heads)})")), tokens))
    if b.pick((False, False, True)):
        weights = b.let(f"F.dropout({weights}, 0.1, training=False)")
    letters = "bh"[:heads]
    together = b.pick((f"{weights} @ {v}", f"torch.matmul({weights}, {v})",
                       f"torch.einsum('{letters}nm,{letters}md->{letters}nd', {weights}, {v})"))  # fmt: skip
    result = b.let(together)
    if heads > 1:
        result = b.let(f"{result}.transpose(1, 2).reshape({source}.shape[0], {tokens}, 4)")
    project(b, result, b.size(source, -1))


def _product(b: Builder, q: str, k: str, heads: int) -> str:
    """q k^T, as one of its operators."""
    letters = "bh"[:heads]
    forms = [f"{q} @ {k}.transpose(-2, -1)", f"torch.matmul({q}, {k}.mT)",
             f"torch.einsum('{letters}nd,{letters}md->{letters}nm', {q}, {k})"]  # fmt: skip
    if heads == 1:
        tokens = b.size(q, 1)
        forms += [f"torch.bmm({q}, {k}.transpose(1, 2))", f"torch.einsum('bnd,bmd->bmn', {k}, {q})"]
        bias = f"{b.layer(f'numbers(1, {tokens}, {tokens}{b.typed(q)})')}.expand({q}.shape[0], -1, -1)"
        forms += [f"torch.baddbmm({bias}, {q}, {k}.transpose(1, 2), beta={b.pick((1, 0))}, alpha={b.pick((0.5, 1))})"]
    return b.pick(forms)


def _weights(b: Builder, scores: str, tokens: int) -> str:
    """The softmax of scores with a mask or none."""
    lower = f"torch.ones({tokens}, {tokens}).tril().bool()"
    typed = b.typed(scores)
    match b.pick(("none", "none", "bias", "causal", "low", "per query", "per key", "two", "from the input")):
        case "bias":
            scores = b.let(f"{scores} + {b.layer(f'numbers({tokens}, {tokens}{typed})')}")
        case "causal":
            scores = f"{scores}.masked_fill({b.layer(lower)}.logical_not(), float('-inf'))"
        case "low":
            scores = b.let(f"torch.where({b.layer(lower)}, {scores}, -1e3)")
        case "per query":
            scores = b.let(f"{scores} * {b.layer(f'numbers({tokens}, 1{typed})')}")
        case "per key":
            keep = b.layer(f"integers(2, {tokens}).bool()")
            scores = b.let(f"{scores} + ({keep}.logical_not()) * {b.pick(('-1e3', '-1e4', '-2.0'))}")
        case "two":
            scores = b.let(f"{scores} + {b.layer(f'numbers({tokens}{typed})')}")
            scores = b.let(f"{scores} + {b.layer(f'numbers({tokens}, {tokens}{typed})')}")
        case "from the input":
            scores = b.let(f"{scores} + {b.like(scores)}")
    return b.pick(("F.softmax({0}, -1)", "{0}.softmax(dim=-1)", "F.softmax({0}, -1, dtype={0}.dtype)")).format(scores)


def squeeze_excite(b: Builder) -> None:
    """An image times a gate per channel."""
    source = b.real(4)
    channels = b.size(source, 1)
    pooled = b.let(f"{source}.mean((2, 3), keepdim=True)")
    gate = convolve(b, b.let(f"torch.relu({convolve(b, pooled, 2, 1, groups=1)})"), channels, 1, groups=1)
    b.let(f"{source} * torch.sigmoid({gate})" if not b.exact else f"{source} * {gate}.clamp(0, 1)")


def hand_written_norm(b: Builder) -> None:
    """A layer norm or RMS norm written out, with an affine or without, over the last dimension or others."""
    source = b.real()
    keep = f"{b.pick(('-1', '-1', '-1', f'{b.rank(source) - 1}', '1', '(-2, -1)'))}, keepdim=True"
    match b.pick(("layer", "layer var_mean", "rms", "rms sqrt")):
        case "layer":
            mean = b.let(f"{source}.mean({keep})")
            unbiased = b.pick(("unbiased=False", "correction=0", "unbiased=True"))
            var = b.pick((f"{source}.var({keep}, {unbiased})", f"(({source} - {mean}) ** 2).mean({keep})"))
            form = b.pick(("({0} - {1}) / torch.sqrt({2} + 1e-5)", "({0} - {1}) * torch.rsqrt({2} + 1e-5)"))
            result = b.let(form.format(source, mean, b.let(var)))
        case "layer var_mean":
            centred = b.let(f"{source} - {source}.mean({keep})")
            result = b.let(f"{centred} * ({centred}.pow(2).mean({keep}) + 1e-6).rsqrt()")
        case "rms":
            result = b.let(f"{source} * torch.rsqrt({source}.pow(2).mean({keep}) + 1e-6)")
        case _:
            result = b.let(f"{source} / torch.sqrt(({source} * {source}).mean({keep}) + 1e-6)")
    last, typed = b.size(source, -1), b.typed(source)
    if b.pick((False, True)):
        result = b.let(f"{result} * {b.layer(f'nn.Parameter(numbers({last}{typed}))')}")
        if b.pick((False, True)):
            b.let(f"{result} + {b.layer(f'nn.Parameter(numbers({last}{typed}))')}")


def gate(b: Builder) -> None:
    """Half of a layer's result times an activation of the other half."""
    source = b.real()
    left, right = b.lets(f"{project(b, source, 8)}.chunk(2, -1)", 2)
    b.let(f"{left} * {activate(b, right)}")


#: Words of exact numbers, then those whose numbers round, each with how often it is drawn.
WORDS = ((squeeze_excite, 1), (gate, 1))
INEXACT_WORDS = ((attention, 5), (hand_written_norm, 3))
