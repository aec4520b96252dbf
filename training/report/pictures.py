"""Pictures of a report's figures, as PNG and GIF. The only place in training that knows matplotlib, which is
imported when drawing.

Colour maps that colour-blind readers can tell apart: cividis for amounts, PuOr for more and less.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from training.report.experts import CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 110
LIFTS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
MOST_FRAMES = 30


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    try:
        yield figure, list(axes.flat)
    finally:
        pyplot.close(figure)


def loss_curve(curve: list[dict[str, float]], bigram_loss: float) -> bytes:
    """Training and validation loss over steps, nats per token."""
    with _figure(1, 1, 7, 3.8) as (figure, (axes,)):
        steps = [point["step"] for point in curve]
        axes.plot(steps, [point["train_loss"] for point in curve], color="#999999", lw=1, label="training, one batch")
        axes.plot(steps, [point["validation_loss"] for point in curve], color="#0072b2", lw=2, label="validation")
        axes.annotate(
            f"{curve[-1]['validation_loss']:.3f}", (steps[-1], curve[-1]["validation_loss"]), (4, 0), **_BESIDE
        )
        axes.axhline(bigram_loss, color="#d55e00", ls=":", label=f"bigram counts {bigram_loss:.2f}")
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return _png(figure)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center"}


def load(shares: list[list[float]]) -> bytes:
    """Each expert's load over the mean load of its layer, (L, E)."""
    ratios = [[share * len(layer) for share in layer] for layer in shares]
    furthest = max(0.1, *(abs(ratio - 1) for layer in ratios for ratio in layer))
    with _figure(1, 1, *_size(ratios)) as (figure, (axes,)):
        image = axes.imshow(ratios, cmap="PuOr_r", vmin=1 - furthest, vmax=1 + furthest, aspect="auto")
        _label_experts(axes, ratios, "{:.2f}")
        figure.colorbar(image, label="load, times the mean")
        return _png(figure)


def causal_map(cost: list[list[float]]) -> bytes:
    """What silencing each expert costs in nats per token, (L, E)."""
    highest = max(max(layer) for layer in cost)
    with _figure(1, 1, *_size(cost)) as (figure, (axes,)):
        image = axes.imshow(cost, cmap="cividis", vmin=0, vmax=max(highest, 1e-6), aspect="auto")
        _label_experts(axes, cost, "{:.3f}", dark_below=0.55 * highest)
        figure.colorbar(image, label="loss without the expert, nats more")
        return _png(figure)


def classes(lift: list[list[list[float | None]]]) -> bytes:
    """How often each expert is chosen for a class of characters, over what its load alone gives: (L, E, C)."""
    rows = math.ceil(len(lift) / 2)
    with _figure(rows, min(2, len(lift)), 11, 0.8 + rows * (0.9 + 0.24 * len(lift[0]))) as (figure, panels):
        for axes in panels:
            axes.set_visible(False)
        used = _used(lift)
        for layer, axes in enumerate(panels[: len(lift)]):
            _draw_classes(axes, [[row[c] for c in used] for row in lift[layer]], used, f"layer {layer}")
        _lift_bar(figure, panels[: len(lift)])
        return _png(figure)


def specialisation(frames: list[dict[str, Any]]) -> bytes:
    """A GIF of the classes of every layer over training: frames of {step, lift (L, E, C)}."""
    from PIL import Image

    every = math.ceil(len(frames) / MOST_FRAMES)
    chosen = frames[:-1:every] + frames[-1:]
    drawn = [Image.open(io.BytesIO(content)).convert("RGB") for content in _drawn(chosen)]
    palette = drawn[-1].quantize(64)  # one for all frames: what stays the same is then stored once
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in drawn]
    target = io.BytesIO()
    durations = [400] * (len(images) - 1) + [2500]
    images[0].save(target, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    return target.getvalue()


def _drawn(frames: list[dict[str, Any]]) -> Iterator[bytes]:
    """Each frame as a PNG. The figure is laid out once, for the last; the others put their values into it."""
    last = frames[-1]["lift"]
    used = _used(last)
    columns = min(3, len(last))
    rows = math.ceil(len(last) / columns)
    with _figure(rows, columns, 8, 1.1 + rows * (0.5 + 0.17 * len(last[0]))) as (figure, panels):
        for axes in panels:
            axes.set_visible(False)
        for layer, axes in enumerate(panels[: len(last)]):
            _draw_classes(axes, [[row[c] for c in used] for row in last[layer]], used, f"layer {layer}", numbers=False)
        _lift_bar(figure, panels[: len(last)])
        title = figure.suptitle("what the experts like", fontsize=10)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for frame in frames:
            title.set_text(f"what the experts like, step {frame['step']:,}")
            for layer, axes in enumerate(panels[: len(last)]):
                axes.images[0].set_data(_logarithms([[row[c] for c in used] for row in frame["lift"][layer]]))
            yield _png(figure, 72)


def _draw_classes(
    axes: Axes, lift: list[list[float | None]], used: list[int], title: str, *, numbers: bool = True
) -> None:
    axes.set_visible(True)
    logs = _logarithms(lift)
    axes.imshow(logs, cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks(range(len(used)), [CLASSES[c] for c in used], fontsize=7, rotation=0 if numbers else 60)
    axes.set_yticks(range(len(lift)), [str(expert) for expert in range(len(lift))], fontsize=7)
    axes.set_ylabel("expert", fontsize=8)
    axes.tick_params(length=0)
    for expert, row in enumerate(lift if numbers else []):
        for column, value in enumerate(row):
            if value is not None:
                color = "white" if abs(logs[expert][column]) > 2 else "black"
                axes.text(column, expert, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)


def _logarithms(lift: list[list[float | None]]) -> list[list[float]]:
    """To base 2, NaN for None. An expert that never takes a class has lift 0 and gets the end of the scale."""
    return [[math.nan if v is None else max(-3.0, math.log2(max(v, 1 / 8))) for v in row] for row in lift]


def _used(lift: list[list[list[float | None]]]) -> list[int]:
    """The classes that occur at all."""
    return [c for c in range(len(CLASSES)) if any(row[c] is not None for layer in lift for row in layer)]


def _lift_bar(figure: Figure, panels: list[Axes]) -> None:
    bar = figure.colorbar(panels[0].images[0], ax=panels, shrink=0.6)
    bar.set_label("chosen, times the expected", fontsize=8)
    bar.set_ticks([math.log2(lift) for lift in LIFTS], labels=["never", "1/4", "1/2", "1", "2", "4"], fontsize=7)


def _label_experts(axes: Axes, values: list[list[float]], form: str, dark_below: float = -math.inf) -> None:
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(values)))
    axes.tick_params(length=0)
    if len(values[0]) > 16:
        return
    axes.set_xticks(range(len(values[0])))
    for layer, row in enumerate(values):
        for expert, value in enumerate(row):
            color = "white" if value < dark_below else "black"
            axes.text(
                expert,
                layer,
                form.format(value).replace("-0.000", "0.000"),
                ha="center",
                va="center",
                fontsize=8,
                color=color,
            )


def _size(values: list[list[float]]) -> tuple[float, float]:
    return min(12, 2.5 + 0.62 * len(values[0])), 1.2 + 0.42 * len(values)


def _png(figure: Figure, dpi: int = DOTS_PER_INCH) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})
    return target.getvalue()
