"""Patterns of sequences: attention, recurrent layers, embeddings, positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pattern_parts import Made, Run, image, pattern, tokens


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


@pattern({"qkv.weight": 4})
def fused_attention() -> Made:
    return Attention(fused=True), tokens()


@pattern({"q.weight": 4})
def separate_attention() -> Made:
    return Attention(fused=False, norm=True), tokens()


@pattern({"q.weight": 4})
def written_out_attention() -> Made:
    return Attention(fused=False, manual=True), tokens()


@pattern({"q.weight": 2})
def grouped_query_rotary() -> Made:
    return Attention(fused=False, kv_heads=2, rotary=True), tokens()


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
