"""What the dashboards are made of. Sizes are in Grafana's grid: 24 columns, rows of about 30 pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "portcullis"

Query = tuple[str, str]
"""PromQL, and how its series are called (`{{label}}`)."""
Steps = Sequence[tuple[float | None, str]]
"""From which value on (None: from the lowest) which colour."""

GOOD_BELOW: dict[str, Steps] = {
    "share": ((None, "green"), (0.01, "orange"), (0.05, "red")),
    "seconds": ((None, "green"), (0.25, "orange"), (1.0, "red")),
    "full": ((None, "green"), (0.7, "orange"), (0.9, "red")),
    "any": ((None, "green"), (1.0, "red")),
}
NEUTRAL: Steps = ((None, "blue"),)


def target(expression: str, legend: str, ref: str, *, instant: bool = False, exemplar: bool = False) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref).datasource(DATASOURCE)
    if exemplar:
        query.exemplar(True)
    return query.instant() if instant else query.range()


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=value, color=color) for value, color in steps])
    )


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    width: int = 12,
    stacked: bool = False,
    exemplars: bool = False,
    highest: float | None = None,
) -> timeseries.Panel:
    """Curves over time, with their last and highest values. `exemplars`: points that lead to traces."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .span(width)
        .height(8)
        .line_width(1)
        .fill_opacity(20 if stacked else 5)
        .show_points(kinds.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.TABLE)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if highest is not None:
        panel.max(highest)
    for index, (expression, legend) in enumerate(queries):
        panel.with_target(target(expression, legend, chr(ord("A") + index), exemplar=exemplars))
    return panel


def number(
    title: str, description: str, expression: str, *, unit: str, steps: Steps = NEUTRAL, width: int = 3, empty: str = "0"
) -> stat.Panel:
    """One figure, as it is now; `empty`: what is shown when there is none."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .no_value(empty)
        .span(width)
        .height(4)
        .thresholds(thresholds(steps))
        .color_mode(kinds.BigValueColorMode.BACKGROUND)
        .graph_mode(kinds.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(target(expression, "", "A"))
    )


def bars(title: str, description: str, query: Query, *, unit: str, steps: Steps, width: int = 12) -> bargauge.Panel:
    """One bar for each series, as it is now."""
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .span(width)
        .height(10)
        .thresholds(thresholds(steps))
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(target(*query, "A", instant=True))
    )


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """What can be chosen: any number of the label values that `query` finds, all of them at first."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


Panel = timeseries.Panel | stat.Panel | bargauge.Panel


def board(
    uid: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    variables: Sequence[dashboard.QueryVariable] = (),
) -> Dashboard:
    """A dashboard of rows of panels; it links to its neighbours and keeps the time that is looked at."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("15s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(
            dashboard.DashboardLink("Portcullis")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .as_dropdown(False)
        )
    )
    for each in variables:
        made.with_variable(each)
    numbers = itertools.count(1)  # kept in links to a panel
    for heading, panels in rows:
        made.with_row(dashboard.Row(heading).id(next(numbers)))
        for panel in panels:
            made.with_panel(panel.id(next(numbers)))
    return made.build()
