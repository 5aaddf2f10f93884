"""A network's float ONNX graph, with the places of its quantizers marked.

torch.onnx renames, decomposes and merges what it translates, so no name of the ATen graph is
certain to survive. An operator of our own that stands after each node of interest does: it becomes
an ONNX node of our own domain, whose only user replaces it by a quantizer.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, fx

from lighten.errors import BadInput, BadOutput, MissingPackage
from lighten.network import Network, export_graph
from lighten.onnx_pads import fold_pads
from lighten.quantized import Edge

DOMAIN = "lighten"
MARK = "Edge"
OPSET = 21
"""The first with 16-bit quantizers and 4-bit weights."""

_LIBRARY: Any = torch.library.Library("lighten", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("edge(Tensor x, str name) -> Tensor")
_LIBRARY.define("global_average(Tensor x) -> Tensor")
_LIBRARY.impl("edge", lambda x, name: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl(
    "global_average",
    lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "CompositeExplicitAutograd",
)

aten = torch.ops.aten
_CLIPS: dict[Any, Any] = {
    aten.relu.default: lambda args: (0.0, math.inf),
    aten.relu_.default: lambda args: (0.0, math.inf),
    aten.relu6.default: lambda args: (0.0, 6.0),
    aten.relu6_.default: lambda args: (0.0, 6.0),
    aten.hardtanh.default: lambda args: _bounds(args, -1.0, 1.0),
    aten.hardtanh_.default: lambda args: _bounds(args, -1.0, 1.0),
    aten.clamp.default: lambda args: _bounds(args, -math.inf, math.inf),
    aten.clamp_.default: lambda args: _bounds(args, -math.inf, math.inf),
    aten.clamp_min.default: lambda args: _bounds(args, -math.inf, math.inf),
}


def marked_model(network: Network, edges: Mapping[str, Edge]) -> Any:
    """An onnx.ModelProto, batch dynamic, with a node (DOMAIN, MARK) after the value of every graph
    node named in `edges`; its attribute `name` says which.

    A ReLU or clip whose quantizer saturates where it does is left out: the same numbers, and a
    runtime can fuse the operator before it. Raises BadInput, BadOutput.
    """
    program = export_graph(network.module, _two_samples(network.inputs), batch=True)
    for name, node in _places(network, program, edges).items():
        _mark(program, name, node, edges[name])
    _global_averages(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    model = _translated(program, network.source)
    found = sorted(mark_name(node) for node in model.graph.node if node.domain == DOMAIN)
    if found != sorted(edges):
        lost = sorted(set(edges) ^ set(found)) or found
        raise BadOutput(
            f"the quantizer of `{lost[0]}` has no place in the ONNX graph of {network.source}",
            "nothing uses that node's value, or torch.onnx merged it: quantize it no more",
        )
    fold_pads(model.graph, (DOMAIN, MARK))
    _clean(model, set(network.module.state_dict()))
    return model


def mark_name(node: Any) -> str:
    """Which graph node a mark stands for."""
    return next(str(a.s, "utf-8") for a in node.attribute if a.name == "name")


def _two_samples(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """torch.export takes a size of 1 for a constant: then the batch could not be dynamic."""
    return tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)


# -- marks ---------------------------------------------------------------------------------------
def _places(
    network: Network, program: torch.export.ExportedProgram, edges: Mapping[str, Edge]
) -> dict[str, fx.Node]:
    """The nodes of `program` that compute what the nodes of network.graph named in `edges` do.

    Both come from one module, so their tensor operators stand in the same order; the batched graph
    only has computations of sizes in between. Raises BadOutput where they do not.
    """
    if not edges:
        return {}
    ours = list(_computing(network.graph.graph))
    theirs = list(_computing(program.graph))
    if [n.target for n in ours] != [n.target for n in theirs]:
        raise BadOutput(
            f"{network.source} computes other operators with a batch of any size than with"
            f" {network.inputs[0].shape[0]}",
            "its forward looks at the batch size: let it treat every sample alike",
        )
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    users = set(program.graph_signature.user_inputs)
    inputs = [n for n in inputs if n.name in users]
    named = {n.name: t for n, t in zip(ours, theirs, strict=True)}
    holders = [n for n in network.graph.graph.nodes if n.op == "placeholder"]
    named |= {n.name: t for n, t in zip(holders, inputs, strict=True)}
    for name in edges:
        if name not in named:
            raise BadOutput(
                f"{network.source} has no graph node `{name}` to quantize",
                "edges are named after the nodes of network.graph",
            )
        if not isinstance(named[name].meta.get("val"), Tensor):
            raise BadOutput(f"graph node `{name}` is not a tensor", "quantize its parts")
    return {name: named[name] for name in edges}


def _computing(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        sizes = not isinstance(node.meta.get("val"), Tensor | tuple | list)
        if node.op == "call_function" and not sizes:
            yield node


def _mark(program: torch.export.ExportedProgram, name: str, node: fx.Node, edge: Edge) -> None:
    """Put the mark after `node` and let all its users read the mark."""
    source = node
    if _saturates(node, edge):
        (source,) = node.all_input_nodes
    with program.graph.inserting_after(node):
        mark = program.graph.call_function(torch.ops.lighten.edge.default, (source, name))
    mark.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(mark, delete_user_cb=lambda user: user is not mark)
    program.graph_signature.replace_all_uses(node.name, mark.name)
    if source is not node:
        program.graph.erase_node(node)


def _saturates(node: fx.Node, edge: Edge) -> bool:
    """Whether rounding to the edge alone gives what clipping first and rounding then gives.

    Never said of more than 8 bits: nothing is fused there, and OpenVINO takes such quantizers out.
    """
    if edge.bits > 8 or node.target not in _CLIPS or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    if len(source.users) != 1 or source.target is torch.ops.lighten.edge.default:
        return False
    low, high = _CLIPS[node.target](node.args)
    return bool(edge.low > low - edge.scale / 2 and edge.high < high + edge.scale / 2)


def _bounds(args: Sequence[Any], low: float, high: float) -> tuple[float, float]:
    given = [*args[1:], None, None][:2]
    return tuple(d if v is None else float(v) for v, d in zip(given, (low, high), strict=True))  # type: ignore[return-value]


def _global_averages(graph: fx.Graph) -> None:
    """Say `mean over all of the image` in one operator: runtimes have an int8 one for it."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rank = node.args[0].meta["val"].dim() if _is_mean(node) else 0
        if rank < 3 or not _over_image(node, rank):
            continue
        with graph.inserting_before(node):
            whole = graph.call_function(torch.ops.lighten.global_average.default, (node.args[0],))
            value = node.meta["val"]
            whole.meta["val"] = node.args[0].meta["val"].mean(tuple(range(2, rank)), keepdim=True)
            new = whole
            if value.dim() == 2:
                new = graph.call_function(aten.flatten.using_ints, (whole, 1))
                new.meta["val"] = value
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_mean(node: fx.Node) -> bool:
    return node.target in (
        aten.mean.dim, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    )  # fmt: skip


def _over_image(node: fx.Node, rank: int) -> bool:
    sizes = node.args[1]
    if not isinstance(sizes, Sequence):
        return False
    if node.target is not aten.mean.dim:
        return rank == len(sizes) + 2 and all(s == 1 for s in sizes)
    if node.kwargs.get("dtype") is not None or node.name in _outputs(node.graph):
        return False
    return sorted(int(d) % rank for d in sizes) == list(range(2, rank))  # type: ignore[arg-type]


def _outputs(graph: fx.Graph) -> set[str]:
    return {n.name for n in graph.output_node().all_input_nodes}


# -- translation ---------------------------------------------------------------------------------
def _translated(program: torch.export.ExportedProgram, source: str) -> Any:
    try:
        import onnxscript
        from onnx.defs import OpSchema
    except ImportError as error:
        raise MissingPackage(
            f"writing ONNX needs the packages `onnx` and `onnxscript`: {error}",
            "pip install lighten[onnx]",
        ) from error
    op = onnxscript.values.Opset("", OPSET)
    schema = OpSchema(
        MARK, DOMAIN, 1, inputs=[OpSchema.FormalParameter("x", "tensor(float)")],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        attributes=[OpSchema.Attribute("name", OpSchema.AttrType.STRING)],
    )  # fmt: skip
    mark = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), MARK, schema)

    def edge(x: Any, name: str) -> Any:
        return mark(x, name=name)

    def average(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        """One Gemm of the weight as it is stored, whatever the rank: it can be fused as int8."""
        given = (weight,) if bias is None else (weight, bias)
        if len(x.shape) == 2:
            return op.Gemm(x, *given, transB=1)
        between = [d if isinstance(d, int) else -1 for d in x.shape[:-1]]
        if len(x.shape) == 1 or between.count(-1) > 1:
            found = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
            return found if bias is None else op.Add(found, bias)
        rows = op.Reshape(x, op.Constant(value_ints=[-1, weight.shape[1]]))
        found = op.Gemm(rows, *given, transB=1)
        return op.Reshape(found, op.Constant(value_ints=[*between, weight.shape[0]]))

    table: dict[Any, Any] = {
        torch.ops.lighten.edge.default: edge,
        torch.ops.lighten.global_average.default: average,
        aten.linear.default: linear,
    }
    try:
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(
                program, dynamo=True, optimize=True, verbose=False, opset_version=OPSET,
                custom_translation_table=table,
            )  # fmt: skip
    except Exception as error:  # dozens of kinds, most of them with a report of many lines
        first = str(error.__cause__ or error).strip().splitlines() or [""]
        raise BadInput(
            f"torch.onnx cannot translate {source}: {type(error).__name__}: {first[0]}",
            "an operator that ONNX lacks has to be rewritten with others",
        ) from error
    assert made is not None
    return made.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of packages that it does not need and of its own old calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _clean(model: Any, parameters: set[str]) -> None:
    """Remove what tells of the machine (stack traces, paths) and what goes stale; outputs are
    called `output`, constants that are no parameter have a `/` in their name."""
    model.producer_name, model.producer_version = "lighten", version("lighten")
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "network", ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
    names = {t.name: f"/{t.name}" for t in graph.initializer if t.name not in parameters}
    many = len(graph.output) > 1
    names |= {o.name: f"output_{i}" if many else "output" for i, o in enumerate(graph.output)}
    for item in (*graph.initializer, *graph.output):
        item.name = names.get(item.name, item.name)
    for node in graph.node:
        for names_of in (node.input, node.output):
            names_of[:] = [names.get(n, n) for n in names_of]
    for value in (*graph.input, *graph.output):
        for i, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = "batch" if i == 0 else f"{value.name}_{i}"
