"""Figures of a run: state sizes, loss, and the Hankel singular values of the layers from event to event."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MAX_LAYERS = 6  # whose spectra are drawn; of more, evenly spaced ones
_COLUMNS = 3
_SMALLEST = 1e-5  # Hankel singular value that is drawn, relative to the largest of the layer


def plot_run(events: Sequence[Any], log_history: Sequence[dict] = (), path: str | Path | None = None):
    """Draw the state sizes over the steps, the loss with the reductions marked, and the spectra before each event.

    Args:
        events: the `CompressionEvent`s of a report.
        log_history: of the `TrainerState` of the run; without it the loss is left out.
        path: where to save the figure, if anywhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no event to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'hf-compressm[plot]'.") from error
    if not events:
        raise ValueError("There is nothing to draw: no reduction has taken place.")
    with_loss = any("loss" in entry or "eval_loss" in entry for entry in log_history)
    layers = len(events[0].layers)
    shown = [round(k * (layers - 1) / max(1, min(layers, _MAX_LAYERS) - 1)) for k in range(min(layers, _MAX_LAYERS))]
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(11, 3.4 * (1 + rows)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, rows))
    axes = upper.subplots(1, 1 + with_loss, squeeze=False)[0]
    _plot_sizes(axes[0], events, max((entry.get("step", 0) for entry in log_history), default=0))
    if with_loss:
        _plot_loss(axes[1], events, log_history)
    grid = lower.subplots(rows, columns, squeeze=False).ravel()
    for ax, index in zip(grid, shown, strict=False):
        _plot_spectra(ax, events, index)
    for ax in grid[len(shown) :]:
        ax.remove()
    only = "" if len(shown) == layers else f", {len(shown)} of {layers} layers"
    lower.suptitle(f"Hankel singular values before each event (● cut){only}", fontsize="medium")
    grid[0].legend(fontsize="x-small", title_fontsize="x-small", title="before")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _step(event: Any, number: int) -> int:
    return number if event.step is None else event.step


def _plot_sizes(axes, events: Sequence[Any], last_step: int) -> None:
    taken_back = [event for event in events if event.rolled_back_at is not None]
    for index, layer in enumerate(events[0].layers):
        points = [(0, layer.before)]
        points += [(_step(event, number), event.layers[index].after) for number, event in enumerate(events, 1)]
        if taken_back:
            points.append((taken_back[0].rolled_back_at, taken_back[0].layers[index].before))
        if last_step > points[-1][0]:
            points.append((last_step, points[-1][1]))
        axes.step(*zip(*points, strict=True), where="post", marker="o", markersize=3, label=layer.name)
    in_a_run = events[0].step is not None
    axes.set(xlabel="optimizer step" if in_a_run else "event", ylabel="states", title="State sizes", ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    if len(events[0].layers) <= _MAX_LAYERS:
        axes.legend(fontsize="small")


def _plot_loss(axes, events: Sequence[Any], log_history: Sequence[dict]) -> None:
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    for number, event in enumerate((e for e in events if e.changed and e.step is not None), 1):
        axes.axvline(event.step, color="grey", linewidth=0.8, linestyle="--", label="reduction" if number == 1 else "")
    axes.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    axes.legend(fontsize="small")


def _plot_spectra(axes, events: Sequence[Any], index: int) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for number, event in enumerate(events, 1):
        layer = event.layers[index]
        values = layer.hankel_singular_values
        if not values:
            continue
        colour = colours(0.9 * (number - 1) / max(1, len(events) - 1))
        label = f"event {number}" if event.step is None else f"step {event.step}"
        axes.semilogy(range(1, len(values) + 1), values, color=colour, label=label)
        if layer.after < layer.before:
            cut = max(1, round(len(values) * layer.after / layer.before))
            axes.plot(cut, values[cut - 1], "o", color=colour, markersize=5)
    largest = max((value for event in events for value in event.layers[index].hankel_singular_values), default=1.0)
    axes.set(xlabel="i", ylabel="σᵢ", ylim=(_SMALLEST * largest, None))
    axes.set_title(events[0].layers[index].name, fontsize="small")
