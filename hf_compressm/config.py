"""Every option of a compression, once."""

from dataclasses import asdict, dataclass, field, fields

_RULES = ("tolerance", "max_loss_increase", "target_state_size", "reduction_fraction")
_DEFAULT_TOLERANCE = 0.05


@dataclass
class CompressionConfig:
    """Which states to remove, when, and how. `HfArgumentParser` reads it as it is.

    At most one of `tolerance`, `max_loss_increase`, `target_state_size` and `reduction_fraction` is given; with none,
    ``tolerance=0.05``.

    Raises:
        ValueError: an option outside its range, or two rank rules at once.

    Example:

    ```python
    >>> from hf_compressm import CompressionConfig

    >>> CompressionConfig(tolerance=0.02, end=0.2, num_reductions=2).events(max_steps=1000)
    [100, 200]

    ```
    """

    tolerance: float | None = field(
        default=None,
        metadata={"help": "Fraction of the sum of the Hankel singular values that one event may discard, in (0, 1)."},
    )
    max_loss_increase: float | None = field(
        default=None,
        metadata={
            "help": "The largest reduction whose measured increase of the loss on calibration batches stays "
            "below this, per event, in the unit of the loss (nats). Early on, before the model has learned to use its "
            "state, that can be almost all of it: choose a later `start`."
        },
    )
    target_state_size: int | None = field(
        default=None,
        metadata={"help": "State size to reach, geometrically over the events and exactly at the last one."},
    )
    reduction_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the current states that each event removes, in (0, 1)."}
    )
    start: float = field(
        default=0.0,
        metadata={"help": "Start of the window: a step if it is an integer, a fraction of the run if in [0, 1]."},
    )
    end: float = field(
        default=0.1,
        metadata={
            "help": "End of the window and time of the last event: a step if it is an integer, a fraction of the run "
            "if in [0, 1]; on a command line and in JSON, a whole number above 1 is a step."
        },
    )
    num_reductions: int = field(default=4, metadata={"help": "Number of equidistant events in the window."})
    min_reduction: float = field(
        default=0.05, metadata={"help": "Leave a layer whose new size would be above (1 - this) of the old."}
    )
    min_state_size: int = field(default=1, metadata={"help": "Never go below this size."})
    multiple_of: int = field(default=1, metadata={"help": "Round sizes up to a multiple of this."})
    budget: str = field(
        default="layer",
        metadata={
            "help": "Apply the rule to each layer, or one threshold over all of them.",
            "choices": ["layer", "global"],
        },
    )
    uniform: bool | None = field(
        default=None, metadata={"help": "Give all layers the same size. Default: only where the class requires it."}
    )
    method: str = field(
        default="auto",
        metadata={
            "help": "How to reduce: 'balanced' truncation of the layer's real map, 'complex' as in the paper (MIMO "
            "SSM), 'selection' of states (Mamba families), or 'auto', the best for the architecture.",
            "choices": ["auto", "balanced", "selection", "complex"],
        },
    )
    calibration_batches: int = field(
        default=4,
        metadata={
            "help": "Micro-batches per process to observe before an event, for layers whose Gramians depend on the "
            "input and for `max_loss_increase`."
        },
    )
    moments: str = field(
        default="carry",
        metadata={
            "help": "Carry the optimizer state of the reduced parameters through the change of basis, or reset it.",
            "choices": ["carry", "reset"],
        },
    )
    rollback_metric: str | None = field(
        default=None,
        metadata={
            "help": "A metric of the evaluations, named as for `metric_for_best_model`. If it is worse at the first "
            "evaluation after a reduction than at the last one before, the model goes back and reductions stop."
        },
    )
    rollback_tolerance: float = field(
        default=0.02, metadata={"help": "Relative worsening of `rollback_metric` that a reduction may cost."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether `rollback_metric` is to be large. Default: unless its name ends with 'loss'."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Report what would be reduced and change nothing."})
    seed: int = field(default=0, metadata={"help": "Seed of the reduction's own random numbers."})

    def __post_init__(self):
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"Expected at most one rank rule out of {', '.join(_RULES)}; found {' and '.join(given)}."
            )
        for name in ("tolerance", "reduction_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"`{name}` is a fraction in the open interval (0, 1); found {value}.")
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < float("inf"):
            raise ValueError(f"`max_loss_increase` is a positive number of nats; found {self.max_loss_increase}.")
        whole = ("target_state_size", "num_reductions", "min_state_size", "multiple_of", "calibration_batches")
        for name in whole:
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"`{name}` is a whole number of at least 1; found {value}.")
        if not 0 <= self.rollback_tolerance < float("inf"):
            raise ValueError(f"`rollback_tolerance` is a fraction of at least 0; found {self.rollback_tolerance}.")
        if not 0 <= self.min_reduction < 1:
            raise ValueError(f"`min_reduction` is a fraction in [0, 1); found {self.min_reduction}.")
        if self.reduction_fraction is not None and self.reduction_fraction <= self.min_reduction:
            raise ValueError(
                f"reduction_fraction={self.reduction_fraction} is not above min_reduction={self.min_reduction}, so "
                "that nothing would ever be reduced. Raise the first or lower the second."
            )
        self.start, self.end = self._time("start"), self._time("end")
        if type(self.start) is type(self.end):
            self._check_window(self.start, self.end)
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices and getattr(self, f.name) not in choices:
                raise ValueError(f"`{f.name}` is one of {choices}; found {getattr(self, f.name)!r}.")

    @property
    def rule(self) -> tuple[str, float]:
        """Name and value of the rank rule in force."""
        for name in _RULES:
            if getattr(self, name) is not None:
                return name, getattr(self, name)
        return "tolerance", _DEFAULT_TOLERANCE

    def events(self, max_steps: int) -> list[int]:
        """The optimizer steps after which the model is reduced: ``round(start + k (end - start) / K)``, k = 1..K.

        Args:
            max_steps: number of optimizer steps of the run.

        Raises:
            ValueError: the window is empty or ends after the run.
        """
        start, end = (t if isinstance(t, int) else t * max_steps for t in (self.start, self.end))
        self._check_window(start, end)
        if end > max_steps:
            raise ValueError(f"The window ends at step {end:g}, but the run has {max_steps} steps. Lower `end`.")
        spacing = (end - start) / self.num_reductions
        return sorted({max(1, round(start + k * spacing)) for k in range(1, self.num_reductions + 1)})

    def to_dict(self) -> dict:
        """All options, as `CompressionConfig(**options)` takes them."""
        return asdict(self)

    def _time(self, name: str) -> int | float:
        """A step as int, a fraction of the run as float."""
        value = getattr(self, name)
        if value < 0 or (value > 1 and value != int(value)):
            raise ValueError(f"`{name}` is a step (a whole number) or a fraction of the run in [0, 1]; found {value}.")
        return int(value) if isinstance(value, int) or value > 1 else float(value)

    def _check_window(self, start: float, end: float) -> None:
        if end <= start:
            raise ValueError(
                f"The window of the reductions ends before it starts: start={self.start}, end={self.end}. "
                "Choose `end` after `start`."
            )
