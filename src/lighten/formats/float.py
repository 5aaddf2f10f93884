"""float16, bfloat16 and float32: no grid, rounding to nearest even."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.registry import formats
from lighten.types import Grid, tensor_bytes


@dataclass(frozen=True)
class Float:
    """Plain numbers; the codes are the numbers in `dtype`. apart: see lighten.sparse."""

    name: str
    dtype: torch.dtype
    block: int = 1
    sub: int = 1
    step: int = 1
    apart: str = "bytes"

    @property
    def code_bits(self) -> int:
        return 8 * self.dtype.itemsize

    def bits(self, columns: int) -> float:
        return float(self.code_bits)

    def accepts(self, shape: tuple[int, int]) -> str | None:
        return None

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """An empty grid; raises BadInput for what becomes infinite in this type."""
        if not bool(torch.isfinite(w).all()):
            raise BadInput(
                f"{self.name}: the weight has NaN or infinite entries",
                "mend the model, or keep the layer",
            )
        if w.numel() and not bool(
            torch.isfinite(peak := w.abs().amax()).logical_and(torch.isfinite(peak.to(self.dtype)))
        ):
            raise BadInput(
                f"{self.name}: a weight of magnitude {float(peak):g} is larger than"
                f" {torch.finfo(self.dtype).max:g}",
                "choose bf16 or f32 for this layer",
            )
        return {}

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        return w.to(self.dtype)

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        return codes.float()

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """bytes (out, columns * size), little-endian as the machine is."""
        return {"bytes": self.pack_codes(codes)}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        return self.unpack_codes(packed["bytes"], shape[1]).reshape(shape), {}

    def pack_codes(self, codes: Tensor) -> Tensor:
        return tensor_bytes(codes)

    def unpack_codes(self, packed: Tensor, n: int) -> Tensor:
        return packed.contiguous().view(self.dtype).reshape(len(packed), n)


for _name, _dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)):
    formats(_name)(Float(_name, _dtype))
