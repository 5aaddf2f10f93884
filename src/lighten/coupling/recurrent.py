"""LSTM, GRU and plain recurrent layers: hidden unit j of all gates, layers and directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lighten.coupling.labels import Labels, Value
from lighten.coupling.products import contract
from lighten.coupling.trace import Args, Trace, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(t: Trace, a: Args) -> Any:
    """One state tensor holds all layers and directions, so they have one width."""
    name = str(t.node.target._schema.name).split("::")[1] if t.node else ""  # type: ignore[union-attr]
    gates = _GATES[name]
    x: Value = a["input"]
    params: list[Value] = list(a["params"])
    ways = 2 if a["bidirectional"] else 1
    cells = a["num_layers"] * ways
    per = len(params) // cells
    projected = per in (3, 5)
    ids = [_cell(t, params[i * per : (i + 1) * per], gates, projected) for i in range(cells)]
    hidden, state = ids[0]
    for other, other_state in ids[1:]:
        t.unite(hidden, other)
        t.unite(state, other_state)
    rank = len(x.shape)
    batch = [f"b{i}" for i in range(rank - 1)]
    for i in range(cells):
        w = params[i * per]
        if i < ways:
            contract(t, [(x, [*batch, "i"]), (w, ["o", "i"])], [*batch, "o"])
        else:
            read = w.along(1)[0]
            t.role(w, read, "reads")
            t.unite(read.ids.reshape(-1), state.repeat(ways))
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    for k, h in enumerate(states):
        _initial(t, h, hidden if k == 1 else state)
    out = _last(state.repeat(ways), rank)
    ends = [_last(hidden if k == 1 else state, rank) for k in range(len(states))]
    return [Value((), (out,)), *(Value((), (e,)) for e in ends)]


def _cell(t: Trace, params: list[Value], gates: int, projected: bool) -> tuple[Tensor, Tensor]:
    """Labels of a cell's hidden units and of the state that it hands on."""
    w_ih, w_hh, *biases = params
    project = biases.pop() if projected else None
    hidden = w_ih.along(0)[0].ids.reshape(gates, -1)[0]
    for w in (w_ih, w_hh, *biases):
        rows = w.along(0)[0]
        t.role(w, rows, "writes" if len(w.shape) > 1 else "carries")
        t.unite(rows.ids.reshape(gates, -1), hidden)
    state = hidden
    if project is not None:
        rows, columns = project.along(0)[0], project.along(1)[0]
        t.role(project, rows, "writes")
        t.role(project, columns, "reads")
        t.unite(columns.ids.reshape(-1), hidden)
        state = rows.ids.reshape(-1)
    columns = w_hh.along(1)[0]
    t.role(w_hh, columns, "reads")
    t.unite(columns.ids.reshape(-1), state)
    return hidden, state


def _initial(t: Trace, h: Value, ids: Tensor) -> None:
    last = len(h.shape) - 1
    for y in h.labels:
        if last not in y.varies:
            t.lock(y, f"layers or batch of the state of {t.where}")
    found = h.along(last)
    if not found:
        t.classes.lock(ids, f"its first state in {t.where} cannot shrink")
    for y in found:
        t.unite(t.tie(y, y.varies - {last}, "a state").ids.reshape(-1), ids)


def _last(ids: Tensor, rank: int) -> Labels:
    return Labels(ids.reshape((1,) * (rank - 1) + (-1,)), zero=True)
