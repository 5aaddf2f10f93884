"""Patterns of what lies between layers: einsums, norms, views, shuffles, splits, scales, reuse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pattern_parts import PATTERNS, Made, Run, conv, image, pattern, tokens


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
    return Run(forward, **raw, o=nn.Linear(24, 12), head=nn.Linear(12, 3)), tokens()


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
