"""The monitor's charts. Knows arrays, not where they come from.

Altair builds and checks the form of each chart once; a refresh only puts new data into it, because
building it anew would cost more than all the rest of the page.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd

from nanoeval.monitor.history import Curve, Flow, Latency

BLUE, GREEN, ORANGE, GRAY = "#2f7de1", "#1a9e5f", "#d9822b", "#7a8290"
HEIGHT = 170
# Stands for the data that a refresh brings.
_ROWS = alt.NamedData(name="rows")


class Drawing(NamedTuple):
    """What `st.vega_lite_chart` takes."""

    data: pd.DataFrame
    spec: dict[str, Any]


def accuracy_chart(curve: Curve) -> Drawing:
    """The mean score over time with its band."""
    # The first few results swing so far that they would flatten the rest: they are cut off.
    settled = len(curve.time) // 8
    low, high = float(curve.low[settled:].min()), float(curve.high[settled:].max())
    columns = {"mean": curve.mean, "low": curve.low, "high": curve.high}
    frame = pd.DataFrame({name: np.clip(values, low, high) for name, values in columns.items()})
    frame["time"] = _times(curve.time)
    is_share = low >= 0 and high <= 1
    number = ".4~g" if not is_share else ".0%" if high - low > 0.04 else ".1%"
    return Drawing(frame, deepcopy(_accuracy(_time_format(curve.time), number)))


@cache
def _accuracy(time_format: str, number: str) -> dict[str, Any]:
    axis = alt.Axis(title=None, format=number, tickCount=5)
    scale = alt.Scale(nice=True, zero=False)
    base = alt.Chart(_ROWS).encode(x=alt.X("time:T", axis=_time_axis(time_format)))
    band = base.mark_area(color=BLUE, opacity=0.18).encode(
        y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q"
    )
    line = base.mark_line(color=BLUE, strokeWidth=2).encode(
        y=alt.Y("mean:Q", scale=scale, axis=axis),
        tooltip=[
            alt.Tooltip("time:T", title="until", format="%H:%M:%S"),
            alt.Tooltip("mean:Q", title="accuracy", format=".4~g"),
            alt.Tooltip("low:Q", title="from", format=".4~g"),
            alt.Tooltip("high:Q", title="to", format=".4~g"),
        ],
    )
    return _spec(alt.layer(band, line))


def throughput_chart(flow: Flow) -> Drawing:
    """Rollouts that ended per second, over time."""
    frame = pd.DataFrame({"time": _times(flow.time), "value": flow.per_second})
    form = _area(_time_format(flow.time), GREEN, "rollouts per second", ".3~g")
    return Drawing(frame, deepcopy(form))


def in_flight_chart(flow: Flow) -> Drawing:
    """Rollouts in flight, over time."""
    frame = pd.DataFrame({"time": _times(flow.time), "value": flow.in_flight})
    form = _area(_time_format(flow.time), ORANGE, "in flight", ",.0f")
    return Drawing(frame, deepcopy(form))


@cache
def _area(time_format: str, color: str, title: str, number: str) -> dict[str, Any]:
    line = {"color": color, "strokeWidth": 1.6}
    chart = (
        alt.Chart(_ROWS)
        .mark_area(color=color, opacity=0.25, line=line, interpolate="step")
        .encode(
            x=alt.X("time:T", axis=_time_axis(time_format)),
            y=alt.Y("value:Q", axis=alt.Axis(title=None, tickCount=4, format="~s")),
            tooltip=[
                alt.Tooltip("time:T", title="at", format="%H:%M:%S"),
                alt.Tooltip("value:Q", title=title, format=number),
            ],
        )
    )
    return _spec(chart)


def latency_chart(latency: Latency) -> Drawing:
    """How long rollouts took, on a logarithmic axis, with the percentiles as rules."""
    shown = latency.counts > 0
    percentiles = [latency.p50, latency.p90, latency.p99]
    nothing = np.full(len(percentiles), np.nan)
    frame = pd.DataFrame(
        {
            "from": np.append(latency.edges[:-1][shown], percentiles),
            "to": np.append(latency.edges[1:][shown], nothing),
            "count": np.append(latency.counts[shown], nothing),
            "name": [None] * int(shown.sum()) + ["p50", "p90", "p99"],
        }
    )
    return Drawing(frame, deepcopy(_latency()))


@cache
def _latency() -> dict[str, Any]:
    axis = alt.Axis(title=None, format="~g", tickCount=6, grid=False)
    x = alt.X("from:Q", scale=alt.Scale(type="log", nice=False), axis=axis)
    bars = (
        alt.Chart(_ROWS)
        .transform_filter("datum.name == null")
        .mark_rect(color=BLUE, opacity=0.5)
        .encode(
            x=x,
            x2="to:Q",
            y=alt.Y("count:Q", axis=alt.Axis(title=None, tickCount=4, format="~s")),
            y2=alt.datum(0),
            tooltip=[
                alt.Tooltip("from:Q", title="from, s", format=".3~g"),
                alt.Tooltip("to:Q", title="to, s", format=".3~g"),
                alt.Tooltip("count:Q", title="rollouts", format=",.0f"),
            ],
        )
    )
    named = alt.Chart(_ROWS).transform_filter("datum.name != null").encode(x=x)
    lines = named.mark_rule(color=ORANGE, strokeWidth=1.5, strokeDash=[4, 3])
    names = named.mark_text(align="right", dx=-3, baseline="top", color=ORANGE)
    return _spec(alt.layer(bars, lines, names.encode(text="name:N", y=alt.value(0))))


def interval_chart(low: float, mean: float, high: float) -> Drawing:
    """A difference with its interval, against zero in the middle."""
    reach = 1.15 * max(abs(low), abs(high), 0.005)
    row = {"low": low, "mean": mean, "high": high, "zero": 0.0, "left": -reach, "right": reach}
    return Drawing(pd.DataFrame([row]), deepcopy(_interval(BLUE if low <= 0 <= high else ORANGE)))


@cache
def _interval(color: str) -> dict[str, Any]:
    axis = alt.Axis(title=None, format="+.1%", tickCount=7)
    scale = alt.Scale(nice=False)
    base = alt.Chart(_ROWS)
    # Nothing to be seen, but it makes the axis reach as far to either side.
    frame = base.mark_rule(opacity=0).encode(
        x=alt.X("left:Q", axis=axis, scale=scale), x2="right:Q"
    )
    zero = base.mark_rule(strokeDash=[3, 3], color=GRAY).encode(x="zero:Q")
    span = base.mark_rule(strokeWidth=3, color=color).encode(x="low:Q", x2="high:Q")
    point = base.mark_point(filled=True, size=110, color=color, opacity=1).encode(
        x="mean:Q",
        tooltip=[alt.Tooltip(f"{name}:Q", format="+.2%") for name in ("low", "mean", "high")],
    )
    return _spec(alt.layer(frame, zero, span, point), height=70)


def _spec(chart: Any, height: int = HEIGHT) -> dict[str, Any]:
    """The chart as Vega-Lite without data and without Altair's own colours."""
    spec: dict[str, Any] = chart.properties(height=height).to_dict()
    assert spec.pop("data") == {"name": "rows"}
    return {name: part for name, part in spec.items() if name not in ("config", "$schema")}


def _time_axis(format: str) -> Any:
    return alt.Axis(title=None, format=format, tickCount=5, grid=False, labelOverlap=True)


def _time_format(seconds: Any) -> str:
    span = float(seconds[-1] - seconds[0])
    return "%H:%M:%S" if span < 600 else "%H:%M" if span < 86_400 else "%d %b %H:%M"


def _times(seconds: Any) -> pd.Series[Any]:
    return pd.Series(pd.to_datetime(seconds, unit="s", utc=True))
