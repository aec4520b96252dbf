"""What the experts are doing."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.panels import (
    CELLS,
    GOOD_FROM_ONE,
    JOB,
    LAYERS,
    MATRIX_WINDOW,
    Colours,
    choice,
    dashboard,
    heat,
    lines,
    matrix,
    number,
    rate,
    row,
    states,
)

SHARE: Final = f"avg by (layer, expert) (moescope:expert_share:rate5m{{{LAYERS}}})"
BASELINE: Final = f"avg by (layer, expert) (moescope_expert_baseline_share{{{LAYERS}}})"
DRIFT_ALERT: Final = 0.03  # the line of the alert RoutingDrift in deploy/prometheus/rules.yml

BAD_FROM_ONE: Final[Colours] = {None: "green", 1: "red"}
RATIO_TO_BASELINE: Final[Colours] = {None: "red", 0.05: "orange", 0.5: "green", 2: "orange", 3: "red"}

ENOUGH: Final = f"on (layer) max by (layer) (moescope:expert_mean_tokens:increase5m{{{LAYERS}}}) >= 250"
NO_SINGLE: Final = f"unless on (layer) group by (layer) (moescope_expert_tokens_total{{{CELLS}}})"


def of_all(ratio: str, worst: str = "max") -> str:
    """By layer, over all instances; where there are no series of single experts, the worst instance's own."""
    gauge = f"{worst} by (layer) (moescope_{ratio}{{{LAYERS}}})"
    return f"max by (layer) (moescope:{ratio}:rate5m{{{LAYERS}}}) or {gauge} {NO_SINGLE}"


DRIFT: Final = of_all("expert_drift_ratio")
HOTTEST: Final = of_all("expert_max_load_ratio")
ENTROPY: Final = of_all("expert_load_entropy_ratio", worst="min")
IDLE: Final = (
    f"(sum by (layer) ({SHARE} == bool 0) and {ENOUGH}) "
    f"or max by (layer) (moescope_experts_idle{{{LAYERS}}}) {NO_SINGLE}"
)

EVENNESS: Final = {
    ENTROPY: ("Entropy", "1 is even load, 0 is one expert that does everything."),
    HOTTEST: ("Hottest over mean", "1 is even load; the number of experts is the worst."),
    IDLE: ("Idle by layer", "Experts without a token in the window; a healthy layer has none."),
}


def experts() -> Dashboard:
    page = dashboard(
        "moescope-experts",
        "Moescope / Experts",
        "What the experts are doing. Cells of single experts stay empty with --expert-metrics layer or off.",
    )
    layers = f"label_values(moescope_routed_tokens_total{{{JOB}}}, layer)"
    page.with_variable(choice("layer", "Layer", layers))
    for section in (
        experts_now,
        experts_who_does_the_work,
        experts_how_even_layer_by_layer,
        experts_reading_and_writing,
    ):
        section(page)
    return page


def experts_now(page: Dashboard) -> None:
    row(
        page,
        "Now",
        number(
            "Idle experts",
            "Experts that got no token in the window, over all layers; a trained model under traffic has none.",
            f"sum({IDLE})",
            colours=BAD_FROM_ONE,
            width=5,
        ),
        number(
            "Drift, worst layer",
            "How far the routing is from that on validation text: 0 is the same, 1 shares no expert; high means that "
            "people send other text than the model was trained for.",
            f"max({DRIFT})",
            unit="none",
            colours={None: "green", DRIFT_ALERT: "red"},
            width=5,
        ),
        number(
            "Load of the hottest, worst layer",
            "The busiest expert's load as a multiple of its layer's mean: 1 is perfectly even, the number of experts "
            "is one that does everything.",
            f"max({HOTTEST})",
            unit="none",
            colours={None: "green", 2: "orange", 3: "red"},
            width=5,
        ),
        number(
            "Evenness, worst layer",
            "Entropy of the load over its maximum: 100 % is perfectly even, 0 % is one expert that does everything.",
            f"min({ENTROPY})",
            unit="percentunit",
            colours={None: "red", 0.7: "orange", 0.9: "green"},
            width=5,
        ),
        number(
            "Routed",
            "Tokens routed per second in one layer; every layer sees each of them.",
            f"max({rate('moescope_routed_tokens_total', 'layer', LAYERS)})",
            unit="tokens/s",
        ),
    )


def experts_who_does_the_work(page: Dashboard) -> None:
    row(
        page,
        "Who does the work",
        matrix(
            "Share",
            "Each expert's share of its layer's work in the last five minutes: a row adds up to 100 %, red is busy, "
            "blue is not.",
            SHARE,
        ),
        matrix(
            "Share against baseline",
            "The share as a multiple of that on validation text: 1 is as trained, near 0 is dead, 3 is hot.",
            f"{SHARE} / {BASELINE}",
            unit="none",
            decimals=2,
            colours=RATIO_TO_BASELINE,
        ),
        heat(
            "Share over time",
            "A row for each expert, named layer.expert: a row that goes dark has lost its work, one that lights up has "
            "taken over another's.",
            "{{layer}}.{{expert}}",
            SHARE,
        ),
        states(
            "Hottest expert",
            "For each expert that was its layer's busiest, when it was and with which share; many short bars are "
            "an even layer.",
            "layer {{layer}}, expert {{expert}}",
            f"topk by (layer) (1, {SHARE})",
            unit="percentunit",
        ),
        matrix(
            "Idle map",
            "Tokens each expert worked on in the last five minutes; red had none, and all red is no traffic at all.",
            f"sum by (layer, expert) (increase(moescope_expert_tokens_total{{{CELLS}}}[{MATRIX_WINDOW}]))",
            unit="short",
            decimals=0,
            colours=GOOD_FROM_ONE,
            zero_is="idle",
        ),
    )


def experts_how_even_layer_by_layer(page: Dashboard) -> None:
    row(
        page,
        "How even, layer by layer",
        *(
            lines(title, reading, {"layer {{layer}}": query}, unit="none", width=8)
            for query, (title, reading) in EVENNESS.items()
        ),
        lines(
            "Jain index",
            "1 is even load; 1 divided by the number of experts is one expert that does everything.",
            {"layer {{layer}}": f"avg by (layer) (moescope:expert_jain_index:rate5m{{{LAYERS}}})"},
            unit="none",
            width=8,
            most=1,
        ),
        lines(
            "Drift",
            "Distance of the window's routing from the baseline: above the dashed line the alert RoutingDrift fires.",
            {"layer {{layer}}": DRIFT},
            unit="none",
            width=8,
            colours={None: "transparent", DRIFT_ALERT: "red"},
        ),
        lines(
            "Farthest from baseline",
            "The largest difference between an expert's share and its baseline, in each layer: who is meant, the "
            "matrix above tells.",
            {"layer {{layer}}": f"max by (layer) (abs({SHARE} - {BASELINE}))"},
            unit="percentunit",
            width=8,
        ),
    )


def experts_reading_and_writing(page: Dashboard) -> None:
    row(
        page,
        "Reading and writing",
        lines(
            "Prefill against decode",
            "Tokens routed per second and layer while prompts are read (prefill) and while text is drawn (decode).",
            {"{{phase}}": f"max by (phase) ({rate('moescope_routed_tokens_total', 'phase, layer', LAYERS)})"},
            unit="tokens/s",
            stacked=True,
            width=8,
        ),
        matrix(
            "Writers and readers",
            "Share while drawing minus share while reading: orange experts write more than they read, blue ones read "
            "more than they write.",
            f"{share_in('decode')} - {share_in('prefill')}",
            colours={None: "blue", -0.02: "transparent", 0.02: "orange"},
            width=8,
        ),
        matrix(
            "Weight",
            "The mean weight of an expert's answers: 50 % is an equal say of two, more means that the router is sure "
            "of it.",
            f"{per_expert('moescope_expert_gate_weight_total')} / {per_expert('moescope_expert_tokens_total')}",
            width=8,
        ),
    )


def per_expert(counter: str, where: str = CELLS) -> str:
    return rate(counter, "layer, expert", where, MATRIX_WINDOW)


def share_in(phase: str) -> str:
    where = f'{CELLS}, phase="{phase}"'
    of_layer = rate("moescope_expert_tokens_total", "layer", where, MATRIX_WINDOW)
    return f"({per_expert('moescope_expert_tokens_total', where)} / on (layer) group_left () {of_layer})"
