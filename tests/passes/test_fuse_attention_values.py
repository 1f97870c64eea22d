"""fuse-attention: exact and rounded numbers on random attentions, dtypes, gradients, layouts, and real models."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxopt
from attention import INF, MIN, PASSES, B, D, H, N, flat, joined, k, kernels, model_of, outcome, q, scores, v, weighted
from graphs import FRONT_ENDS, Network, TwoInputs, compiled_by, fired, operations, reasons
from zoo import import_timm, import_torchvision

both = pytest.mark.parametrize("front_end", FRONT_ENDS)


# -- random attentions -----------------------------------------------------------------------------------------------

SCALES = ("none", "q", "k", "k transposed", "scores", "division", "tensor", "per head")
MASKS = ("none", "causal", "added", "per head", "booleans", "lowest", "input", "filled input", "two")
PRODUCTS = ("matmul", "bmm", "einsum", "einsum heads third", "transposed")
LAYOUTS = ("joined", "plain", "flat", "contiguous")


class Drawn(nn.Module):
    """An attention in a drawn spelling, of q, k and v (batch, rows, heads, features) and numbers that decide a mask."""

    def __init__(self, scale: str, mask: str, product: str, layout: str, sizes: tuple[int, int, int], factor: float):
        super().__init__()
        rows, keys, heads = sizes
        self.spelling, self.factor = (scale, mask, product, layout), factor
        leaky = torch.rand(rows, keys) > 0.5
        leaky[torch.arange(rows), torch.randint(0, keys, (rows,))] = True
        self.register_buffer("factors", torch.full((heads, 1, 1), factor))
        self.register_buffer("number", torch.tensor(factor))
        self.register_buffer("future", torch.ones(rows, keys, dtype=torch.bool).triu(1))
        self.register_buffer("leaky", leaky)
        self.register_buffer("plane", torch.randint(-9, 9, (rows, keys)) / 1)
        self.register_buffer("bias", torch.randint(-9, 9, (1, heads, rows, keys)) / 1)
        self.register_buffer("lowest", torch.where(leaky, 0.0, MIN))
        self.double()

    def _scores(self, q: Any, k: Any, product: str) -> Any:
        scale, factor = self.spelling[0], self.factor
        q = q * factor if scale == "q" else q
        k = k * factor if scale == "k" else k
        k = (k.mT * factor).mT if scale == "k transposed" else k
        if product == "bmm":
            found = torch.bmm(flat(q), flat(k).transpose(1, 2)).view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        elif product == "einsum":
            found = torch.einsum("bhid,bhjd->bhij", q, k)
        elif product == "einsum heads third":
            found = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
        else:
            found = torch.matmul(q, k.transpose(-1, -2))
        found = found * factor if scale == "scores" else found
        found = found / (1 / factor) if scale == "division" else found
        found = found * self.number if scale == "tensor" else found
        return found * self.factors if scale == "per head" else found

    def _masked(self, scores: Any, chosen: Any) -> Any:
        mask = self.spelling[1]
        if mask == "causal":
            return scores.masked_fill(self.future, -INF)
        if mask == "booleans":
            return torch.where(self.leaky, scores, -INF)
        if mask == "filled input":
            return scores.masked_fill(chosen[:, None, None] > 0, MIN)
        if mask == "two":
            return (scores + self.bias).masked_fill(~self.leaky, -INF)
        added = {"added": self.plane, "per head": self.bias, "lowest": self.lowest}
        if mask == "input":
            return scores + torch.where(chosen[:, None, None] > 0, 0.0, MIN)
        return scores + added[mask] if mask in added else scores

    def forward(self, q: Any, k: Any, v: Any, chosen: Any) -> Any:
        """The attention."""
        product, layout = self.spelling[2:]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        weights = self._masked(self._scores(q, k, product), chosen).softmax(-1)
        if product == "bmm":
            y = torch.bmm(flat(weights), flat(v)).view(q.shape)
        elif product == "einsum heads third":
            y = torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2)).transpose(1, 2)
        elif product == "transposed":
            y = (v.mT @ weights.mT).mT.contiguous()
        else:
            y = weights @ v
        if layout == "plain":
            return y
        return joined(y) if layout == "joined" else flat(y) if layout == "flat" else y.transpose(1, 2).contiguous()


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Drawn, tuple[int, int, int, int, int]]:
    batch, heads, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    features = draw(st.integers(1, 4))
    keys = draw(st.sampled_from([rows, draw(st.integers(features, 6))]))
    spelling = [draw(st.sampled_from(choices)) for choices in (SCALES, MASKS, PRODUCTS, LAYOUTS)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = Drawn(*spelling, (rows, keys, heads), draw(st.sampled_from([0.25, 0.5, 2.0])))
    return model.eval(), (batch, heads, rows, keys, features)


def compiled_quickly(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> fxopt.CompiledModule:
    compiled = fxopt.compile(model, passes=PASSES, backend="aten", verify=False, strict=True)
    with torch.no_grad():
        compiled(*inputs)
    for rewrite in compiled.report.rewrites:
        event(rewrite.rule)
    for decline in compiled.report.declines:
        event(f"declined: {decline.reason.partition(' from ')[0]}")
    return compiled


def strides(value: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


@given(drawn())
def test_hard_attention_keeps_every_bit(case: tuple[Drawn, tuple[int, ...]]) -> None:
    """Scores lie so far apart that each query takes one value whole: exact, and wrong if anything is misaligned."""
    model, (batch, heads, rows, keys, features) = case
    q, k = (torch.randint(-3, 4, (batch, size, heads, features)).double() for size in (rows, keys))
    q[..., 0] = torch.randint(0, 2, q.shape[:-1]) * 2 - 1
    k[..., 0] = torch.stack([torch.randperm(keys) for _ in range(batch * heads)]).view(batch, heads, keys).mT * 4096
    v = torch.randint(-8, 9, (batch, keys, heads, features)).double()
    inputs = (q, k, v, torch.randn(batch, keys).double())
    compiled = compiled_quickly(model, inputs)
    with torch.no_grad():
        expected, actual = model(*inputs), compiled(*inputs)
    assert torch.equal(actual, expected)
    assert strides(actual) == strides(expected)


@given(drawn())
def test_rounding_is_no_worse_than_twice_eagers(case: tuple[Drawn, tuple[int, ...]]) -> None:
    model, (batch, heads, rows, keys, features) = case
    shapes = [(batch, size, heads, features) for size in (rows, keys, keys)]
    exact_inputs = (*(torch.randn(shape).double() for shape in shapes), torch.randn(batch, keys).double())
    with torch.no_grad():
        inputs = tuple(tensor.float() for tensor in exact_inputs)
        exact = model(*(tensor.double() for tensor in inputs))
        model.float()
        expected, actual = model(*inputs), compiled_quickly(model, inputs)(*inputs)
    size = max(float(exact.abs().max()), 2.0**-7)
    theirs, ours = (float((found.double() - exact).abs().max()) / size for found in (expected, actual))
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps


@given(drawn())
def test_a_second_run_changes_nothing(case: tuple[Drawn, tuple[int, ...]]) -> None:
    model, (batch, heads, rows, keys, features) = case
    shapes = [(batch, size, heads, features) for size in (rows, keys, keys)]
    inputs = (*(torch.randn(shape).double() for shape in shapes), torch.randn(batch, keys).double())
    once = compiled_quickly(model, inputs)
    again = fxopt.compile(model, passes=(*PASSES, *PASSES), backend="aten", verify=False, strict=True)
    with torch.no_grad():
        again(*inputs)
    assert fired(again) == fired(once)
    assert str(again.fused_graph.graph) == str(once.fused_graph.graph)


# -- dtypes ----------------------------------------------------------------------------------------------------------


def chosen(x: Any) -> Any:
    """Every key of every query."""
    return x[:, None, None, :, 0, 0, 0].abs() > -1


def low(x: Any) -> Any:
    """A mask in half precision, twice of which leaves the range of float16."""
    return torch.where(chosen(x), -50000.0, 0.0).half()


def float_scores(x: Any, scores: Any) -> Any:
    """softmax(scores) v of half precision, from scores in float32."""
    return joined(scores.softmax(-1).to(x.dtype) @ v(x))


DTYPES: list[tuple[str, Any]] = [
    ("plain", lambda m, x: weighted(x, scores(x))),
    ("a bias", lambda m, x: weighted(x, scores(x) + m.bias)),
    ("a causal mask", lambda m, x: weighted(x, scores(x).masked_fill(m.future, -INF))),
    ("softmax in float32", lambda m, x: joined(F.softmax(scores(x), -1, dtype=torch.float32).to(x.dtype) @ v(x))),
    ("scores in float32, filled", lambda m, x: float_scores(x, scores(x).float().masked_fill(chosen(x), MIN))),
    ("a mask in front of a scale, in float32", lambda m, x: float_scores(x, (scores(x).float() + low(x)) * 2)),
    ("scores in float32", lambda m, x: joined((scores(x).float() + m.bias.float()).softmax(-1).to(x.dtype) @ v(x))),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in DTYPES])
def test_dtypes(body: Any, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and body in [row[1] for row in DTYPES[3:]]:
        compiled = compiled_by(PASSES, model_of(body).double(), (torch.randn(B, N, 3, H, D).double(),), "export")
        assert any(
            "where the operator computes in torch.float64" in reason for reason in reasons(compiled, "attention")
        )
    else:
        assert len(fired(outcome(body, "symbolic", dtype))) == 1


def test_a_float32_mask_beside_float64_is_cast() -> None:
    """The CPU's kernel reads its memory as float64, where there are enough keys for a vector."""
    model = Network(lambda m, x: weighted(x, scores(x) + m.plane), plane=torch.randn(40, 40)).eval()
    x = torch.randn(B, 40, 3, H, D, dtype=torch.float64)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    assert fired(compiled) == ["masked-attention"]
    torch.testing.assert_close(compiled(x), model(x))


# -- layouts, gradients, what is shared ------------------------------------------------------------------------------


@both
def test_many_keys_are_worth_a_copy(front_end: str) -> None:
    """Channels first, as behind a convolution: rows are strided, and the kernel wants them contiguous."""
    model = TwoInputs(lambda m, x, y: (x.mT @ y).softmax(-1) @ y.mT).eval()
    x, y = torch.randn(2, 4, 600), torch.randn(2, 4, 600)
    compiled = compiled_by(PASSES, model, (x, y), front_end)
    assert fired(compiled) == ["attention"]
    assert "_scaled_dot_product_flash_attention_for_cpu" in kernels(compiled, x, y)


@both
def test_gradients_are_the_models(front_end: str) -> None:
    model = model_of(lambda m, x: weighted(x, scores(x) + m.bias).square())
    x = torch.randn(B, N, 3, H, D, requires_grad=True)
    compiled = compiled_by(PASSES, model, (x.detach(),), front_end)
    (expected,), (actual,) = (torch.autograd.grad(run(x).sum(), x) for run in (model, compiled))
    torch.testing.assert_close(actual, expected)


def test_layers_share_a_constant_mask() -> None:
    model = model_of(
        lambda m, x: (
            weighted(x, scores(x).masked_fill(~m.leaky, -INF))
            + weighted(x, (q(x) @ k(x).mT).masked_fill(~m.leaky, -INF))
        )
    )
    compiled = compiled_by(PASSES, model, (torch.randn(B, N, 3, H, D),), "symbolic")
    assert fired(compiled) == ["masked-attention"] * 2
    assert [name for name in compiled.state_dict() if "attention_mask" in name] == ["attention_mask"]


def test_it_waits_for_shapes() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: weighted(x, scores(x) + m.bias)), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == ["whether add has the shape of the scores"]
    compiled(torch.randn(B, N, 3, H, D))
    assert fired(compiled) == ["masked-attention"]
    assert not compiled.report.pending


def test_a_batch_of_two_open_sizes_that_would_have_to_be_regrouped_declines() -> None:
    model = TwoInputs(
        lambda m, x, y: (
            flat(((flat(x) @ flat(y.expand(x.shape[0], H, -1, D)).mT).view(-1, H, N, y.shape[0]) + m.bias).softmax(-1))
            @ flat(y.expand(x.shape[0], H, -1, D))
        ),
        bias=torch.randn(1, H, N, 1),
    )
    compiled = compiled_by(PASSES, model, (torch.randn(3, H, N, D), torch.randn(5, D)), "export")
    assert reasons(compiled, "attention") == ["more than one size is open, where the batch has to be regrouped"]


def test_a_mask_whose_batch_is_open_twice_declines() -> None:
    def windows(scores: Any, y: Any) -> Any:
        mask = torch.where(y > 0, 0.0, MIN)[:, None]
        return (scores.view(-1, y.shape[0], H, N, N) + mask).view(-1, H, N, N)

    model = TwoInputs(lambda m, x, y: windows(x @ x.mT, y).softmax(-1) @ x).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(6, H, N, D), torch.randn(3, N, N)), "export")
    assert reasons(compiled, "attention") == ["the mask is for scores whose batch sizes are not known well enough"]


# -- real models -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention as nanoGPT writes it."""

    def __init__(self, size: int = 24, heads: int = 3, longest: int = 16) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.c_attn, self.c_proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, size), and the same back."""
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.size, dim=2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.drop(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.drop(self.c_proj(y))


def check_model(model: nn.Module, x: torch.Tensor, rules: list[str], *, left: int = 0) -> None:
    compiled = fxopt.compile(model.eval(), (x,), strict=True)
    assert [rewrite.rule for rewrite in compiled.report.rewrites if rewrite.pass_name == PASSES[0]] == rules
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
    assert operations(compiled.fused_graph)["softmax"] == left


def test_nanogpt() -> None:
    check_model(nn.Sequential(Block(), Block()), torch.randn(2, 7, 24), ["causal-attention"] * 2)


@pytest.fixture
def unfused() -> Any:
    """timm without its own use of the operator."""
    import_timm()
    layers = importlib.import_module("timm.layers")
    layers.set_fused_attn(False)
    yield importlib.import_module("timm.models")
    layers.set_fused_attn(True)


def test_timm_vit(unfused: Any) -> None:
    model = unfused.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    check_model(model, torch.randn(2, 3, 32, 32), ["attention"] * 2)


def test_timm_swin(unfused: Any) -> None:
    """The second block's windows are shifted: it adds a mask per window to scores that it views by window."""
    model = unfused.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=12, depths=(2,), num_heads=(3,), window_size=4, num_classes=5
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    check_model(model, torch.randn(2, 3, 16, 16), ["masked-attention"] * 2)


def test_torchvision_swin() -> None:
    """Its shifted blocks make their mask by writes of constants into parts of a tensor."""
    swin = import_torchvision().models.swin_transformer.SwinTransformer
    model = swin(patch_size=[2, 2], embed_dim=12, depths=[2], num_heads=[3], window_size=[4, 4], num_classes=5)
    check_model(model, torch.randn(2, 3, 16, 16), ["masked-attention", "masked-attention"])


class LastState(nn.Module):
    """A Hugging Face model as a function of tokens."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, tokens: torch.Tensor) -> Any:
        """The last hidden state of (batch, sequence) tokens, the zeros of which are padding."""
        options = dict(self.options)
        if options.pop("padded", False):
            options["attention_mask"] = (tokens != 0).long()
        return self.inner(input_ids=tokens, **options).last_hidden_state


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        pytest.param("Bert", {}, "attention", id="BERT"),
        pytest.param("Bert", {"padded": True}, "masked-attention", id="BERT with padding"),
        pytest.param("GPT2", {"use_cache": False}, "masked-attention", id="GPT-2"),
    ],
)
def test_hugging_face(name: str, options: dict[str, Any], rule: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    if name == "GPT2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, attn_implementation="eager", **sizes)
    model = LastState(getattr(transformers, f"{name}Model")(config), **options)
    tokens = torch.randint(1, 50, (2, 7))
    tokens[1, 4:] = 0
    check_model(model, tokens, [rule] * 2)
