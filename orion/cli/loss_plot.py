"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion.common.protocol.records import LossPoint

SMOOTHING = 16
"""Microbatches in the running mean."""


def save_loss_plot(
    path: Path,
    points: Sequence[LossPoint],
    *,
    tokens_per_microbatch: int,
    title: str,
    levels: dict[str, float],
) -> None:
    """Draws loss against tokens; `levels` are drawn as labelled horizontal lines (held-out losses)."""
    tokens = [(index + 1) * tokens_per_microbatch for index in range(len(points))]
    losses = [point.loss for point in points]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, ".", markersize=3, alpha=0.25, color="tab:blue", label="microbatch")
    axes.plot(tokens, _running_mean(losses), color="tab:blue", label=f"mean of {SMOOTHING}")
    for step_start in (
        index for index in range(1, len(points)) if points[index].outer_step > points[index - 1].outer_step
    ):
        axes.axvline(tokens[step_start], color="0.9", linewidth=0.8, zorder=0)
    for (label, level), style in zip(levels.items(), ("-", "--", ":"), strict=False):
        axes.axhline(level, color="tab:red", linewidth=1, linestyle=style, label=f"{label} {level:.3f}")
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _running_mean(values: Sequence[float]) -> list[float]:
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= SMOOTHING:
            total -= values[index - SMOOTHING]
        means.append(total / min(index + 1, SMOOTHING))
    return means
