"""What programs are made of, third part: parts of values, shapes, casts, pooling and padding, and writes in place."""

from __future__ import annotations

from fxopt.testing.branches import pool
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
                  "{0}[..., 1:-1]", "{0}[:, :2][:, :1]", "{0}[:, 1:][..., 1:]", "{0}.narrow(1, 1, 1)",
                  "torch.stack({0}.unbind(1), 1)", "torch.stack([{0}[:, 0], {0}[:, 1]], 1)", "torch.stack([{0}])",
                  "torch.cat([{0}[:, :1], {0}[:, 1:]], 1)", "torch.cat({0}.split(1, 1), 1)",
                  "{0}.tensor_split(2, 1)[1]", "torch.cat([{0}[:, :1], {0}[:, 1:]], 1)[:, 1:]",
                  "torch.stack([{0}, {0}], 1)[:, 0]", "torch.cat([{0}, {0}], 0)[:{0}.shape[0]]",
                  "{0}[:, ::2][:, :1]")).format(source))  # fmt: skip


# -- shapes and dtypes -----------------------------------------------------------------------------------------------

_MOVES = (
    "{0}.flatten(1)", "{0}.reshape({0}.shape[0], -1)", "{0}.transpose(1, 2)", "{0}.permute(0, 2, 3, 1)",
    "{0}.permute(0, 3, 1, 2)", "{0}.unsqueeze(1)", "{0}.squeeze(1)", "{0}.unsqueeze(-1)", "{0}.squeeze(-1)",
    "{0}.flatten(2)", "{0}.reshape({0}.shape[0], 2, -1)", "{0}.transpose(-1, -2)", "{0}.contiguous()", "{0}.mT",
    "{0}.reshape({0}.shape[0], -1, 2, 2)", "{0}.flatten(2).transpose(1, 2)", "{0}.flatten(-2)", "{0}.squeeze()",
    "{0}.unflatten(1, (2, -1))", "{0}.movedim(1, -1)", "{0}.permute(0, 2, 1)", "{0}.swapaxes(1, 2)",
    "{0}.view({0}.shape[0], -1)", "{0}.reshape(-1)", "{0}[:1].expand({0}.shape)", "{0}.repeat(1, 2)",
    "{0}.reshape({0}.shape)", "{0}.view({0}.shape[0], {0}.shape[1], -1)", "{0}.flip(1)", "{0}.permute(1, 0)",
    "{0}[:, :1].expand({0}.shape)", "{0}[None].expand(2, -1, -1)", "{0}.contiguous()[None]", "{0}.t()",
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
    if b.pick((False, False, True)):
        result = b.let(spell.format(result, b.pick((*narrow, *whole))))
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
    (combination, 3), (moves, 4), (split, 3), (part, 3), (cast, 3), (same_again, 2), (reduction, 1), (pooling, 2),
    (padded, 3), (there_and_back, 3), (whole_numbers, 2), (shuffle, 1),
)  # fmt: skip
#: Words that write in place.
WRITES = ((in_place, 4), (augmented, 2), (through_view, 2), (rewritten_sum, 2))
