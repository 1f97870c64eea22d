"""What programs are made of, second half: sums and concats of values, parts of them, shapes, casts, pooling, attention,
and writes in place."""

from __future__ import annotations

from fxopt.testing.builder import Builder, Unfit
from fxopt.testing.layers import activate, convolve, normalise, project

# -- several values --------------------------------------------------------------------------------------------------


def combination(b: Builder) -> None:
    """Two values as one, elementwise."""
    first = b.any()
    other = b.like(first) if b.pick((True, True, True, False)) else b.any()
    b.let(b.pick(("{0} + {1}", "{0} * {1}", "{0} - {1}", "torch.maximum({0}, {1})", "torch.add({0}, {1}, alpha=0.5)",
                  "{1} + {0}", "torch.where({0} > {1}, {0}, {1})")).format(first, other))  # fmt: skip


def same_again(b: Builder) -> None:
    """An expression that the program has already: a common subexpression, if nothing was written in between."""
    lines = [line for line in b.lines if not line.writes and len(line.names) == 1]
    if not lines:
        raise Unfit
    line = lines[-1 - int((b.pick(range(100)) / 100) ** 2 * len(lines))]
    twin = b.let(line.text.partition(" = ")[2])
    if b.pick((False, True)):
        b.let(f"{line.names[0]} + {twin}")


def concat(b: Builder) -> None:
    """Values joined, the same one perhaps twice, and then something that reads the whole."""
    first = b.any()
    rank, dim = b.rank(first), b.pick((1, -1, 0))
    if dim == 1 and rank < 2:
        raise Unfit
    count = b.pick((2, 2, 3, 4))
    names = [first]
    for _ in range(count - 1):
        shape = list(b.values[first].shape)

        def fits(value: object, shape: list[int] = shape) -> bool:
            found = list(value.shape)  # type: ignore[attr-defined]
            return len(found) == rank and found[:dim] == shape[:dim] and found[dim:][1:] == shape[dim:][1:]

        names.append(b.any(fits))
    if b.pick((True, False)):
        names.reverse()
    joined = b.let(f"torch.cat([{', '.join(names)}], {dim})") if b.pick(range(8)) else b.let(
        f"torch.stack([{', '.join(names)}], {dim})"
    )
    after_concat(b, joined)


def after_concat(b: Builder, joined: str) -> None:
    """What reads a concat."""
    match b.pick(("nothing", "layer", "layer", "elementwise", "pool", "norm", "concat", "constant")):
        case "layer":
            if b.rank(joined) == 4 and b.pick((True, True, False)):
                convolve(b, joined, kernel=b.pick((1, 3)))
            else:
                project(b, joined)
        case "elementwise":
            activate(b, joined)
        case "pool":
            pool(b, joined)
        case "norm":
            normalise(b, joined)
        case "concat":
            b.let(f"torch.cat([{joined}, {joined if b.pick((False, True)) else b.any()}], 1)")
        case "constant":
            b.let(f"{joined} * 2 + 1")


def dense_block(b: Builder) -> None:
    """Layers that each read all before them, joined (DenseNet)."""
    joined = b.real(4)
    for _ in range(b.pick((2, 3))):
        new = convolve(b, joined, 2, b.pick((1, 3)), groups=1)
        if b.pick((False, True)):
            new = activate(b, new)
        joined = b.let(f"torch.cat([{joined}, {new}], 1)")
    after_concat(b, joined)


# -- parts -----------------------------------------------------------------------------------------------------------


def split(b: Builder) -> None:
    """A value in parts, which are joined again (in order or not), added, or left."""
    source = b.any()
    rank = b.rank(source)
    dim = b.pick((1, -1, 0))
    size = b.size(source, dim)
    forms = [f"{source}.chunk(2, {dim})", f"torch.split({source}, {max(1, size // 2)}, {dim})",
             f"torch.split({source}, [1, {size - 1}], {dim})"]  # fmt: skip
    if size < 2:
        raise Unfit
    parts = list(b.lets(b.pick(forms if size != 2 else forms[:2]), 2)) if size % 2 == 0 else list(b.lets(forms[2], 2))
    if b.pick((False, False, True)):
        parts[b.pick((0, 1))] = activate(b, b.pick(parts))
    match b.pick(("join", "join", "swap", "add", "leave")):
        case "join":
            b.let(f"torch.cat([{', '.join(parts)}], {dim if b.pick((True, True, False)) else b.pick(range(rank))})")
        case "swap":
            b.let(f"torch.cat([{parts[1]}, {parts[0]}], {dim})")
        case "add":
            b.let(f"{parts[0]} + {parts[1]}")


def part(b: Builder) -> None:
    """A slice, a selection."""
    source = b.any()
    b.let(b.pick(("{0}[:, :1]", "{0}[:, 0]", "{0}[:, 1:]", "{0}[..., 0]", "{0}[..., ::2]", "{0}[:, -1:]", "{0}[-1]",
                  "{0}.select(1, 0)", "{0}.narrow(1, 0, 1)", "{0}[:, None]", "{0}.unbind(1)[0]", "{0}[:, :1][:, 0]",
                  "{0}[..., 1:-1]", "{0}[:, :2][:, :1]", "{0}[:, 1:][..., 1:]")).format(source))  # fmt: skip


# -- shapes and dtypes -----------------------------------------------------------------------------------------------

_MOVES = (
    "{0}.flatten(1)", "{0}.reshape({0}.shape[0], -1)", "{0}.transpose(1, 2)", "{0}.permute(0, 2, 3, 1)",
    "{0}.permute(0, 3, 1, 2)", "{0}.unsqueeze(1)", "{0}.squeeze(1)", "{0}.unsqueeze(-1)", "{0}.squeeze(-1)",
    "{0}.flatten(2)", "{0}.reshape({0}.shape[0], 2, -1)", "{0}.transpose(-1, -2)", "{0}.contiguous()", "{0}.mT",
    "{0}.reshape({0}.shape[0], -1, 2, 2)", "{0}.flatten(2).transpose(1, 2)", "{0}.flatten(-2)", "{0}.squeeze()",
    "{0}.unflatten(1, (2, -1))", "{0}.movedim(1, -1)", "{0}.permute(0, 2, 1)", "{0}.swapaxes(1, 2)",
    "{0}.view({0}.shape[0], -1)", "{0}.reshape(-1)", "{0}[:1].expand({0}.shape)", "{0}.repeat(1, 2)",
    "{0}.reshape({0}.shape)", "{0}.view({0}.shape[0], {0}.shape[1], -1)", "{0}.flip(1)", "{0}.permute(1, 0)",
)  # fmt: skip


def moves(b: Builder) -> None:
    """A chain of reshapes and transposes."""
    source = b.any()
    for _ in range(b.pick((1, 2, 3, 4))):
        source = b.let(b.pick(_MOVES).format(source))


def there_and_back(b: Builder) -> None:
    """A shape, something elementwise or a layer in it, and the shape that it was."""
    source = b.real(3, 4)
    sizes = list(b.values[source].shape)
    channels_last = (f"{source}.permute(0, 2, 3, 1)", "{0}.permute(0, 3, 1, 2)")
    swapped = (f"{source}.transpose(1, 2)", "{0}.transpose(1, 2)")
    flat = (f"{source}.flatten(1)", f"{{0}}.view({source}.shape[0], {', '.join(map(str, sizes[1:]))})")
    raised = (f"{source}.unsqueeze(2)", "{0}.squeeze(2)")
    there, back = b.pick((channels_last, swapped, flat, raised) if len(sizes) == 4 else (swapped, flat, raised))
    result = b.let(there)
    match b.pick(("nothing", "activation", "constant", "layer", "norm", "contiguous")):
        case "activation":
            result = activate(b, result)
        case "constant":
            result = b.let(f"{result} * {b.layer(f'numbers({b.size(result, -1)}{b.typed(result)})')}")
        case "layer":
            result = project(b, result, b.size(result, -1))
        case "norm":
            result = normalise(b, result)
        case "contiguous":
            result = b.let(f"{result}.contiguous()")
    b.let(back.format(result))


def shuffle(b: Builder) -> None:
    """Channels shuffled, or pixels and channels exchanged."""
    source = b.real(4)
    _, c, h, w = b.values[source].shape
    b.let(b.pick((f"{source}.view({source}.shape[0], 2, {c // 2}, {h}, {w}).transpose(1, 2).reshape({source}.shape)",
                  f"F.pixel_shuffle({source}, 2)", f"F.pixel_unshuffle({source}, 2)",
                  f"F.channel_shuffle({source}, 2)")))  # fmt: skip


def cast(b: Builder) -> None:
    """To another dtype, and perhaps something there and back."""
    source = b.any()
    narrow = ("torch.float32", "torch.float64", "torch.float32")
    whole = ("torch.int64", "torch.int32") if b.exact or not b.values[source].is_floating_point() else ()
    to = b.pick((*narrow, *whole))
    own = str(b.values[source].dtype)
    spell = b.pick(("{0}.to({1})", "{0}.to(dtype={1})", "{0}.type({1})"))
    short = {"torch.float32": "{0}.float()", "torch.float64": "{0}.double()"}
    spell = short.get(to, spell) if b.pick((False, True)) else spell
    result = b.let(spell.format(source, to))
    match b.pick(("leave", "back", "back", "work and back")):
        case "back":
            b.let(b.pick(("{0}.to({1})", "{0}.to({2}.dtype)", "{0}.type_as({2})")).format(result, own, source))
        case "work and back":
            result = activate(b, result) if b.pick((True, False)) else b.let(f"{result} * 2")
            b.let(f"{result}.to({own})")


def whole_numbers(b: Builder) -> None:
    """Integers and truth values beside the rest: a mask, an index, a count, an embedding."""
    source = b.real(2, 3, 4)
    channels, last = b.size(source, 1), b.size(source, -1)
    match b.pick(("add", "index", "mask", "fill", "embed", "count", "compare")):
        case "add":
            b.let(f"{source} {b.pick('+*')} {b.layer(f'integers(3, {last})')}")
        case "index":
            b.let(f"{source}.index_select(1, {b.layer(f'integers({channels}, {b.pick((2, 3))})')})")
        case "mask":
            b.let(f"torch.where({b.layer(f'integers(2, {last}).bool()')}, {source}, 0.0)")
        case "fill":
            b.let(f"{source}.masked_fill({b.layer(f'integers(2, {last}).bool()')}, 0.5)")
        case "embed":
            table = b.layer(f"nn.Embedding(3, {last}{b.typed(source)})")
            b.let(f"{source} + {table}({b.layer(f'integers(3, {last})')}).sum(0)")
        case "count":
            counted = b.let(f"{b.layer(f'integers(4, {last})')} {b.pick('+*-')} {b.pick((1, 2))}")
            b.let(f"{source} * {counted}")
        case "compare" if b.exact:  # a comparison makes a jump of what rounding makes a step
            b.let(f"({source} > 0).to({source}.dtype)")


# -- padding and pooling ---------------------------------------------------------------------------------------------


def pool(b: Builder, source: str) -> str:
    """A pool of an image, or a mean over its sides."""
    return b.let(b.pick(("F.max_pool2d({0}, 3, 1, 1)", "F.avg_pool2d({0}, 2)", "F.max_pool2d({0}, 2)",
                         "F.adaptive_avg_pool2d({0}, 1)", "{0}.mean((2, 3))", "{0}.mean((2, 3), keepdim=True)",
                         "F.avg_pool2d({0}, 3, 1, 1)", "F.avg_pool2d({0}, 2, 1, 1, count_include_pad=False)",
                         "F.avg_pool2d({0}, 2, ceil_mode=True)", "{0}.amax((2, 3))", "F.adaptive_max_pool2d({0}, 2)",
                         "F.max_pool2d({0}, 1)", "F.interpolate({0}, scale_factor=2)",
                         "F.max_pool2d({0}, 2, ceil_mode=True)")).format(source))  # fmt: skip


def pooling(b: Builder) -> None:
    """A pool, and perhaps a linear layer on it."""
    result = pool(b, b.real(4))
    if b.pick((False, False, True)):
        if b.rank(result) == 4:
            result = b.let(f"{result}.flatten(1)")
        project(b, result)


def reduction(b: Builder) -> None:
    """A sum, mean or maximum over dimensions."""
    source = b.real()
    b.let(b.pick(("{0}.sum(1)", "{0}.mean(-1)", "{0}.mean(1, keepdim=True)", "{0}.amax(-1)", "{0}.sum((0, 1))",
                  "{0}.sum()", "{0}.max(1)[0]", "{0}.sum(-1, keepdim=True)",
                  "{0}.cumsum(1)")).format(source))  # fmt: skip


def padded(b: Builder) -> None:
    """Padding in front of a convolution or a pool."""
    source = b.real(4)
    pads = ("(1, 1, 1, 1)", "(1, 1, 0, 0)", "(0, 1, 0, 1)", "(2, 2, 2, 2)", "(1, 1, 1, 1, 0, 0)", "(-1, 0, 1, 1)")
    value = b.pick(("", "", "", ", value=1.0", ", mode='replicate'"))
    if b.pick((True, False)):
        padding = f"F.pad({{0}}, {b.pick(pads)}{value})"
    else:
        padding = f"{b.layer(b.pick(('nn.ZeroPad2d(1)', 'nn.ConstantPad2d(1, 0.0)', 'nn.ReflectionPad2d(1)')))}({{0}})"
    match b.pick(("convolution", "convolution", "max", "average", "max of positive", "max below everything")):
        case "convolution":
            result = b.let(padding.format(source))
            convolve(b, result, b.pick((2, 4)), b.pick((3, 2)), padding=b.pick((0, 0, 1)), stride=b.pick((1, 2)))
        case "max":
            b.let(f"F.max_pool2d({b.let(padding.format(source))}, {b.pick(('3, 1', '2', '3, 1, 1'))})")
        case "average":
            b.let(f"F.avg_pool2d({b.let(padding.format(source))}, {b.pick(('3, 1', '2', '2, 1, 1', '4, 2'))})")
        case "max of positive":
            b.let(f"F.max_pool2d({b.let(padding.format(b.let(f'torch.relu({source})')))}, 3, {b.pick((1, 2))})")
        case "max below everything":
            b.let(f"F.max_pool2d(F.pad({source}, (1, 1, 1, 1), value=-float('inf')), 3, {b.pick((1, 2))})")


# -- attention and norms by hand ---------------------------------------------------------------------------------------


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
    scale = b.pick(("{0} * 0.5", "{0} / 2.0", "{0}", "{0} * 2 ** -0.5", "0.25 * {0}"))
    if b.pick((False, True)):
        q, scale = b.let(scale.format(q)), "{0}"
    product = b.pick((f"{q} @ {k}.transpose(-2, -1)", f"torch.matmul({q}, {k}.mT)"))
    scores = b.let(scale.format(f"({product})"))
    match b.pick(("none", "none", "bias", "causal", "low")):
        case "bias":
            scores = b.let(f"{scores} + {b.layer(f'numbers({tokens}, {tokens}{b.typed(scores)})')}")
        case "causal":
            future = b.layer(f"torch.ones({tokens}, {tokens}).triu(1).bool()")
            scores = f"{scores}.masked_fill({future}, float('-inf'))"
        case "low":
            scores = b.let(f"torch.where({b.layer(f'torch.ones({tokens}, {tokens}).tril().bool()')}, {scores}, -1e3)")
    weights = b.pick(("F.softmax({0}, -1)", "{0}.softmax(dim=-1)")).format(scores)
    if b.pick((False, True)):
        weights = f"F.dropout({weights}, 0.1, training=False)"
    result = b.let(f"{weights} @ {v}")
    if heads > 1:
        result = b.let(f"{result}.transpose(1, 2).reshape({source}.shape[0], {tokens}, 4)")
    project(b, result, b.size(source, -1))


def squeeze_excite(b: Builder) -> None:
    """An image times a gate per channel."""
    source = b.real(4)
    channels = b.size(source, 1)
    pooled = b.let(f"{source}.mean((2, 3), keepdim=True)")
    gate = convolve(b, b.let(f"torch.relu({convolve(b, pooled, 2, 1, groups=1)})"), channels, 1, groups=1)
    b.let(f"{source} * torch.sigmoid({gate})" if not b.exact else f"{source} * {gate}.clamp(0, 1)")


def hand_written_norm(b: Builder) -> None:
    """A layer norm or RMS norm written out, with an affine or without."""
    source = b.real()
    last = b.size(source, -1)
    keep = "-1, keepdim=True"
    match b.pick(("layer", "layer var_mean", "rms", "rms sqrt")):
        case "layer":
            mean = b.let(f"{source}.mean({keep})")
            unbiased = b.pick(("unbiased=False", "correction=0", "unbiased=True"))
            var = b.pick((f"{source}.var({keep}, {unbiased})", f"(({source} - {mean}) ** 2).mean({keep})"))
            form = b.pick(("({0} - {1}) / torch.sqrt({2} + 1e-5)", "({0} - {1}) * torch.rsqrt({2} + 1e-5)"))
            result = b.let(form.format(source, mean, b.let(var)))
        case "layer var_mean":
            centred = b.let(f"{source} - {source}.mean({keep})")
            result = b.let(f"{centred} * (centred.pow(2).mean({keep}) + 1e-6).rsqrt()".replace("centred", centred))
        case "rms":
            result = b.let(f"{source} * torch.rsqrt({source}.pow(2).mean({keep}) + 1e-6)")
        case _:
            result = b.let(f"{source} / torch.sqrt(({source} * {source}).mean({keep}) + 1e-6)")
    if b.pick((False, True)):
        result = b.let(f"{result} * {b.layer(f'nn.Parameter(numbers({last}{b.typed(source)}))')}")
        if b.pick((False, True)):
            b.let(f"{result} + {b.layer(f'nn.Parameter(numbers({last}{b.typed(source)}))')}")


# -- writes ----------------------------------------------------------------------------------------------------------


def in_place(b: Builder) -> None:
    """A value changed in place, whoever else reads it."""
    source = b.real()
    forms = ("torch.relu_({0})", "{0}.mul_(2)", "{0}.add_({1})", "F.relu({0}, inplace=True)", "{0}.clamp_(-1, 1)",
             "{0}.sub_(0.5)", "{0}.copy_({1})", "{0}.neg_()", "{0}.zero_()")  # fmt: skip
    form = b.pick(forms)
    other = b.like(source) if "{1}" in form else ""
    b.let_write(form.format(source, other))


def augmented(b: Builder) -> None:
    """`v += w` and its kin."""
    source = b.real()
    b.write(f"{source} {b.pick('+*-')}= {b.like(source) if b.pick((True, False)) else b.pick(('2', '0.5'))}")


def through_view(b: Builder) -> None:
    """A part, or another shape, of a value changed in place."""
    source = b.real(2, 3, 4)
    view = b.pick(("{0}[:, :1]", "{0}[:, 1:]", "{0}.flatten(1)", "{0}.transpose(1, 2)", "{0}[..., 0]", "{0}.view(-1)"))
    if b.pick((True, False)):
        view = b.let(view.format(source))
    else:
        view = view.format(source)
    b.let_write(f"{view}{b.pick(('.mul_(2)', '.add_(1)', '.relu_()', '.zero_()', '.copy_({0})')).format(view)}")


def rewritten_sum(b: Builder) -> None:
    """A layer's result that a residual is added to in place, then an activation in place."""
    source = b.real(4)
    result = convolve(b, source, b.size(source, 1))
    summed = b.let_write(f"{result}.add_({source})")
    b.let_write(f"torch.relu_({summed})")


#: Each word with how often it is drawn.
WORDS = (
    (combination, 3), (moves, 4), (concat, 5), (split, 3), (part, 3), (cast, 3), (same_again, 2), (reduction, 1),
    (pooling, 2), (padded, 3), (there_and_back, 3), (whole_numbers, 2), (shuffle, 1), (dense_block, 2),
    (squeeze_excite, 1),
)  # fmt: skip
#: Words whose numbers round.
INEXACT_WORDS = ((attention, 4), (hand_written_norm, 2))
#: Words that write in place.
WRITES = ((in_place, 4), (augmented, 2), (through_view, 2), (rewritten_sum, 2))
