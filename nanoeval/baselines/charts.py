"""Charts of accuracies. Draws to files, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoeval.baselines.summary import group_accuracies

INSTALL = 'pip install "nanoeval[hf]"'
INCHES_PER_BAR = 0.24
BAR, LINE = "#4477aa", "#cc3311"
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def draw_accuracy(path: Path, title: str, summary: Mapping[str, Any]) -> None:
    """One bar for each subject or category, the best on top, and a line at the whole's accuracy.

    A benchmark without groups gets one bar, with its 95 % interval.
    """
    groups = group_accuracies(summary)
    errors: list[tuple[float, float]] | None = None
    bars = sorted(groups.items(), key=lambda item: item[1])
    if not bars:
        bars = [(title, summary["accuracy"])]
        low, high = summary["accuracy_ci95"]
        errors = [(max(0.0, bars[0][1] - low), max(0.0, high - bars[0][1]))]
    figure, axes = _figure(8.0, 1.6 + INCHES_PER_BAR * len(bars))
    axes.barh(
        [name.replace("_", " ") for name, _ in bars],
        [value for _, value in bars],
        color=BAR,
        height=0.72,
        xerr=list(zip(*errors, strict=True)) if errors else None,
    )
    for place, (_, value) in enumerate(bars):
        # At the edge, where neither bars nor lines pass.
        axes.text(1.12, place, f"{value:.1%}", va="center", ha="right", size=8)
    if groups:
        axes.axvline(summary["accuracy"], color=LINE, lw=1.2)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_ylim(-0.7, len(bars) - 0.3)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("accuracy")
    axes.set_title(_heading(title, summary), fontsize=10, loc="left")
    _save(figure, path)


def draw_suite(path: Path, accuracies: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Groups of bars, one group for each task and one color for each model.

    `accuracies` maps a model's name to its tasks, each with (accuracy, low, high).
    """
    tasks = list(dict.fromkeys(task for own in accuracies.values() for task in own))
    figure, axes = _figure(max(5.0, 1.4 + 1.1 * len(tasks) * max(1, len(accuracies) * 0.6)), 4.0)
    width = 0.8 / max(1, len(accuracies))
    for index, (model, own) in enumerate(accuracies.items()):
        places = [tasks.index(task) + (index + 0.5) * width - 0.4 for task in own]
        values = [accuracy for accuracy, _, _ in own.values()]
        errors = [
            [max(0.0, value - low) for value, low, _ in own.values()],
            [max(0.0, high - value) for value, _, high in own.values()],
        ]
        color = COLORS[index % len(COLORS)]
        axes.bar(places, values, width * 0.92, yerr=errors, capsize=3, label=model, color=color)
        for place, value, above in zip(places, values, errors[1], strict=True):
            axes.text(place, value + above + 0.015, f"{value:.1%}", ha="center", size=8)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=9)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("accuracy (95 % interval)")
    if accuracies:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=8)
    _save(figure, path)


def _heading(title: str, summary: Mapping[str, Any]) -> str:
    stderr = summary.get("accuracy_stderr")
    spread = f" ± {stderr:.1%}" if stderr is not None else ""
    return (
        f"{title}: {summary['accuracy']:.1%}{spread} ({summary['total_examples']} examples,"
        f" {summary['scoring']['strategy']})\n{summary['model_id']}"
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"charts need matplotlib: {INSTALL}; or set save_plot: false") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, format="png")
