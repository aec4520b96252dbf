"""The words that dashboards are written in: kinds of panels, pieces of PromQL. Knows no metric by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    FieldColor,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE: Final = grafana.DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB: Final = 'job="$job"'
HERE: Final = JOB + ', instance=~"$instance"'
LAYERS: Final = JOB + ', layer=~"$layer"'  # rules have added up the instances, so nobody chooses among them
CELLS: Final = LAYERS + ', expert!=""'  # --expert-metrics layer tells sums over experts, under the same name
MATRIX_WINDOW: Final = "5m"  # a matrix shows the present, and needs traffic enough for each of its cells
TAG: Final = "moescope"

Colours = Mapping[float | None, str]
"""From which value on which colour; None is everything below the first value."""
GOOD_FROM_ONE: Final[Colours] = {None: "red", 1: "green"}


def dashboard(uid: str, title: str, description: str) -> Dashboard:
    """An empty dashboard with what all of ours share: a job to choose, the link to the others."""
    others = DashboardLink("Moescope").type(grafana.DashboardLinkType.DASHBOARDS).tags([TAG])
    return (
        Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .time("now-15m", "now")
        .refresh("5s")
        .tooltip(grafana.DashboardCursorSync.CROSSHAIR)
        .link(others.include_vars(True).keep_time(True))
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(choice("job", "Job", "label_values(moescope_ready, job)", several=False))
    )


def row(page: Dashboard, title: str, *panels: Builder[grafana.Panel]) -> None:
    page.with_row(Row(title))
    for panel in panels:
        page.with_panel(panel)


def choice(name: str, label: str, query: str, *, several: bool = True) -> QueryVariable:
    """A variable: one value of those that the query finds, or several, at first all."""
    variable = (
        QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name, "qryType": 5})  # 5: the query is this text
        .refresh(grafana.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(grafana.VariableSort.NUMERICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if several:
        variable.all_value(".+").current(grafana.VariableOption(selected=True, text=["All"], value=["$__all"]))
    return variable


# PromQL


def rate(counter: str, by: str = "", where: str = HERE, window: str = "$__rate_interval") -> str:
    """Growth per second, summed over everything but the labels `by`."""
    return f"sum by ({by}) (rate({counter}{{{where}}}[{window}]))"


def mean(histogram: str) -> str:
    return f"{rate(histogram + '_sum')} / {rate(histogram + '_count')}"


def quantiles(histogram: str) -> dict[str, str]:
    """Median, 95th and 99th percentile, each under its name."""
    return {name: quantile(q, histogram) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def quantile(q: float, histogram: str, by: str = "le") -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', by)})"


# Kinds of panels. `reading` is the sentence behind the panel's (i): how to read it.


def lines(
    title: str,
    reading: str,
    queries: Mapping[str, str],
    *,
    unit: str = "short",
    width: int = 12,
    stacked: bool = False,
    most: float | None = None,
    colours: Colours | None = None,
) -> timeseries.Panel:
    """Values over time. `queries` maps each legend, which may name labels as {{label}}, to its PromQL."""
    panel = timeseries.Panel().title(title).description(reading).datasource(SOURCE).span(width).height(8)
    panel.unit(unit).min(0).line_width(1).fill_opacity(40 if stacked else 8).show_points(options.VisibilityMode.NEVER)
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST).show_legend(True)
    panel.legend(legend.placement(options.LegendPlacement.BOTTOM))
    several = options.TooltipDisplayMode.MULTI
    panel.tooltip(common.VizTooltipOptions().mode(several).sort(options.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if most is not None:
        panel.max(most)
    if colours:
        panel.thresholds(steps(colours))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    for query in over_time(queries):
        panel.with_target(query)
    return panel


def number(
    title: str, reading: str, query: str, *, unit: str = "short", width: int = 4, colours: Colours | None = None
) -> stat.Panel:
    """The latest value, with its recent course behind it."""
    panel = stat.Panel().title(title).description(reading).datasource(SOURCE).span(width).height(4).unit(unit)
    panel.graph_mode(options.BigValueGraphMode.AREA).color_mode(options.BigValueColorMode.VALUE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.thresholds(steps(colours or {None: "text"}))
    return panel.with_target(next(iter(over_time({title: query}))))


def words(title: str, reading: str, legend: str, query: str, *, width: int = 24) -> stat.Panel:
    """Labels in words: one line for each series of a query."""
    panel = stat.Panel().title(title).description(reading).datasource(SOURCE).span(width).height(3)
    panel.text_mode(options.BigValueTextMode.NAME).graph_mode(options.BigValueGraphMode.NONE)
    panel.color_mode(options.BigValueColorMode.NONE).text(common.VizTextDisplayOptions().title_size(16))
    return panel.with_target(at_present(query).legend_format(legend))


def matrix(
    title: str,
    reading: str,
    query: str,
    *,
    unit: str = "percentunit",
    decimals: int = 1,
    width: int = 12,
    colours: Colours | None = None,
    zero_is: str | None = None,
) -> table.Panel:
    """Layers down, experts across: the present value of each, as a coloured cell. The query has these two labels."""
    panel = table.Panel().title(title).description(reading).datasource(SOURCE).span(width).height(9)
    panel.unit(unit).decimals(decimals).align(options.FieldTextAlignment.CENTER)
    panel.cell_options(options.TableColoredBackgroundCellOptions(mode=options.TableCellBackgroundDisplayMode.BASIC))
    if colours:
        panel.thresholds(steps(colours)).color_scheme(FieldColor().mode(grafana.FieldColorModeId.THRESHOLDS))
    else:
        panel.color_scheme(FieldColor().mode(grafana.FieldColorModeId.CONTINUOUS_BL_YL_RD))
    if zero_is:
        words_of_zero = {"0": grafana.ValueMappingResult(text=zero_is)}
        panel.mappings([grafana.ValueMap(options=words_of_zero)])
    for name, settings in AS_MATRIX:
        panel.with_transformation(grafana.DataTransformerConfig(id_val=name, options=settings))
    plain = grafana.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "auto"})
    panel.override_by_name(r"layer\expert", [plain])
    return panel.with_target(at_present(query).format(PromQueryFormat.TABLE))


def heat(title: str, reading: str, legend: str, query: str, *, unit: str = "percentunit") -> heatmap.Panel:
    """One row for each series, time across, the value as colour."""
    panel = heatmap.Panel().title(title).description(reading).datasource(SOURCE).span(24).height(14)
    panel.calculate(False).max_data_points(150).show_legend()
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64))
    panel.cell_values(heatmap.CellValues().unit(unit).decimals(1)).filter_values(heatmap.FilterValueRange())
    return panel.with_target(next(iter(over_time({legend: query}))))


def states(
    title: str,
    reading: str,
    legend: str,
    query: str,
    *,
    unit: str = "short",
    width: int = 12,
    colours: Colours | None = None,
) -> statetimeline.Panel:
    """One row for each series, with a bar for the time in which it had a value."""
    panel = statetimeline.Panel().title(title).description(reading).datasource(SOURCE).span(width).height(9)
    panel.unit(unit).decimals(0).max_data_points(100).show_value(options.VisibilityMode.AUTO).fill_opacity(80)
    panel.thresholds(steps(colours or {None: "blue"}))
    panel.color_scheme(FieldColor().mode(grafana.FieldColorModeId.THRESHOLDS))
    return panel.with_target(next(iter(over_time({legend: query}))))


# Sorted as numbers, experts and within them layers, and only then spread out: cells come in the order of the rows.
# The layers end as text, because a number among the cells would take part in their colours' range.
AS_MATRIX: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    (
        "convertFieldType",
        {"conversions": [{"targetField": name, "destinationType": "number"} for name in ("layer", "expert")]},
    ),
    ("sortBy", {"sort": [{"field": "layer"}]}),
    ("sortBy", {"sort": [{"field": "expert"}]}),
    ("convertFieldType", {"conversions": [{"targetField": "layer", "destinationType": "string"}]}),
    ("groupingToMatrix", {"rowField": "layer", "columnField": "expert", "valueField": "Value"}),
)


def over_time(queries: Mapping[str, str]) -> list[prometheus.Dataquery]:
    named = zip("ABCDEFGH", queries.items(), strict=False)
    return [
        prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend).range() for ref, (legend, expr) in named
    ]


def at_present(expr: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id("A").expr(expr).instant()


def steps(colours: Colours) -> ThresholdsConfig:
    each = [grafana.Threshold(value=value, color=colour) for value, colour in colours.items()]
    return ThresholdsConfig().mode(grafana.ThresholdsMode.ABSOLUTE).steps(each)
