"""What each operation of a network does to the axes of its arguments: the rules by which flow.py follows channels.

A rule gets the watch, the arguments `a` by the names of the operation's schema, and the outputs; it unifies and fixes factors and returns
the axes of each output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from attar.stages.compress.flow import Axis, Watch


def elementwise(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """Broadcasting: axes at one place, counted from the last, are the same."""
    tensors = [leaf for leaf in tree_leaves(a) if isinstance(leaf, Tensor)]
    axes: list[Axis] = [()] * max((tensor.dim() for tensor in tensors), default=0)
    for tensor in tensors:
        for place, axis in enumerate(reversed(watch.of(tensor))):
            if axes[-1 - place] and axis:
                watch.factors.unify(axes[-1 - place], axis)
            axes[-1 - place] = axes[-1 - place] or axis
    if len(tensors) == 1:
        _inherit(watch, tensors[0], outputs)
    return [axes] * len(outputs)


def _inherit(watch: Watch, source: Tensor, outputs: Iterable[Tensor]) -> None:
    """A view or a copy of a layer's weight is that weight."""
    if id(source) in watch.matrices:
        watch.matrices.update(id(output) for output in outputs)


def _created(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    return [[watch.factors.fresh(size) for size in output.shape] for output in outputs]


def _view(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    _inherit(watch, a["self"], outputs)
    return [watch.factors.regroup(watch.of(a["self"]), outputs[0].shape)]


def _strided(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """Pooling to one place ends with strides set by hand: nothing to follow where one axis is longer than 1, all to lose where several are."""
    if sum(size > 1 for size in outputs[0].shape) > 1:
        watch.fix(a["self"], "strides set by hand")
    return _view(watch, a, outputs)


def permute(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["self"])
    order = list(range(len(axes)))
    if "dims" in a:
        order = [dim % len(axes) for dim in a["dims"]]
    elif len(axes) > 1:  # t, or transpose with its two
        one, two = a.get("dim0", 0), a.get("dim1", 1)
        order[one], order[two] = order[two], order[one]
    _inherit(watch, a["self"], outputs)
    return [[axes[dim] for dim in order]]


def _expand(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["self"])
    axes = [()] * (outputs[0].dim() - len(axes)) + axes
    _inherit(watch, a["self"], outputs)
    return [[axis or watch.factors.fresh(size) for axis, size in zip(axes, outputs[0].shape)]]


def _repeat(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["self"])
    axes = [()] * (outputs[0].dim() - len(axes)) + axes
    return [[watch.factors.fresh(times) + axis for axis, times in zip(axes, a["repeats"])]]


def _contract(watch: Watch, one: Axis, two: Axis, operands: Sequence[Tensor]) -> None:
    """Summing over an axis: with a layer's weights its entries may go, as the layer can be repaired; between activations not."""
    watch.factors.unify(one, two)
    if not any(id(operand) in watch.matrices for operand in operands):
        watch.factors.fix(one, "product of activations")


def _matmul(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """(…, m, k) @ (…, k, n), with or without something added."""
    names = [("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2")]
    one, two = next((a[x], a[y]) for x, y in names if x in a and y in a)
    left, right = watch.of(one), watch.of(two)
    for x, y in zip(left[:-2], right[:-2]):
        watch.factors.unify(x, y)
    _contract(watch, left[-1], right[-2], (one, two))
    axes = [*left[:-1], right[-1]]
    if one is not a["self"]:
        for x, y in zip(reversed(watch.of(a["self"])), reversed(axes)):
            if x:
                watch.factors.unify(x, y)
    return [axes]


def _convolution(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    x, w = watch.of(a["input"]), watch.of(a["weight"])
    for axis in (*x[2:], *w[2:]):
        watch.factors.fix(axis, "space")
    space = [watch.factors.fresh(size) for size in outputs[0].shape[2:]]
    for axis in space:
        watch.factors.fix(axis, "space")
    made, taken = (w[1], w[0]) if a["transposed"] else (w[0], w[1])
    if (
        id(a["weight"]) not in watch.matrices
    ):  # three dimensions, transposed, weights that are computed: they may make channels, not read them
        watch.factors.fix((*x[1], *taken, *(made if a["groups"] > 1 else ())), "read by a convolution of another kind")
    elif a["groups"] > 1:
        number = watch.factors.fresh(a["groups"])
        watch.factors.unify(x[1], number + taken)
        watch.factors.unify(made, number + watch.factors.fresh(outputs[0].shape[1] // a["groups"]))
        watch.split[watch.names.get(id(a["weight"]), "")] = number
    else:
        _contract(watch, x[1], taken, (a["weight"],))
    if a.get("bias") is not None:
        watch.factors.unify(watch.of(a["bias"])[0], made)
    return [[x[0], made, *space]]


def batch_norm(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name) is not None:
            watch.factors.unify(axes[1], watch.of(a[name])[0])
    return [axes]


def _layer_norm(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["input"])
    for axis in axes[-len(a["normalized_shape"]) :]:
        watch.factors.fix(axis, "layer norm over the channels")
    return [axes]


def _group_norm(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["input"])
    watch.factors.fix(axes[1], "group norm over the channels")
    return [axes]


def _over(reason: str) -> Callable[[Watch, dict[str, Any], Sequence[Tensor]], list[list[Axis]]]:
    """Operations that mix the entries of the axes `dim` (or `dims`) and keep their number."""

    def rule(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
        axes, dims = watch.of(a["self"]), a.get("dims", a.get("dim"))
        for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
            watch.factors.fix(axes[dim], f"{reason} over the channels")
        return [axes]

    return rule


def _reduce(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes, dims = watch.of(a["self"]), a.get("dim")
    gone = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims or range(len(axes)))}
    for dim in gone:
        watch.factors.fix(axes[dim], "mean or norm over the channels")
    kept = [() if place in gone else axis for place, axis in enumerate(axes) if a.get("keepdim") or place not in gone]
    return [kept] * len(outputs)


def _spatial(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """Pooling and resampling: all but the leading axes (items, channels) become others."""
    axes = watch.of(next(a[name] for name in ("self", "input") if name in a))
    for axis in axes[2:]:
        watch.factors.fix(axis, "space")
    return [[*axes[:2], *(watch.factors.fresh(size) for size in output.shape[2:])] for output in outputs]


def _pad(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = list(watch.of(a["self"]))
    for place, size in enumerate(outputs[0].shape):
        if size != a["self"].shape[place]:
            watch.factors.fix(axes[place], "channels are padded")
            axes[place] = watch.factors.fresh(size)
            watch.factors.fix(axes[place], "channels are padded")
    return [axes]


def _cat(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    parts = [part for part in a["tensors"] if part.numel()]
    axes = list(watch.of(parts[0]))
    dim = a.get("dim", 0) % len(axes)
    for part in parts[1:]:
        for place, axis in enumerate(watch.of(part)):
            if place != dim:
                watch.factors.unify(axes[place], axis)
    if len(parts) > 1:
        for part in parts:
            watch.factors.fix(watch.of(part)[dim], "channels are joined to others")
        axes[dim] = watch.factors.fresh(outputs[0].shape[dim])
        watch.factors.fix(axes[dim], "channels are joined to others")
    return [axes]


def _stack(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    (axes,) = elementwise(watch, {"tensors": a["tensors"]}, outputs)
    dim = a.get("dim", 0) % outputs[0].dim()
    return [[*axes[:dim], watch.factors.fresh(len(a["tensors"])), *axes[dim:]]]


def _piece(watch: Watch, axis: Axis, size: int, start: int, length: int, step: int = 1) -> Axis:
    """Part of an axis: one of several equal parts (as of a joint query-key-value layer) keeps its factors, any other piece does not."""
    if length == size:
        return axis
    if step == 1 and length > 1 and size % length == 0 and start % length == 0:
        which, part = watch.factors.regroup([axis], (size // length, length))
        watch.factors.fix(which, "channels are sliced")
        return part
    made = watch.factors.fresh(length)
    watch.factors.fix((*axis, *made), "channels are sliced")
    return made


def _slice(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = list(watch.of(a["self"]))
    dim = a.get("dim", 0) % len(axes)
    size, start = a["self"].shape[dim], a.get("start") or 0
    start = max(0, start + size if start < 0 else start)
    axes[dim] = _piece(watch, axes[dim], size, start, outputs[0].shape[dim], a.get("step", 1))
    return [axes]


def _split(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    axes = watch.of(a["self"])
    dim, start, made = a.get("dim", 0) % len(axes), 0, []
    for output in outputs:
        part = _piece(watch, axes[dim], a["self"].shape[dim], start, output.shape[dim])
        made.append([*axes[:dim], part, *axes[dim + 1 :]])
        start += output.shape[dim]
    return made


def _select(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """One entry of an axis (select), or each of them (unbind)."""
    axes = watch.of(a["self"])
    dim = a.get("dim", 0) % len(axes)
    watch.factors.fix(axes[dim], "channels are sliced")
    return [[*axes[:dim], *axes[dim + 1 :]]] * len(outputs)


def _index(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """Rows chosen by tables of integers, as of a table of relative positions; the other axes stay."""
    axes, indices = watch.of(a["self"]), a["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    for place in places:
        watch.factors.fix(axes[place], "channels are indexed")
    (rows,) = elementwise(watch, {"indices": [indices[place] for place in places]}, outputs)
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest = [axis for place, axis in enumerate(axes) if place not in places]
    return [[*rest[:first], *rows, *rest[first:]]]


def _embedding(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    table, rows = watch.of(a["weight"]), watch.of(a["indices"])
    watch.factors.fix(table[0], "channels are indexed")
    return [[*rows, table[1]]]


def _attention(watch: Watch, a: dict[str, Any], outputs: Sequence[Tensor]) -> list[list[Axis]]:
    """softmax(q kᵀ + mask) v for q (n, heads, t, d), k (n, heads, s, d), v (n, heads, s, e): heads stay apart, d and s are summed over."""
    q, k, v = (watch.of(a[name]) for name in ("query", "key", "value"))
    for place in (0, 1):
        watch.factors.unify(q[place], k[place])
        watch.factors.unify(q[place], v[place])
    _contract(watch, q[3], k[3], ())
    _contract(watch, k[2], v[2], ())
    mask = a.get("attn_mask") if a.get("attn_mask") is not None else a.get("attn_bias")
    if mask is not None:
        for axis, own in zip(reversed(watch.of(mask)), (k[2], q[2], q[1], q[0])):
            if axis:
                watch.factors.unify(own, axis)
    return [[q[0], q[1], q[2], v[3]]]


RULES: list[tuple[str, Callable[[Watch, dict[str, Any], Sequence[Tensor]], list[list[Axis]]]]] = [
    (
        r"to_copy|_to_copy|copy|detach|alias|lift_fresh|fill|zero|hardswish|_prelu_kernel|(native_)?dropout|floor_divide|.*_like",
        elementwise,
    ),
    (r"view|_unsafe_view|reshape|_reshape_alias|squeeze|unsqueeze", _view),
    (r"as_strided", _strided),
    (r"permute|transpose|t", permute),
    (r"expand", _expand),
    (r"repeat", _repeat),
    (r"mm|bmm|addmm|baddbmm", _matmul),
    (r"convolution", _convolution),
    (r"_?(native|cudnn|miopen)_batch_norm.*|_batch_norm_(no|with)_update", batch_norm),
    (r"native_layer_norm", _layer_norm),
    (r"native_group_norm", _group_norm),
    (r"_(log_)?softmax", _over("softmax")),
    (r"roll|flip", _over("shift")),
    (r"mean|sum|amax|amin|var|std|var_mean|linalg_vector_norm|norm", _reduce),
    (r".*pool[12]d(_with_indices)?|_?upsample_.*[12]d(_aa)?|(reflection|replication)_pad[12]d", _spatial),
    (r"constant_pad_nd", _pad),
    (r"cat", _cat),
    (r"stack", _stack),
    (r"slice", _slice),
    (r"split|split_with_sizes", _split),
    (r"select|unbind", _select),
    (r"index", _index),
    (r"embedding", _embedding),
    (r"_scaled_dot_product_.*attention.*", _attention),
    (r"new_.*|zeros|ones|full|empty|empty_strided|arange|linspace|eye|scalar_tensor|rand|randn", _created),
]
