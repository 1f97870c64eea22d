"""What programs are made of, first part: layers, norms, activations, constants, and the motifs that they form."""

from __future__ import annotations

from fxopt.testing.builder import Builder, Unfit

EXACT_ACTIVATIONS = (
    "torch.relu({0})", "F.relu6({0})", "{0}.clamp(-1, 2)", "{0}.clamp(min=0.0)", "F.hardtanh({0}, -2.0, 2.0)",
    "{0}.relu()", "torch.clamp({0}, max=1.5)", "F.leaky_relu({0}, 0.5)", "{0}.abs()", "-{0}",
    "{0}.clamp_min(0)", "F.relu6({0} + 3)", "torch.clamp({0}, 0, 6)", "F.threshold({0}, 0.0, 0.0)",
)  # fmt: skip
SMOOTH_ACTIVATIONS = (
    "torch.sigmoid({0})", "F.silu({0})", "F.gelu({0})", "F.gelu({0}, approximate='tanh')", "torch.tanh({0})",
    "F.hardswish({0})", "F.hardsigmoid({0})", "F.elu({0})", "F.mish({0})", "F.softplus({0})", "F.selu({0})",
    "F.softmax({0}, -1)", "torch.exp(-{0}.abs())",
)  # fmt: skip
#: Activations as people write them out.
EXACT_WRITTEN = (
    "torch.relu(torch.relu({0}))", "{0}.clamp(0, 4).clamp(1, 2)", "torch.relu({0}.clamp(min=0.5))",
    "torch.clamp(torch.clamp({0}, min=-1), max=1)", "{0}.clamp(2, -1)", "torch.relu({0}).clamp(max=6)",
    "torch.minimum(torch.maximum({0}, torch.zeros_like({0})), torch.ones_like({0}))",
    "torch.relu({0}) - torch.relu(-{0})", "F.leaky_relu(torch.relu({0}), 0.5)", "-(-{0})", "torch.relu({0}.abs())",
    "torch.where({0} > 0, {0}, 0.0)", "torch.max({0}, {0} * 0.5)",
)  # fmt: skip
SMOOTH_WRITTEN = (
    "{0} * torch.sigmoid({0})", "torch.sigmoid({0}) * {0}", "{0}.sigmoid().mul({0})",
    "0.5 * {0} * (1 + torch.erf({0} / 1.4142135623730951))", "{0} * 0.5 * (1.0 + torch.erf({0} * 0.7071067811865476))",
    "0.5 * {0} * (1 + torch.tanh(0.7978845608028654 * ({0} + 0.044715 * {0} ** 3)))",
    "{0} * F.relu6({0} + 3) / 6", "{0} * (F.relu6({0} + 3.0) / 6.0)", "F.relu6({0} + 3) / 6",
    "{0} * torch.clamp({0} + 3, 0, 6) / 6", "{0} * torch.tanh(F.softplus({0}))", "{0} * torch.sigmoid(1.702 * {0})",
    "1 / (1 + torch.exp(-{0}))", "{0} * F.hardsigmoid({0})", "torch.relu(torch.sigmoid({0}))",
)  # fmt: skip


def activate(b: Builder, source: str) -> str:
    """An activation of a value, as an operator or written out."""
    tables = [EXACT_ACTIVATIONS, EXACT_ACTIVATIONS, EXACT_WRITTEN]
    tables += [] if b.exact else [SMOOTH_ACTIVATIONS, SMOOTH_WRITTEN]
    return b.let(b.pick(b.pick(tables)).format(source))


# -- layers ----------------------------------------------------------------------------------------------------------


def convolve(
    b: Builder,
    source: str,
    out: int = 0,
    kernel: int = 0,
    *,
    groups: int = 0,
    stride: int = 1,
    padding: int | None = None,
) -> str:
    """A convolution that keeps the size (or has the `padding` given) and gives `out` channels; 0 means any."""
    rank = b.rank(source)
    channels = b.size(source, 1)
    groups = groups or b.pick([1, 1, 1, *[size for size in (2, channels) if channels % size == 0]])
    out = out or b.pick((4, 2, channels, 2 * channels, 6))
    if out % groups:
        groups = 1
    kernel = kernel or b.pick((1, 3, 3, 1, 2, 5))
    padding = kernel // 2 if padding is None else padding
    options = f", padding={padding}" if padding else ""
    options += f", stride={stride}" if stride > 1 else ""
    options += f", groups={groups}" if groups > 1 else ""
    options += "" if b.pick((True, True, False)) else ", bias=False"
    layer = b.layer(f"nn.Conv{rank - 2}d({channels}, {out}, {kernel}{options}{b.typed(source)})")
    return b.let(f"{layer}({source})")


def project(b: Builder, source: str, out: int = 0) -> str:
    """A linear layer over a value's last dimension."""
    features = b.size(source, -1)
    out = out or b.pick((4, 2, features, 8, 6))
    bias = b.pick(("", "", ", bias=False"))
    layer = b.layer(f"nn.Linear({features}, {out}{bias}{b.typed(source)})")
    return b.let(f"{layer}({source})")


def normalise(b: Builder, source: str) -> str:
    """A batch norm of a value."""
    dims = {2: 1, 3: 1, 4: 2, 5: 3}.get(b.rank(source))
    if dims is None:
        raise Unfit
    affine = b.pick(("", "", "", ", affine=False"))
    eps = ", eps=0.25" if b.exact else ""
    layer = b.layer(f"nn.BatchNorm{dims}d({b.size(source, 1)}{eps}{affine}{b.typed(source)})")
    return b.let(f"{layer}({source})")


def convolution(b: Builder) -> None:
    """A convolution of any kind."""
    source = b.real(3, 4)
    convolve(b, source, stride=b.pick((1, 1, 1, 2)), padding=b.pick((None, None, None, 0, 1)))


def odd_convolution(b: Builder) -> None:
    """Dilated, of oblong kernels, of other padding modes, without a batch; sizes may change by side."""
    source = b.real(4, 4, 3) if b.pick((True, True, False)) else b.real(3)
    channels = b.size(source, -3)
    options = b.pick(
        (
            "(1, 3), padding=(0, 1)",
            "(3, 1), padding=(1, 0)",
            "3, padding=2, dilation=2",
            "3, padding='same'",
            "2, padding='valid'",
            "3, padding=1, stride=(1, 2)",
            "4, stride=2, padding=1",
            "3, padding=1, padding_mode='reflect'",
            "3, padding=1, padding_mode='circular'",
            "3, padding=1, padding_mode='replicate'",
        )
    )
    layer = b.layer(f"nn.Conv2d({channels}, {b.pick((2, 4))}, {options}{b.typed(source)})")
    result = b.let(f"{layer}({source})")
    if b.pick((False, False, True)):
        normalise(b, result)


def transposed_convolution(b: Builder) -> None:
    """A transposed convolution, perhaps grouped or strided, perhaps with a norm."""
    source = b.real(4)
    channels = b.size(source, 1)
    groups = b.pick((1, 2)) if channels % 2 == 0 else 1
    shape = b.pick(("3, padding=1", "2, stride=2", "1", "3, padding=1, stride=2, output_padding=1"))
    bias = b.pick(("", ", bias=False"))
    out = groups * b.pick((1, 2))
    layer = b.layer(f"nn.ConvTranspose2d({channels}, {out}, {shape}, groups={groups}{bias}{b.typed(source)})")
    result = b.let(f"{layer}({source})")
    if b.pick((False, True)):
        normalise(b, result)


def linear(b: Builder) -> None:
    """A linear layer, perhaps with a norm behind it."""
    source = b.real()
    result = project(b, source)
    if b.pick((False, False, True)):
        normalise(b, result)


def again(b: Builder) -> None:
    """A layer that is called a second time, on the same value or another."""
    layers = [name for name, text in b.texts.items() if text.startswith("nn.") and "Parameter" not in text]
    if not layers:
        raise Unfit
    b.let(f"self.{layers[-1 - b.pick(range(len(layers)))]}({b.real()})")


def tied(b: Builder) -> None:
    """A layer whose weight is another's."""
    texts = {name: text for name, text in b.texts.items() if text.startswith(("nn.Conv", "nn.Linear"))}
    if not texts:
        raise Unfit
    first = b.pick(list(texts))
    layer = b.layer(texts[first])
    b.layer(f"self.{first}.weight", f"{layer.removeprefix('self.')}.weight")
    b.let(f"{layer}({b.real()})")


def norm(b: Builder) -> None:
    """A norm: mostly a batch norm; the others give numbers that round."""
    source = b.real(2, 3, 4)
    if b.exact or b.pick((True, False)):
        normalise(b, source)
        return
    channels, last = b.size(source, 1), b.size(source, -1)
    if b.rank(source) == 4 and b.pick((True, False)):
        text = b.pick((f"GroupNorm({2 if channels % 2 == 0 else 1}, {channels}", f"InstanceNorm2d({channels}"))
    else:
        text = b.pick((f"LayerNorm({last}", f"LayerNorm({last}, elementwise_affine=False", f"RMSNorm({last}"))
    b.let(f"{b.layer(f'nn.{text}{b.typed(source)})')}({source})")


def block(b: Builder) -> None:
    """Convolution, norm, activation."""
    activate(b, normalise(b, convolve(b, b.real(3, 4))))


def pre_activation(b: Builder) -> None:
    """Norm, activation, convolution."""
    result = normalise(b, b.real(3, 4))
    match b.pick(("relu", "none", "any")):
        case "relu":
            result = b.let(f"torch.relu({result})")
        case "any":
            result = activate(b, result)
    convolve(b, result, padding=b.pick((None, 0)))


def mlp(b: Builder) -> None:
    """Linear, activation, linear, and perhaps the sum with where it began."""
    source = b.real()
    result = project(b, activate(b, project(b, source)), b.size(source, -1))
    if b.pick((False, True)):
        b.let(f"{source} + {result}")


def activation(b: Builder) -> None:
    """An activation."""
    activate(b, b.real())


def nonnegative(b: Builder) -> None:
    """A value without negative numbers, something that keeps it so (or not), and a ReLU."""
    first = ("torch.relu({0})", "{0}.abs()", "F.relu6({0})", "{0}.clamp(0, 4)", "{0} ** 2")
    keeps = ("{0} + {1}", "torch.cat([{0}, {1}], 0)", "F.max_pool2d({0}, 2, 1)", "F.avg_pool2d({0}, 2, 1)",
             "{0} * {1}", "{0} * 2", "{0}.clamp(max=2)", "{0} - 0.5", "{0}.flatten(1)", "{0}[:, 1:]",
             "torch.maximum({0}, {1})", "F.adaptive_max_pool2d({0}, 1)", "{0}.sum(1)", "{0}.transpose(0, 1)",
             "{0}.contiguous()")  # fmt: skip
    result = b.let(b.pick(first).format(b.real()))
    for _ in range(b.pick((1, 2))):
        result = b.let(b.pick(keeps).format(result, b.like(result)))
    b.let(b.pick(("torch.relu({0})", "{0}.clamp(min=0)", "F.relu6({0})", "{0}.clamp(0, 3)")).format(result))


# -- constants -------------------------------------------------------------------------------------------------------


def _constant(b: Builder, source: str, kind: str = "numbers") -> str:
    """A tensor that aligns with a value in one way or another: per channel, along the last dimension, single, full."""
    rank, typed = b.rank(source), b.typed(source)
    if b.pick((False,) * 9 + (True,)):
        typed = ", dtype=torch.float32" if b.exact else ", dtype=torch.float64"
    channels = [b.size(source, 1)] + [1] * (rank - 2) if rank > 1 else [1]
    sizes = b.pick((channels, channels, channels, [b.size(source, -1)], [1], [], [1, *channels]))
    text = f"{kind}({', '.join(map(str, sizes))}{typed})".replace("(, ", "(")
    return b.layer(f"nn.Parameter({text})" if b.pick((False, True)) else text)


AFFINE = ("{0} * {1}", "{0} + {1}", "{0} - {1}", "{1} - {0}", "{0} / {1}", "{1} * {0}", "{1} + {0}", "{0}.mul({1})",
          "torch.add({0}, {1}, alpha=2)", "torch.sub({0}, {1}, alpha=0.5)", "{1} / {0}")  # fmt: skip


def affine(b: Builder) -> None:
    """A value times, plus, minus, divided by constants, once or twice."""
    source = b.real()
    for _ in range(b.pick((1, 2, 3))):
        numbers = ("2", "0.5", "-1.0", "0.25", "1.0", "4")
        number = b.pick(numbers) if b.pick((False, False, True)) else ""
        operation = b.pick(AFFINE)
        other = number or _constant(b, source, "powers" if "/" in operation else "numbers")
        source = b.let(operation.format(source, other))


def around_layer(b: Builder) -> None:
    """A constant in front of a layer, and one behind it: normalised input, layer scale."""
    source = b.real(2, 3, 4)
    scaled = b.let(f"{source} {b.pick('*+-')} {_constant(b, source)}")
    match b.pick(("convolution", "linear", "norm")):
        case "linear":
            layer = project(b, scaled)
        case "norm":
            layer = normalise(b, scaled)
        case _:
            layer = project(b, scaled) if b.rank(source) == 2 else convolve(b, scaled)
    b.let(f"{layer} {b.pick('*+-')} {_constant(b, layer)}")


def computed_weight(b: Builder) -> None:
    """Constants that are computed of each other before they are used: a scaled weight, a sum of two, a transposed."""
    source = b.real(2, 3, 4)
    typed = b.typed(source)
    last, channels = b.size(source, -1), b.size(source, 1)
    if b.rank(source) == 4 and b.pick((True, False)):
        weight = b.layer(f"nn.Parameter(numbers(4, {channels}, 1, 1{typed}))")
        scale = b.layer(f"nn.Parameter(powers(4, 1, 1, 1{typed}))")
        form = b.pick(("{0} * {1}", "{0} / {1}", "({0} + {0}.flip(0)) * {1}", "F.pad({0}, (1, 1, 1, 1))", "{0}.relu()"))
        b.let(f"F.conv2d({source}, {form.format(weight, scale)})")
        return
    weight = b.layer(f"nn.Parameter(numbers(4, {last}{typed}))")
    other = b.layer(f"numbers(4, {last}{typed})")
    use = b.pick(("F.linear({0}, {1} + {2})", "{0} @ {1}.t()", "torch.matmul({0}, ({1} * 0.5 + {2}).transpose(0, 1))",
                  "F.linear({0}, torch.cat([{1}, {2}]))", "F.linear({0}, {1}, {2}.sum(1))",
                  "{0} * {1}[0] + {2}.amax(0)", "F.linear(F.linear({0}, {1}), {1}.t())",
                  "torch.addmm({2}.sum(1), {0}, {1}.t())", "torch.mm({0}, {1}.t())", "{0} @ {1}.t() + {2}.sum(1)",
                  "torch.addmm({2}.sum(1), {0}, {1}.t(), beta=1, alpha=2)", "{0} @ {1}.reshape(-1, 4)",
                  "torch.einsum('...i,oi->...o', {0}, {1})",
                  "({0}.reshape(-1, {0}.shape[-1]) @ {1}.t()).view({3}, 4)"))  # fmt: skip
    sizes = [f"{source}.shape[0]", *map(str, b.values[source].shape[1:-1])]
    b.let(use.format(source, weight, other, ", ".join(sizes)))


def nothing(b: Builder) -> None:
    """What gives back its input, or a copy of it."""
    source = b.real()
    forms = ("{0} * 1", "{0}.clone()", "{0} + 0", "{0} - 0", "{0} / 1", "{0}.contiguous()", "1.0 * {0}", "0.0 + {0}",
             "F.dropout({0}, 0.5, training=False)", "{0}[:]", "{0}.to({0}.dtype)", "F.pad({0}, (0, 0))",
             "torch.cat([{0}], 0)", "{0}.expand_as({0})", "{0}.detach()",
             "{0}.contiguous(memory_format=torch.channels_last)", "{0}.to(memory_format=torch.channels_last)",
             )  # fmt: skip
    if b.pick((False, False, False, True)):
        layers = ("nn.Identity()", "nn.Dropout(0.5)", "nn.Dropout(0.5, inplace=True)", "nn.Dropout2d(0.1)")
        b.let(f"{b.layer(b.pick(layers))}({source})")
        return
    b.let(b.pick(forms).format(source))


#: Each word with how often it is drawn. The simplest comes first: a network shrinks to it.
WORDS = (
    (activation, 3), (nothing, 2), (norm, 2), (convolution, 4), (linear, 3), (affine, 3), (block, 2), (nonnegative, 2),
    (again, 2), (tied, 1), (mlp, 1), (pre_activation, 2), (around_layer, 2),
    (computed_weight, 3), (odd_convolution, 2), (transposed_convolution, 2),
)  # fmt: skip
