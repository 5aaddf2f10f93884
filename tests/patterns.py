"""Tiny networks, one for each way in which channels depend on each other.

Each is a function that returns (module, example inputs); PATTERNS has them by name with the axes
that can shrink and their widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pattern:
    """free: axis -> width, of all that are not locked. own: the module's own class survives;
    None: that depends on which units go."""

    make: Callable[[], Made]
    free: dict[str, int]
    own: bool | None


PATTERNS: dict[str, Pattern] = {}


def pattern(
    free: dict[str, int], own: bool | None = True
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(build: Callable[[], Made]) -> Callable[[], Made]:
        def make() -> Made:
            state = torch.random.get_rng_state()
            try:
                torch.manual_seed(0)
                module, inputs = build()
                return lively(module), inputs
            finally:
                torch.random.set_rng_state(state)

        PATTERNS[build.__name__] = Pattern(make, free, own)
        return make

    return add


def lively(module: nn.Module) -> nn.Module:
    """Biases, norms and running statistics moved off 0 and 1, so that a lost one shows."""
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if not t.is_floating_point():
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 2)
            elif t.dim() <= 1 and "freq" not in name:
                t.add_(torch.randn_like(t) * 0.2)
    return module.eval()


def conv(i: int, o: int, k: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=bias)


def image(channels: int = 3, size: int = 8, batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(batch, channels, size, size),)


class Run(nn.Module):
    """A module whose forward is a function of it."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pattern({"0.weight": 8, "3.weight": 6})
def plain() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)
    ), image(batch=1)


@pattern({"a.weight": 8, "b.weight": 8, "d.weight": 6})
def residual() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.na(m.a(x)))
        y = m.c(F.relu(m.b(x)))
        x = F.relu(x + m.nc(y))
        return m.head(F.relu(m.d(x)).mean((2, 3)))

    return Run(forward, a=conv(3, 8), na=nn.BatchNorm2d(8), b=conv(8, 8), c=conv(8, 8),
               nc=nn.BatchNorm2d(8), d=conv(8, 6), head=nn.Linear(6, 5)), image()  # fmt: skip


@pattern({"stem.weight": 4, "c.weight": 6, "d.weight": 4, "e.weight": 4}, own=False)
def padded_shortcut() -> Made:
    """Stride-2 slicing and zero channels on both sides, as the CIFAR ResNets do it."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.d(F.relu(m.c(x)))[:, :, ::2, ::2]
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return m.head(F.relu(m.e(x)).mean((2, 3)))

    return Run(forward, stem=conv(3, 4), c=conv(4, 6), d=conv(6, 8), e=conv(8, 4),
               head=nn.Linear(4, 3)), image()  # fmt: skip


@pattern({"a.weight": 4, "b.weight": 6, "c.weight": 8})
def dense_block() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(torch.cat([x, a], 1)))
        c = F.relu(m.c(m.n(torch.cat([x, a, b], 1))))
        return m.head(torch.cat([a, b, c], 1).mean((2, 3)))

    return Run(forward, a=conv(3, 4), b=conv(7, 6), n=nn.BatchNorm2d(13), c=conv(13, 8),
               head=nn.Linear(18, 3)), image()  # fmt: skip


@pattern({"0.weight": 8, "6.weight": 12})
def depthwise() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), conv(8, 12, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 3),
    ), image()  # fmt: skip


@pattern({"0.weight": 4})
def depthwise_multiplier() -> Made:
    return nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), conv(8, 3)
    ), image()


@pattern({"0.weight": 4, "2.weight": 6, "4.weight": 5})
def grouped() -> Made:
    """Channel j of every group is a unit."""
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 5), nn.ReLU(), conv(5, 3)
    ), image()


@pattern({"0.weight": 4, "3.weight": 8})
def group_norm() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 8), nn.GroupNorm(8, 8), conv(8, 3)
    ), image()


@pattern({"0.weight": 8, "3.weight": 6})
def instance_norm() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 6), nn.InstanceNorm2d(6),
        nn.ReLU(), conv(6, 3),
    ), image()  # fmt: skip


@pattern({"0.weight": 4, "3.weight": 6})
def bare_norms() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(4, 8, affine=False), nn.ReLU(), conv(8, 6),
        nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 3),
    ), image()  # fmt: skip


@pattern({"a.weight": 8, "b.weight": 6, "c.weight": 4})
def one_dimensional() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.leaky_relu(m.n(m.a(x)))
        x = F.max_pool1d(F.prelu(m.b(x), m.slope), 2)
        return m.head(F.interpolate(m.c(x).tanh(), scale_factor=2).mean(-1))

    return Run(forward, a=nn.Conv1d(3, 8, 3), n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 6, 3),
               slope=nn.Parameter(torch.rand(6)), c=nn.Conv1d(6, 4, 1), head=nn.Linear(4, 3)), (
        torch.randn(2, 3, 20),
    )  # fmt: skip


@pattern({"q": 4, "o.weight": 12, "q:2": 5})
def einsum_attention() -> Made:
    """Raw projections (channels, heads, size): heads, and the sizes of queries, are axes."""

    def forward(m: Run, x: Tensor) -> Tensor:
        q, k = torch.einsum("btc,chd->bthd", x, m.q), torch.einsum("btc,chd->bthd", x, m.k)
        w = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) * 5**-0.5, -1)
        y = torch.einsum("bhts,bshe->bthe", w, torch.einsum("btc,che->bthe", x, m.v))
        return m.head(F.relu(m.o(y.flatten(2))))

    shapes = {"q": (16, 4, 5), "k": (16, 4, 5), "v": (16, 4, 6)}
    raw = {name: nn.Parameter(torch.randn(shape) / 4) for name, shape in shapes.items()}
    return Run(forward, **raw, o=nn.Linear(24, 12), head=nn.Linear(12, 3)), _tokens()


@pattern({"up.weight": 12})
def layer_norm() -> Made:
    """The stream cannot shrink: the norm's mean is over all of it."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.down(F.gelu(m.up(m.norm(x))))
        return m.head(x)

    return Run(forward, stem=nn.Linear(5, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 12),
               down=nn.Linear(12, 8), head=nn.Linear(8, 3)), (torch.randn(2, 7, 5),)  # fmt: skip


@pattern({"up.weight": 12})
def written_out_rms_norm() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale
        return m.head(x + m.down(F.silu(m.up(y))))

    scale = nn.Parameter(torch.ones(8))
    return Run(forward, stem=nn.Linear(5, 8), scale=scale, up=nn.Linear(8, 12),
               down=nn.Linear(12, 8), head=nn.Linear(8, 3)), (torch.randn(2, 7, 5),)  # fmt: skip


@pattern({"a.weight": 8, "squeeze.weight": 4})
def squeeze_excitation() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        s = torch.sigmoid(m.excite(F.relu(m.squeeze(x.mean((2, 3), keepdim=True)))))
        return m.b(x * s)

    return Run(forward, a=conv(3, 8), squeeze=conv(8, 4, 1), excite=conv(4, 8, 1),
               b=conv(8, 3)), image()  # fmt: skip


@pattern({"0.weight": 6, "4.weight": 10})
def flatten_to_linear() -> Made:
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(),
        nn.Linear(10, 3),
    ), image()  # fmt: skip


def _shuffle(x: Tensor, groups: int, static: bool) -> Tensor:
    b, c, h, w = (x.shape[0], 8, 8, 8) if static else x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@pattern({"a.weight": 4, "b.weight": 6}, own=True)
def channel_shuffle() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = _shuffle(F.relu(m.a(x)), 2, static=False)
        return m.head(F.relu(m.b(x)))

    return Run(forward, a=conv(3, 8), b=conv(8, 6), head=conv(6, 3)), image()


@pattern({"a.weight": 4, "b.weight": 6}, own=False)
def static_channel_shuffle() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = _shuffle(F.relu(m.a(x)), 2, static=True)
        return m.head(F.relu(m.b(x)))

    return Run(forward, a=conv(3, 8), b=conv(8, 6), head=conv(6, 3)), image()


@pattern({"0.weight": 4, "3.weight": 5})
def pixel_shuffle() -> Made:
    return nn.Sequential(
        conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 5), nn.ReLU(), nn.PixelUnshuffle(2),
        conv(20, 3),
    ), image()  # fmt: skip


@pattern({"up.weight": 6, "gate.weight": 5})
def chunk_and_glu() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.head(F.glu(m.gate(m.down(F.silu(a) * b)), -1))

    return Run(forward, up=nn.Linear(5, 12), down=nn.Linear(6, 1), gate=nn.Linear(1, 10),
               head=nn.Linear(5, 3)), (torch.randn(2, 7, 5),)  # fmt: skip


@pattern({"a.weight": 4, "a.weight:2": 4, "b.weight": 5, "c.weight": 6}, own=None)
def halves() -> Made:
    """Two halves of a layer's outputs go different ways, and need not stay equal."""

    def forward(m: Run, x: Tensor) -> Tensor:
        left, right = F.relu(m.a(x)).chunk(2, 1)
        return m.head(torch.cat([F.relu(m.b(left)), F.relu(m.c(right))], 1))

    return Run(forward, a=conv(3, 8), b=conv(4, 5), c=conv(4, 6), head=conv(11, 3)), image()


@pattern({"w": 8, "v": 6})
def einsum() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = torch.einsum("btc,dc->btd", x, m.w).relu()
        x = torch.einsum("...d,ed->...e", x, m.v)
        return m.head(x.tanh())

    return Run(forward, w=nn.Parameter(torch.randn(8, 5)), v=nn.Parameter(torch.randn(6, 8)),
               head=nn.Linear(6, 3)), (torch.randn(2, 7, 5),)  # fmt: skip


@pattern({"w": 8})
def functional_convolution() -> Made:
    """Raw parameters, one of them stored (in, out)."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, m.w, m.b, padding=1))
        return F.conv2d(x, m.v.permute(1, 0, 2, 3))

    return Run(forward, w=nn.Parameter(torch.randn(8, 3, 3, 3)), b=nn.Parameter(torch.randn(8)),
               v=nn.Parameter(torch.randn(8, 4, 1, 1))), image()  # fmt: skip


@pattern({"a.weight": 8, "b.weight": 8})
def learned_scale() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.a(x) * m.scale + m.shift
        x = x + m.gamma * m.c(F.gelu(m.b(x))).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return m.head(x)

    return Run(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=conv(8, 3),
               scale=nn.Parameter(torch.randn(1, 8, 1, 1)),
               gamma=nn.Parameter(torch.randn(8, 1, 1)),
               shift=nn.Parameter(torch.randn(8, 1, 1))), image()  # fmt: skip


@pattern({"up.weight": 16})
def convnext_block() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.dw(x).permute(0, 2, 3, 1))
        y = m.gamma * m.down(F.gelu(m.up(y)))
        return m.head((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))

    return Run(forward, stem=conv(3, 8), dw=conv(8, 8, 7, groups=8), norm=nn.LayerNorm(8),
               up=nn.Linear(8, 16), down=nn.Linear(16, 8), gamma=nn.Parameter(torch.randn(8)),
               head=nn.Linear(8, 3)), image()  # fmt: skip


@pattern({"a.weight": 8, "b.weight": 6})
def detached_branches() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        with torch.no_grad():
            gate = torch.sigmoid(m.gate(x.detach()))
        return m.head(F.relu(m.b(x * gate)) + 0.5)

    return Run(forward, a=conv(3, 8), gate=conv(8, 8, 1), b=conv(8, 6), head=conv(6, 3)), image()


@pattern({"stem.weight": 8})
def reused() -> Made:
    """One layer called twice ties its inputs to its outputs."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.again(F.relu(m.again(m.stem(x)))))
        return m.head(x)

    return Run(forward, again=nn.Linear(8, 8), stem=nn.Linear(5, 8), head=nn.Linear(8, 3)), (
        torch.randn(2, 5),
    )


@pattern({"stem.weight": 8})
def transposed() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        return m.head(F.relu(m.up(F.relu(m.stem(x)))))

    return Run(
        forward, stem=conv(3, 8), up=nn.ConvTranspose2d(8, 6, 2, 2), head=conv(6, 3)
    ), image()


PATTERNS["transposed"].free["up.weight"] = 6


@pattern({"attention.in_proj_weight": 4}, own=False)
def multihead_attention() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        return x + m.attention(x, x, x, need_weights=False)[0]

    return Run(forward, attention=nn.MultiheadAttention(16, 4, batch_first=True)), (
        torch.randn(2, 5, 16),
    )


class Attention(nn.Module):
    """Separate or fused projections, grouped queries, rotary embeddings, written out or fused."""

    def __init__(self, fused: bool, kv_heads: int = 4, rotary: bool = False, manual: bool = False,
                 norm: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads, self.size = 4, kv_heads, 6
        self.fused, self.manual = fused, manual
        inner, kv = 4 * 6, kv_heads * 6
        if fused:
            self.qkv = nn.Linear(16, 3 * inner)
        else:
            self.q, self.k, self.v = nn.Linear(16, inner), nn.Linear(16, kv), nn.Linear(16, kv)
        self.o = nn.Linear(inner, 16)
        self.q_norm = nn.LayerNorm(6) if norm else None
        if rotary:
            self.register_buffer("freq", 1 / 100 ** (torch.arange(0, 6, 2) / 6))

    def rotate(self, x: Tensor) -> Tensor:
        if not hasattr(self, "freq"):
            return x
        angles = torch.arange(x.shape[-2])[:, None] * self.freq[None]
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(b, t, self.num_heads, self.size).transpose(1, 2)
            k = self.k(x).view(b, t, self.num_kv_heads, self.size).transpose(1, 2)
            v = self.v(x).view(b, t, self.num_kv_heads, self.size).transpose(1, 2)
        if self.q_norm is not None:
            q = self.q_norm(q)
        q, k = self.rotate(q), self.rotate(k)
        if self.manual:
            weights = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1)
            y = weights @ v
        else:
            grouped = self.num_heads != self.num_kv_heads
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return x + self.o(y.transpose(1, 2).flatten(2))


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 16),)


@pattern({"qkv.weight": 4})
def fused_attention() -> Made:
    return Attention(fused=True), _tokens()


@pattern({"q.weight": 4})
def separate_attention() -> Made:
    return Attention(fused=False, norm=True), _tokens()


@pattern({"q.weight": 4})
def written_out_attention() -> Made:
    return Attention(fused=False, manual=True), _tokens()


@pattern({"q.weight": 2})
def grouped_query_rotary() -> Made:
    return Attention(fused=False, kv_heads=2, rotary=True), _tokens()


@pattern({"table.weight": 8, "lstm.weight_ih_l0": 6})
def lstm() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        return m.head(m.lstm(m.table(x))[0][:, -1])

    return Run(forward, table=nn.Embedding(11, 8), head=nn.Linear(12, 3),
               lstm=nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)), (
        torch.arange(10).reshape(2, 5),
    )  # fmt: skip


@pattern({"stem.weight": 8, "gru.weight_ih_l0": 6})
def gru() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        y, last = m.gru(F.relu(m.stem(x)))
        return m.head(y) + m.other(last[-1])[:, None]

    return Run(forward, stem=nn.Linear(4, 8), gru=nn.GRU(8, 6, 2, batch_first=True),
               head=nn.Linear(6, 3), other=nn.Linear(6, 3)), (torch.randn(2, 5, 4),)  # fmt: skip


@pattern({"table.weight": 8, "up.weight": 12})
def tied_embedding() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.table(x)
        x = x + m.down(F.relu(m.up(x)))
        return m.head(x)

    m = Run(forward, table=nn.Embedding(11, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8),
            head=nn.Linear(8, 11, bias=False))  # fmt: skip
    m.head.weight = m.table.weight
    return m, (torch.arange(10).reshape(2, 5),)


@pattern({"up.weight": 12})
def learned_positions() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = x + m.down(F.gelu(m.up(m.norm(x))))
        return m.head(x[:, 0])

    return Run(forward, patch=nn.Conv2d(3, 8, 4, 4), token=nn.Parameter(torch.randn(1, 1, 8)),
               position=nn.Parameter(torch.randn(1, 5, 8)), norm=nn.LayerNorm(8),
               up=nn.Linear(8, 12), down=nn.Linear(12, 8),
               head=nn.Linear(8, 3)), image()  # fmt: skip


@pattern({"b.weight": 6})
def unknown_operator() -> Made:
    """What an operator without a rule touches is locked; the rest is not."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = torch.sort(m.a(x), dim=1).values
        return m.c(F.relu(m.b(x)))

    return Run(forward, a=conv(3, 8), b=conv(8, 6), c=conv(6, 3)), image()
