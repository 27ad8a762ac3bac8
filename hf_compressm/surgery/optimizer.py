"""Optimizer state under a change of basis of the state space.

When the parameters of a layer change as ``B' = M⁻ᵀ B`` their gradients change as ``g' = M g``. State that is linear in
the gradient follows the same map; state that is linear in the squared gradient follows its element-wise square, which
is exact for the mean and takes the deviations of the entries from it as uncorrelated.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .sharding import sharded_like, whole


@dataclass(frozen=True)
class GradientMap:
    """Linear map of the gradients of a group of parameters: ``g' = matrix @ g`` along `dim`, the group stacked there.

    Attributes:
        names: the parameters of the group, all of one shape.
        dim: the state dimension of these parameters.
        matrix: real, (len(names) * new states, len(names) * old states); or one for each index of the first dimension
            of the parameters, (G, len(names) * new states, len(names) * old states), and then `dim` is not 0.
    """

    names: tuple[str, ...]
    dim: int
    matrix: Tensor

    def apply(self, tensors: list[Tensor], squared: bool = False) -> list[Tensor]:
        """Map one tensor per parameter; `squared` takes the element-wise square of the matrix."""
        stacked = self._stack([t.double() for t in tensors])
        matrix = self.matrix.to(stacked.device)
        matrix = matrix.square() if squared else matrix
        return self._split(torch.einsum("rn,n...->r..." if matrix.dim() == 2 else "grn,gn...->gr...", matrix, stacked))

    def fill_silent(self, tensors: list[Tensor]) -> list[Tensor]:
        """Give directions that had no gradient so far the mean second moment of the others, so that their first steps
        are not divided by zero."""
        silent = (self.matrix == 0).all(dim=-1).to(tensors[0].device)
        if not silent.any() or silent.all():
            return tensors
        stacked = self._stack(tensors)
        stacked[silent] = stacked[~silent].mean(dim=0)
        return self._split(stacked)

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        """The tensors one after the other along `dim`, put behind the dimensions that the matrix is batched over."""
        return torch.cat(tensors, dim=self.dim).movedim(self.dim, self.matrix.dim() - 2)

    def _split(self, stacked: Tensor) -> list[Tensor]:
        return list(stacked.movedim(self.matrix.dim() - 2, self.dim).chunk(len(self.names), dim=self.dim))


@dataclass(frozen=True)
class _StateLayout:
    """Which entries of an optimizer's per-parameter state depend on the gradient, and how.

    `first` are averages of the gradient and `second` averages of its square, both bias-corrected by `betas` where the
    optimizer has them; `factored` are the row and column means of the squares; `restart` is set to zero because it
    holds preconditioned updates, which have no linear map.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    factored: tuple[str, str] | None = None
    restart: tuple[str, ...] = ()


_LAYOUTS = {
    "torch.Adam": _StateLayout(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")),
    "torch.AdamW": _StateLayout(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")),
    "torch.SGD": _StateLayout(("momentum_buffer",)),
    "torch.RMSprop": _StateLayout(("grad_avg",), ("square_avg",), restart=("momentum_buffer",)),
    "torch.Adagrad": _StateLayout((), ("sum",)),
    "torch.Adafactor": _StateLayout((), ("variance",), ("row_var", "col_var")),
    "transformers.Adafactor": _StateLayout(
        (), ("exp_avg_sq",), ("exp_avg_sq_row", "exp_avg_sq_col"), restart=("exp_avg",)
    ),
    "torch.Muon": _StateLayout(("momentum_buffer",)),
}


_ELSEWHERE = {"LBFGS", "ZeroRedundancyOptimizer", "LayerWiseDummyOptimizer"}
"""One flat history for all parameters; shards on other ranks; an optimizer per parameter behind a dummy."""


def _qualified_name(optimizer: Optimizer) -> str:
    """Package and class; the module between them moves from release to release."""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__qualname__}"


def unwrap_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that holds the state, below wrappers such as `accelerate.AcceleratedOptimizer`."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Optimizer | None, moments: str) -> None:
    """Refuse an optimizer whose state cannot follow a reduction.

    Raises:
        ValueError: its state has no known map and `moments` is "carry", or it keeps one state for all parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return
    name = _qualified_name(optimizer)
    if {cls.__name__ for cls in type(optimizer).__mro__} & _ELSEWHERE:
        raise ValueError(
            f"{name} keeps its state elsewhere than by parameter, where a reduction cannot reach it. Use one of "
            f"{', '.join(sorted(_LAYOUTS))}."
        )
    if moments == "carry" and name not in _LAYOUTS:
        raise ValueError(
            f"The state of the optimizer {name} cannot be carried through a reduction; expected one of "
            f"{', '.join(sorted(_LAYOUTS))}. "
            'Use one of these, or pass moments="reset" to drop the state of the reduced parameters.'
        )


def reset_state(optimizer: Optimizer | None, params: list[nn.Parameter]) -> None:
    """Drop the state of `params`; the optimizer starts it afresh, bias correction included, at its next step."""
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is not None:
        for param in params:
            optimizer.state.pop(param, None)


def carry_state(optimizer: Optimizer | None, params: Mapping[str, nn.Parameter], maps: list[GradientMap]) -> None:
    """Carry the state of the mapped parameters through a change of basis, and drop that of the others.

    To be called before the parameters themselves change shape.

    Args:
        optimizer: one that `check_optimizer` accepts with ``moments="carry"``, wrapped or not; None does nothing.
        params: every parameter whose shape changes, by name.
        maps: the gradient maps; a parameter that no map names has its state dropped.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return
    layout = _LAYOUTS[_qualified_name(optimizer)]
    betas = {id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]}
    carried = set()
    for gradient_map in maps:
        group = [params[name] for name in gradient_map.names]
        states = [optimizer.state.get(p) for p in group]
        if all(states):
            carried.update(gradient_map.names)
            _carry_group(states, [p.shape for p in group], betas[id(group[0])], gradient_map, layout)
    reset_state(optimizer, [p for name, p in params.items() if name not in carried])


def _carry_group(states: list[dict], shapes: list[torch.Size], betas, gradient_map: GradientMap, layout) -> None:
    """Replace, in place, the gradient-dependent entries of the states of one group of parameters."""
    first, second = _bias_corrections(states, betas)
    old_mean, new_mean = None, None
    for key in layout.first:
        if all(torch.is_tensor(s.get(key)) for s in states):
            old_mean = [whole(s[key]).double() / c for s, c in zip(states, first, strict=True)]
            new_mean = gradient_map.apply(old_mean)
            _store(states, key, [m * c for m, c in zip(new_mean, first, strict=True)])
    for key in layout.second:
        if all(torch.is_tensor(s.get(key)) for s in states):
            old = [whole(s[key]).double() / c for s, c in zip(states, second, strict=True)]
            new = _map_second_moments(gradient_map, old, old_mean, new_mean)
            _store(states, key, [v * c for v, c in zip(new, second, strict=True)])
    if layout.factored and all(torch.is_tensor(s.get(layout.factored[0])) for s in states):
        _carry_factored(states, shapes, gradient_map, layout.factored)
    for key in layout.restart:
        if all(torch.is_tensor(s.get(key)) for s in states):
            _store(states, key, [torch.zeros_like(t) for t in gradient_map.apply([whole(s[key]) for s in states])])


def _bias_corrections(states: list[dict], betas) -> tuple[list[float], list[float]]:
    """``1 - beta^step`` per parameter for both moments of Adam; ones for optimizers without betas."""
    if betas is None:
        return [1.0] * len(states), [1.0] * len(states)
    steps = [float(s["step"]) for s in states]
    return [1 - betas[0] ** t for t in steps], [1 - betas[1] ** t for t in steps]


def _map_second_moments(gradient_map: GradientMap, second, old_mean, new_mean) -> list[Tensor]:
    """``v' = (M∘M) max(v - m², 0) + m'²``, or ``(M∘M) v`` for optimizers that hold no mean."""
    if old_mean is None:
        return gradient_map.fill_silent(gradient_map.apply(second, squared=True))
    variance = [(v - m.square()).clamp_min(0) for v, m in zip(second, old_mean, strict=True)]
    mapped = gradient_map.apply(variance, squared=True)
    return gradient_map.fill_silent([v + m.square() for v, m in zip(mapped, new_mean, strict=True)])


def _carry_factored(states, shapes, gradient_map: GradientMap, keys: tuple[str, str]) -> None:
    """Adafactor: expand ``v ≈ row col / mean(row)`` over the last two dimensions, map it, and take means again."""
    second = []
    for state, shape in zip(states, shapes, strict=True):
        row = whole(state[keys[0]]).double().reshape(*shape[:-1], 1)
        col = whole(state[keys[1]]).double().reshape(*shape[:-2], 1, shape[-1])
        second.append(row @ col / row.mean(-2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    mapped = _map_second_moments(gradient_map, second, None, None)
    keepdim = states[0][keys[0]].dim() == len(shapes[0])
    _store(states, keys[0], [v.mean(dim=-1, keepdim=keepdim) for v in mapped])
    _store(states, keys[1], [v.mean(dim=-2, keepdim=keepdim) for v in mapped])


def _store(states: list[dict], key: str, tensors: list[Tensor]) -> None:
    for state, tensor in zip(states, tensors, strict=True):
        old = state[key]
        state[key] = sharded_like(tensor.to(device=old.device, dtype=old.dtype).contiguous(), old)


def check_adoption(optimizer: Optimizer | None, model: nn.Module, modules: list[nn.Module]) -> None:
    """Refuse an optimizer to which `adopt_parameters` could not give new parameters of `modules` without damage.

    Raises:
        ValueError: it takes matrices only, or the parameters of a group are not in the order of the model's.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return
    if _qualified_name(optimizer) == "torch.Muon":
        raise ValueError(
            "Muon takes matrices only, and a balanced reduction adds maps of three dimensions to this model's layers. "
            'Use method="selection" or another optimizer, for example AdamW.'
        )
    own = {id(p) for module in modules for p in module.parameters()}
    for group in optimizer.param_groups:
        if any(id(p) in own for p in group["params"]) and not _in_order(group, model):
            raise ValueError(
                "Expected the parameters in each group of the optimizer in the order of `model.parameters()`; found "
                "another order. A reduction adds parameters to this model, optimizer state is saved by position, and "
                "a resumed run would mix it up. Make the groups in the order of `model.named_parameters()`."
            )


def _in_order(group: dict, model: nn.Module) -> bool:
    known = _places(model)
    places = [known.get(id(p), math.inf) for p in group["params"]]
    return places == sorted(places)


def _places(model: nn.Module) -> dict[int, int]:
    return {id(p): place for place, p in enumerate(model.parameters())}


def adopt_parameters(
    optimizer: Optimizer | None, model: nn.Module, module: nn.Module, names: tuple[str, ...], beside: str
) -> None:
    """Give the parameters `names` of `module` to the optimizer, if it lacks them, in the group of `beside`.

    They take the place that an optimizer made from the present `model` would give them: states are saved by position,
    and a resumed run builds its optimizer anew.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = dict(module.named_parameters())
    new = [own[n] for n in names if n in own and own[n].requires_grad and id(own[n]) not in group_of]
    group = group_of.get(id(module.get_parameter(beside)))
    if not new or group is None:
        return  # a frozen layer stays out of the optimizer
    places = _places(model)
    group["params"].extend(new)
    group["params"].sort(key=lambda p: places.get(id(p), math.inf))


def release_parameters(optimizer: Optimizer | None, params: list[nn.Parameter]) -> None:
    """Take `params`, which their model no longer has, out of the optimizer: states are saved by position."""
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return
    reset_state(optimizer, params)
    gone = {id(param) for param in params}
    for group in optimizer.param_groups:
        group["params"][:] = [param for param in group["params"] if id(param) not in gone]


def drop_stale_state(optimizer: Optimizer | None, reshaped: Iterable[nn.Parameter] = ()) -> int:
    """Drop the state of parameters whose shape it does not fit, as after loading weights of other sizes.

    Args:
        optimizer: wrapped or not; None does nothing.
        reshaped: the parameters that are known to have changed shape. Of optimizers other than those of torch and
            transformers nothing else tells: their state may have shapes of its own (quantized, projected).

    Returns:
        How many parameters lost their state.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return 0
    name = _qualified_name(optimizer)
    if name in _LAYOUTS or name.startswith("torch."):
        stale = [param for param, state in optimizer.state.items() if not _fits(param, state)]
    else:
        stale = [param for param in reshaped if param in optimizer.state]
    reset_state(optimizer, stale)
    return len(stale)


def _fits(param: nn.Parameter, state: dict) -> bool:
    """Whether every tensor of the state has the parameter's shape, or a factor of it (Adafactor)."""
    shape = param.shape
    factors = {shape, shape[:-1], (*shape[:-2], *shape[-1:]), (*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])}
    return all(not torch.is_tensor(t) or t.dim() == 0 or tuple(t.shape) in factors for t in state.values())
