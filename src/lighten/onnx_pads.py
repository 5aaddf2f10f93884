"""Zero padding of images, moved into the convolutions that read it.

Runtimes do so by themselves in a float graph; a quantizer between the padding and the convolution
keeps them from it, and then the padding is computed in float.
"""

from __future__ import annotations

from typing import Any


def fold_pads(graph: Any, mark: tuple[str, str]) -> None:
    """Change an onnx.GraphProto in place. mark: (domain, operator) of quantizers' places; these go
    before the padding, which is the same: every quantizer carries 0 exactly."""
    makers = {out: node for node in graph.node for out in node.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        before = _spatial_zeros(graph, pad)
        if before is None:
            continue
        end = pad.output[0]
        readers = _readers(graph, end)
        if len(readers) == 1 and (readers[0].domain, readers[0].op_type) == mark:
            swapped = readers[0]
            end = swapped.output[0]
            readers = _readers(graph, end)
        else:
            swapped = None
        if not readers or not all(_takes_pads(node, end) for node in readers):
            continue
        if end in {o.name for o in graph.output}:
            continue
        for conv in readers:
            _add_pads(conv, before)
            conv.input[0] = end if swapped is not None else pad.input[0]
        if swapped is not None:
            swapped.input[0] = pad.input[0]
        graph.node.remove(makers[pad.output[0]])


def _spatial_zeros(graph: Any, pad: Any) -> list[int] | None:
    """[before..., after...] of the spatial dimensions where a Pad adds zeros to these only."""
    from onnx import numpy_helper

    constants = {t.name: t for t in graph.initializer}
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    if mode != b"constant" or pad.input[1] not in constants:
        return None
    if len(pad.input) > 2 and pad.input[2]:
        value = constants.get(pad.input[2])
        if value is None or float(numpy_helper.to_array(value)) != 0:
            return None
    if len(pad.input) > 3 and pad.input[3]:
        return None
    pads = numpy_helper.to_array(constants[pad.input[1]]).tolist()
    rank = len(pads) // 2
    outer = [*pads[:2], *pads[rank : rank + 2]]
    if rank < 3 or any(outer) or min(pads) < 0:
        return None
    return [int(p) for p in (*pads[2:rank], *pads[rank + 2 :])]


def _readers(graph: Any, value: str) -> list[Any]:
    return [node for node in graph.node if value in node.input]


def _takes_pads(node: Any, value: str) -> bool:
    auto = next((a.s for a in node.attribute if a.name == "auto_pad"), b"NOTSET")
    first = node.input[0] == value and list(node.input).count(value) == 1
    return bool(node.op_type == "Conv" and first and auto == b"NOTSET")


def _add_pads(conv: Any, pads: list[int]) -> None:
    from onnx import helper

    own = next((list(a.ints) for a in conv.attribute if a.name == "pads"), [0] * len(pads))
    kept = [a for a in conv.attribute if a.name != "pads"]
    del conv.attribute[:]
    conv.attribute.extend(kept)
    both = [a + b for a, b in zip(own, pads, strict=True)]
    conv.attribute.append(helper.make_attribute("pads", both))
