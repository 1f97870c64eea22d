"""What programs are made of, second part: several layers on one value, their sums and concats, and what reads those."""

from __future__ import annotations

from fxopt.testing.builder import Builder, Unfit
from fxopt.testing.layers import activate, convolve, normalise, project

# -- side by side ----------------------------------------------------------------------------------------------------


def siblings(b: Builder) -> None:
    """Convolutions or linears of one value, alike or nearly so, with the same followers or none."""
    source = b.real()
    image = b.rank(source) == 4
    kernel, groups, follow = b.pick((1, 3)), b.pick((1, 1, 1, 2)), b.pick((0, 1, 2, 3))
    same = b.pick((False, False, True))
    results = []
    for _ in range(b.pick((2, 3))):
        if image:
            kernel = kernel if same else b.pick((kernel, kernel, kernel, 1, 3, 5))
            result = convolve(b, source, b.pick((4, 2, 6)), kernel, groups=groups if b.size(source, 1) % 2 == 0 else 1)
        else:
            result = project(b, source, b.pick((4, 4, 2, 8)))
        if follow & 1:
            result = normalise(b, result) if b.rank(result) in (2, 3, 4) else result
        if follow & 2:
            plain = same or b.pick((True, True, True, False))
            result = b.let(f"torch.relu({result})") if plain else activate(b, result)
        results.append(result)
    if b.pick((True, False)):
        together(b, results)


def together(b: Builder, results: list[str]) -> str:
    """Several values as one: by concat, by sum, by product."""
    if b.pick((True, False)) or len({b.values[name].shape for name in results}) > 1:
        dim = 1 if b.rank(results[0]) == 4 else -1
        return b.let(f"torch.cat([{', '.join(results)}], {dim})")
    return b.let(b.pick((" + ", " + ", " * ", " - ")).join(results))


def parallel_branches(b: Builder) -> None:
    """The sum of parallel convolutions, pools and the identity, each perhaps with its norm (RepVGG, ACNet, DBB)."""
    source = b.real(4)
    channels = b.size(source, 1)
    with_norm, groups = b.pick((True, False, True)), b.pick((1, 1, 1, channels))
    out, stride = b.pick((channels, channels, 4 * groups)), b.pick((1, 1, 1, 2))
    results = []
    for kind in b.pick(("31", "31i", "3i", "33", "11", "3hvi", "1i", "513", "i1", "3p", "1s", "3o", "ts", "3d", "c31")):
        if kind in "is":
            result = b.let(f"{source} * {b.pick(('0.5', '2', '-1.0'))}") if kind == "s" else source
        elif kind == "p":
            result = b.let(f"F.avg_pool2d({source}, 3, {stride}, 1{b.pick(('', '', ', count_include_pad=False'))})")
        elif kind in "hvd":
            shapes = {"h": "(1, 3), padding=(0, 1)", "v": "(3, 1), padding=(1, 0)", "d": "3, padding=2, dilation=2"}
            options = f"{shapes[kind]}, stride={stride}, groups={groups}{b.typed(source)}"
            result = b.let(f"{b.layer(f'nn.Conv2d({channels}, {out}, {options})')}({source})")
        elif kind == "t":
            layers = [b.layer(f"nn.ConvTranspose2d({channels}, {out}, 3, padding=1{b.typed(source)})") for _ in "12"]
            result = b.let(f"{layers[0]}({source}) + {layers[1]}({source})")
        elif kind == "c":
            result = b.let(f"{source} {b.pick('*+')} {b.layer(f'numbers({channels}, 1, 1{b.typed(source)})')}")
        elif kind == "o":
            result = convolve(b, source, 1, 1, groups=1, stride=stride)
        else:
            result = convolve(b, source, out, int(kind), groups=groups, stride=stride)
        if with_norm and b.pick((True, True, True, False)):
            result = normalise(b, result)
        results.append(result)
    form = b.pick((" + ", " + ", " + ", " - "))
    result = b.let(form.join(results) + b.pick(("", "", " + 1")))
    if b.pick((True, False)):
        activate(b, result)


def parallel_linears(b: Builder) -> None:
    """The sum of linear layers of one value, each perhaps with its constants."""
    source = b.real()
    results = [project(b, source, 4) for _ in range(b.pick((2, 3)))]
    if b.pick((False, True)):
        results[0] = b.let(f"{results[0]} * {b.layer(f'numbers(4{b.typed(source)})')}")
    form = b.pick((" + ", " - ", "torch.add({0}, {1}, alpha=2)", "torch.sub({0}, {1}, alpha=0.5)"))
    b.let(form.format(*results) if "{" in form else form.join(results))


def residual(b: Builder) -> None:
    """A value plus layers of it, and an activation."""
    source = b.real(3, 4)
    channels = b.size(source, 1)
    result = convolve(b, source, channels, b.pick((3, 1)))
    if b.pick((True, False)):
        result = normalise(b, result)
    form = b.pick(("{0} + {1}", "{1} + {0}", "torch.add({0}, {1}, alpha=2)", "{0} - {1}", "{1}.add({0})"))
    result = b.let(form.format(source, result))
    if b.pick((True, False)):
        activate(b, result)


# -- joined ----------------------------------------------------------------------------------------------------------


def pool(b: Builder, source: str) -> str:
    """A pool of an image, or a mean over its sides."""
    return b.let(b.pick(("F.max_pool2d({0}, 3, 1, 1)", "F.avg_pool2d({0}, 2)", "F.max_pool2d({0}, 2)",
                         "F.adaptive_avg_pool2d({0}, 1)", "{0}.mean((2, 3))", "{0}.mean((2, 3), keepdim=True)",
                         "F.avg_pool2d({0}, 3, 1, 1)", "F.avg_pool2d({0}, 2, 1, 1, count_include_pad=False)",
                         "F.avg_pool2d({0}, 2, ceil_mode=True)", "{0}.amax((2, 3))", "F.adaptive_max_pool2d({0}, 2)",
                         "F.max_pool2d({0}, 1)", "F.interpolate({0}, scale_factor=2)",
                         "F.max_pool2d({0}, 2, ceil_mode=True)")).format(source))  # fmt: skip


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
    join = "cat" if b.pick(range(8)) else "stack"
    after_concat(b, b.let(f"torch.{join}([{', '.join(names)}], {dim})"))


def concat_of_layers(b: Builder) -> None:
    """Layers that only a concat reads, perhaps through another concat."""
    source = b.real(4)
    names = []
    for _ in range(b.pick((2, 3))):
        result = convolve(b, source, b.pick((2, 4)), b.pick((3, 1)), groups=1)
        follower = b.pick(("none", "none", "relu", "norm"))
        result = b.let(f"torch.relu({result})") if follower == "relu" else result
        names.append(normalise(b, result) if follower == "norm" else result)
    if len(names) == 3 and b.pick((False, True)):
        names = [b.let(f"torch.cat([{names[0]}, {names[1]}], {b.pick((1, -3))})"), names[2]]
    joined = b.let(f"torch.cat([{', '.join(names)}], 1)")
    match b.pick(("norm", "relu", "norm, relu", "pool", "rest")):
        case "norm":
            joined = normalise(b, joined)
        case "relu":
            joined = b.let(f"torch.relu({joined})")
        case "norm, relu":
            joined = b.let(f"torch.relu({normalise(b, joined)})")
        case "pool":
            joined = pool(b, joined)
    after_concat(b, joined)


def after_concat(b: Builder, joined: str) -> None:
    """What reads a concat."""
    match b.pick(("nothing", "layer", "layer", "elementwise", "pool", "norm", "concat", "constant", "part")):
        case "layer":
            if b.rank(joined) == 4 and b.pick((True, True, False)):
                result = convolve(b, joined, kernel=b.pick((1, 3)), groups=b.pick((1, 1, 0)))
                if b.pick((False, True)):
                    b.let(f"{result} + {b.like(result)}")
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
        case "part":
            size = b.size(joined, 1)
            start = b.pick(range(size))
            b.let(f"{joined}[:, {start}:{b.pick(range(start + 1, size + 1))}]")


def dense_block(b: Builder) -> None:
    """Layers that each read all before them, joined (DenseNet)."""
    joined = b.real(4)
    for _ in range(b.pick((2, 3))):
        new = convolve(b, joined, 2, b.pick((1, 3)), groups=1)
        if b.pick((False, True)):
            new = activate(b, new)
        joined = b.let(f"torch.cat([{joined}, {new}], 1)")
    after_concat(b, joined)


#: Each word with how often it is drawn.
WORDS = (
    (residual, 2), (siblings, 4), (parallel_branches, 4), (parallel_linears, 1), (concat, 4), (concat_of_layers, 3),
    (dense_block, 2),
)  # fmt: skip
