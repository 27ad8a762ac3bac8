"""What the whole-model pass asks of an architecture, and the registry of those that answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..mor import Spectrum
from ..surgery import GradientMap, Ranks, resize_parameter_


@dataclass(frozen=True)
class Reduction:
    """A layer at its new size, not yet put in place.

    Attributes:
        state_size: the new size.
        parameters: new values of every parameter of the layer that changes, by name.
        gradient_maps: how the gradients of these parameters, and with them the optimizer's moments, change.
        method: the method that was used.
        energy_discarded: fraction of the sum of the Hankel singular values that was cut off.
        error_bound: H∞ bound of the error of the layer's map, ``2 Σ_{i>r} σ_i``; None where there is none.
        relative_error: H₂ error of the layer's map, relative to its H₂ norm; None where it is not known.
    """

    state_size: int
    parameters: dict[str, Tensor]
    gradient_maps: list[GradientMap]
    method: str
    energy_discarded: float
    error_bound: float | None = None
    relative_error: float | None = None


class StateReducer(ABC):
    """One state space layer as the pass sees it: weights → realization → Gramians → HSVs → reduced weights.

    A reducer is made for one event and one layer, and may keep what it computed for `spectrum` until `reduce`.

    Args:
        module: the layer.
        method: as in `CompressionConfig`; "auto" is the architecture's best.
        seed: of any random numbers that `reduce` draws.

    Raises:
        ValueError: the architecture has no such method.
    """

    methods: tuple[str, ...] = ("balanced",)
    needs_observation: bool = False
    """Whether the Gramians depend on the input, so that `observe` must be called before `spectrum`."""
    uniform: bool = False
    """Whether the model class has one state size for all layers."""

    state_parameters: tuple[str, ...] | None = None
    """The layer's parameters that make its recurrence, to be trained with a learning rate of their own; None: all."""
    added_parameters: tuple[str, ...] = ()
    """Parameters that a balanced reduction gives to a layer that had none; trained beside `state_parameters[0]`."""
    rank, ranks = 0, 1
    """Which of how many data-parallel processes observes."""

    def __init__(self, module: nn.Module, method: str = "auto", seed: int = 0):
        if method not in ("auto", *self.methods):
            raise ValueError(
                f"{type(module).__name__} layers have no method {method!r}; use 'auto' or one of {self.methods}."
            )
        self.module = module
        self.method = self.methods[0] if method == "auto" else method
        self.seed = seed

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Present number of states."""

    @property
    def observed(self) -> bool:
        """Whether anything was observed, where that is needed."""
        return not self.needs_observation

    def observe(self, args: tuple, kwargs: dict) -> None:
        """Take note of one forward pass of the layer, given its inputs; only called if `needs_observation`."""
        raise NotImplementedError(f"{type(self).__name__} observes nothing.")

    def statistics(self) -> dict[str, Tensor]:
        """Everything observed so far, for a checkpoint."""
        return {}

    def load_statistics(self, *processes: dict[str, Tensor]) -> None:
        """Go on from what `statistics` returned, on one process or on several that this one takes the place of."""
        raise NotImplementedError(f"{type(self).__name__} observes nothing.")

    def load_counts(self, statistics: dict[str, Tensor]) -> None:
        """Go on counting from where the process stood that returned these `statistics`, on one that takes the place of
        none; what was observed is another's to add."""
        return None

    def reduce_over_ranks(self, ranks: Ranks) -> None:
        """Put together what the data-parallel ranks observed, as if one process had seen it all."""
        raise NotImplementedError(f"{type(self).__name__} observes nothing.")

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """The Hankel singular values, and what a truncation of them costs in states.

        Raises:
            ArithmeticError: the layer is unstable, not finite, or otherwise beyond a safe reduction.
        """

    @abstractmethod
    def reduce(self, states: int) -> Reduction:
        """The layer with at most `states` states.

        Raises:
            ArithmeticError: there is no well-conditioned stable reduction to that size.
        """

    @abstractmethod
    def resize(self, states: int) -> None:
        """Change the layer, and the sizes in its config, to `states` states in place; values are undefined."""

    def apply(self, reduction: Reduction) -> None:
        """Put a reduction in place, parameter objects and config included."""
        self.resize(reduction.state_size)
        for name, value in reduction.parameters.items():
            resize_parameter_(self.module.get_parameter(name), value)

    @staticmethod
    def stored_size(module: nn.Module, weights: dict[str, Tensor]) -> int | None:
        """State size of the weights in a checkpoint; None for layers that resize themselves when they load them."""
        return None

    def restore(self, state_size: int, weights: dict[str, Tensor]) -> None:
        """Go back to a former size and a former `state_dict` of the layer."""
        self.resize(state_size)
        self.module.load_state_dict(weights)

    def sync_config(self, config: PreTrainedConfig) -> None:
        """Write the size into the model's config, for layers that hold no reference to it; the others have done so."""
        return None


_REDUCERS: dict[type[nn.Module], type[StateReducer]] = {}


def register_reducer(module_class: type[nn.Module]) -> Callable[[type[StateReducer]], type[StateReducer]]:
    """Class decorator: make a `StateReducer` known as the one for layers of `module_class` and its subclasses."""

    def register(reducer_class: type[StateReducer]) -> type[StateReducer]:
        _REDUCERS[module_class] = reducer_class
        return reducer_class

    return register


def find_reducible(model: nn.Module) -> dict[str, tuple[nn.Module, type[StateReducer]]]:
    """The reducible layers of a model by name, each with its reducer class, in the order of the modules."""
    found = {}
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls in _REDUCERS:
                found[name] = (module, _REDUCERS[cls])
                break
    return found


def allow_other_sizes(model: nn.Module) -> None:
    """Let `load_state_dict` bring other state sizes into stock layers, as our own layers let it: for resumed runs."""
    for module, reducer_class in find_reducible(model).values():
        if reducer_class.stored_size is not StateReducer.stored_size and not module._load_state_dict_pre_hooks:
            module.register_load_state_dict_pre_hook(partial(_resize_to_stored, reducer_class))


def _resize_to_stored(
    reducer_class: type[StateReducer], module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args
) -> None:
    weights = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    reducer, size = reducer_class(module), reducer_class.stored_size(module, weights)
    if size is not None and size != reducer.state_size:
        reducer.resize(size)


def supported_layers() -> list[str]:
    """Names of the layer classes that have a reducer."""
    return sorted(cls.__name__ for cls in _REDUCERS)
