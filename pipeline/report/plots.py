"""Figures of the page, by Bokeh: curves of every student, retained mass, the histogram of entropies.

Enters: plain numbers. Leaves: figures as JSON items, which the page's script embeds. Costs: about 10 kB a figure.

Colours are placeholders, `COLOURS`, which the page's script replaces by its own for light and dark. No figure takes the
wheel or a finger's drag from the page.
"""

from collections.abc import Sequence as Seq
from typing import Any

from stillroom.storage.errors import UsageError

#: Placeholder → the page's CSS variable.
COLOURS = {
    "#0a0001": "--ink-2",
    "#0a0002": "--line",
    "#0a0003": "--surface",
    **{f"#0b{n:04x}": f"--s{n}" for n in range(8)},
    **{f"#0c{n:04x}": f"--t{n}" for n in range(4)},
}
_INK, _LINE = "#0a0001", "#0a0002"
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_HEIGHT = 210


def student_colour(number: int) -> str:
    """The CSS variable of the number-th student of the page; from the ninth on with other dashes."""
    return f"--s{number % 8}"


def require_plotting() -> None:
    """Raises UsageError where the plotting library is not installed."""
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "a report needs the plotting library bokeh, which is not installed: pip install 'stillroom[report]'"
        ) from error


def library() -> str:
    """The library's own script, to be put into the page."""
    from bokeh.resources import Resources

    resources = Resources(mode="inline", components=["bokeh"], log_level="warn")
    return "\n".join(resources.js_raw)


def _figure(y_label: str, x_label: str, *, x_log: bool = False, y_log: bool = False, share: bool = False) -> Any:
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=_HEIGHT, sizing_mode="stretch_width", toolbar_location=None, tools="",
        x_axis_type="log" if x_log else "linear", y_axis_type="log" if y_log else "linear",
        background_fill_alpha=0, border_fill_alpha=0, outline_line_color=None,
        min_border_left=6, min_border_right=10, min_width=200,
    )  # fmt: skip
    for axis, label in ((plot.xaxis, x_label), (plot.yaxis, y_label)):
        axis.axis_label = label
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_line_color = axis.major_tick_line_color = _LINE
        axis.minor_tick_line_color = None
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_color = _LINE
    plot.yaxis.ticker.desired_num_ticks = 5
    plot.xaxis.ticker.desired_num_ticks = 6
    if share:
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    return plot


def _item(plot: Any, name: str) -> dict[str, Any]:
    from bokeh.embed import json_item

    return dict(json_item(plot, name))


def curves(
    name: str, series: Seq[tuple[str, int, Seq[tuple[float, float]]]], *, y_label: str, y_log: bool = False,
    share: bool = False, marks: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Lines over training steps. series: (student, its number, points). marks: a dot at every point, as of
    evaluations that are far apart."""
    from bokeh.models import ColumnDataSource, HoverTool, PrintfTickFormatter, Range1d

    plot = _figure(y_label, "step", y_log=y_log, share=share)
    values = [value for _, _, points in series for _, value in points]
    if not y_log and max(values) - min(values) < 1e-12:  # a constant: the library would centre it on any range
        plot.y_range = Range1d(0, 1.25 * max(values) or 1.0)
    if name.endswith("-lr"):
        plot.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    shown = []
    for student, number, points in series:
        source = ColumnDataSource(
            {"x": [p[0] for p in points], "y": [p[1] for p in points], "name": [student] * len(points)}
        )
        colour = f"#0b{number % 8:04x}"
        plot.line("x", "y", source=source, color=colour, line_width=2, line_dash=_DASHES[number // 8 % 4])
        dots = plot.scatter("x", "y", source=source, color=colour, size=6 if marks or len(points) == 1 else 1)
        shown.append(dots)
    shape = "@y{0.0 %}" if share else "@y{0,0.[0000]}" if not name.endswith("-lr") else "@y{0.00e+0}"
    plot.add_tools(HoverTool(renderers=shown, tooltips=[("student", "@name"), ("step", "@x"), (y_label, shape)]))
    return _item(plot, name)


def mass(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Share of the probability that the k likeliest ids hold, a line for each temperature."""
    from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

    plot = _figure("share of the probability", "k, likeliest ids", x_log=True, share=True)
    plot.y_range = Range1d(0, 1.02)
    ks = [int(k) for k in found["k"]]
    plot.xaxis.ticker = FixedTicker(ticks=ks)
    plot.xaxis.major_label_overrides = {k: str(k) for k in ks}
    dots = []
    for number, (temperature, shares) in enumerate(zip(found["temperatures"], found["mass"], strict=True)):
        source = ColumnDataSource({"x": ks, "y": shares, "t": [f"{temperature:g}"] * len(ks)})
        plot.line("x", "y", source=source, color=f"#0c{number:04x}", line_width=2)
        dots.append(plot.scatter("x", "y", source=source, color=f"#0c{number:04x}", size=6))
    plot.add_tools(HoverTool(renderers=dots, tooltips=[("T", "@t"), ("k", "@x"), ("mass", "@y{0.0 %}")]))
    return _item(plot, name)


def histogram(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The teacher's entropy over rows."""
    from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter

    plot = _figure("positions", "entropy of the teacher at T = 1, nats")
    edges, total = found["edges"], max(sum(found["counts"]), 1)
    source = ColumnDataSource(
        {"left": edges[:-1], "right": edges[1:], "top": found["counts"], "share": [c / total for c in found["counts"]]}
    )
    bars = plot.quad(
        left="left", right="right", top="top", bottom=0, source=source, fill_color="#0c0001", line_color="#0a0003"
    )
    plot.y_range.start = 0
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
    tips = [("nats", "@left{0.00} – @right{0.00}"), ("positions", "@top{0,0}"), ("share", "@share{0.0 %}")]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    return _item(plot, name)
