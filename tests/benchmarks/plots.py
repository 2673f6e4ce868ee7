"""Two small plots: memory traffic and peak memory against K, and against V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"embedsurgery": "#0072b2", "peft": "#d55e00"}
LABELS = {"embedsurgery": "embedsurgery", "peft": "PEFT"}


def draw(results: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Draw ``benchmark-k.png`` and ``benchmark-v.png`` from the sweeps among the results.

    Returns:
        What was written; a sweep of fewer than two points is left out.
    """
    written = []
    for sweep, field, label in (("k", "rows", "K, rows trained"), ("v", "vocabulary", "V, rows of the table")):
        chosen = [r for r in results if r["case"]["name"].startswith(f"sweep-{sweep}/")]
        if len(chosen) > 1:
            directory.mkdir(parents=True, exist_ok=True)
            written.append(_draw(chosen, field, label, directory / f"benchmark-{sweep}.png"))
    return written


def _draw(results: list[dict[str, Any]], field: str, label: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    figure, (traffic, peaks) = pyplot.subplots(1, 2, figsize=(7, 2.6), dpi=110, layout="constrained")
    x = [result["case"][field] for result in results]
    for variant, colour in COLOURS.items():
        found = [result["variants"][variant] for result in results]
        traffic.plot(x, [part["traffic_ratio"] for part in found], "o-", ms=4, color=colour, label=LABELS[variant])
        peaks.plot(x, [part["peak_ratio"] for part in found], "o-", ms=4, color=colour, label=LABELS[variant])
    for axes, title in ((traffic, "memory traffic of a training step"), (peaks, "peak memory of a training step")):
        axes.axhline(1, color="0.5", lw=0.8, ls="--")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("ratio to the frozen base", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(FixedLocator(x))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(FixedLocator([]))
    traffic.legend(fontsize=7, frameon=False)
    case = results[0]["case"]
    shape = [
        f"D={case['width']:,}",
        f"K={case['rows']:,}" if field == "vocabulary" else f"V={case['vocabulary']:,}",
        "tied" if case["tied"] else "untied",
        case["dtype"],
        "batch {} x {}".format(*case["batch"]),
    ]
    figure.suptitle(", ".join(shape), fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return path
