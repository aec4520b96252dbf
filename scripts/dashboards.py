"""Writes Grafana's dashboards, deploy/grafana/dashboards/*.json: ``make dashboards``. What they show is decided here.

A panel is one call of a kind of panel in scripts/panels.py: title, how to read it, PromQL. ``--check`` writes nothing
and says which files are not what this script would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from scripts.panels import (
    CELLS,
    HERE,
    JOB,
    LAYERS,
    MATRIX_WINDOW,
    RECORDED,
    Colours,
    choice,
    dashboard,
    heat,
    lines,
    matrix,
    mean,
    number,
    quantile,
    quantiles,
    rate,
    states,
    words,
)

TARGET: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"
SHARE: Final = f"avg by (layer, expert) (moescope:expert_share:rate5m{{{RECORDED}}})"
BASELINE: Final = f"avg by (layer, expert) (moescope_expert_baseline_share{{{LAYERS}}})"
DRIFT_ALERT: Final = 0.03  # the line of the alert RoutingDrift in deploy/prometheus/rules.yml

BAD_FROM_ONE: Final[Colours] = {None: "green", 1: "red"}
GOOD_FROM_ONE: Final[Colours] = {None: "red", 1: "green"}
RATIO_TO_BASELINE: Final[Colours] = {None: "red", 0.05: "orange", 0.5: "green", 2: "orange", 3: "red"}

LATENCIES: Final = {
    "time_to_first_token": ("Time to first token", "From accepting a request to its first token: waiting and reading."),
    "inter_token": ("Between two tokens", "What a reader feels while text streams; more streams make it longer."),
    "queue": ("In the queue", "From accepting a request to giving it a slot; near zero while slots are free."),
    "request": ("Whole request", "From accepting a request to its end; it follows the length that people ask for."),
}
EVENNESS: Final = {
    "moescope_expert_load_entropy_ratio": ("Entropy", "1 is even load, 0 is one expert that does everything."),
    "moescope_expert_max_load_ratio": ("Hottest over mean", "1 is even load; the number of experts is the worst."),
    "moescope_experts_idle": ("Idle by layer", "Experts without a token in the window; a healthy layer has none."),
}


def overview() -> Dashboard:
    page = dashboard("moescope-overview", "Moescope / Overview", "Is it well, who uses it, how long does that take?")
    for section in (overview_now, overview_traffic, overview_latency, overview_batching, overview_process):
        section(page)
    return page


def overview_now(page: Dashboard) -> None:
    page.with_row(Row("Now"))
    page.with_panel(
        number(
            "Ready",
            "Instances that can generate text now; fewer than you run means that one is loading, draining or down.",
            f"sum(moescope_ready{{{HERE}}})",
            colours=GOOD_FROM_ONE,
        )
    )
    page.with_panel(
        number(
            "Running",
            "Requests that have a slot and are generating; beside Slots it tells how full the house is.",
            f"sum(moescope_requests_running{{{HERE}}})",
        )
    )
    page.with_panel(
        number("Slots", "Requests that can run at the same time; more have to queue.", f"sum(moescope_slots{{{HERE}}})")
    )
    page.with_panel(
        number(
            "Queued",
            "Requests that wait for a slot; a number that stays above zero means more demand than slots.",
            f"sum(moescope_requests_queued{{{HERE}}})",
            colours={None: "green", 1: "yellow", 64: "red"},
        )
    )
    page.with_panel(
        number(
            "Text",
            "Tokens drawn per second over all requests: the speed of the whole machine, not that of one stream.",
            rate("moescope_generated_tokens_total"),
            unit="tokens/s",
        )
    )
    page.with_panel(
        number(
            "Same text in any company",
            "1 if the start-up probe found that a request's text does not depend on who else is there; 0 is a warning.",
            f"min(moescope_batch_invariant{{{HERE}}})",
            colours={None: "yellow", 1: "green"},
        )
    )


def overview_traffic(page: Dashboard) -> None:
    page.with_row(Row("Traffic"))
    page.with_panel(
        lines(
            "Requests by outcome",
            "How requests end: stop, length and eos are texts that came to an end, the rest are people who left, "
            "refusals and faults.",
            {"{{outcome}}": rate("moescope_requests_total", "outcome") + " > 0"},
            unit="reqps",
            stacked=True,
        )
    )
    page.with_panel(
        lines(
            "Tokens",
            "Prompt tokens read and tokens drawn per second; reading is much cheaper than drawing.",
            {"read": rate("moescope_prompt_tokens_total"), "drawn": rate("moescope_generated_tokens_total")},
            unit="tokens/s",
        )
    )
    page.with_panel(
        states(
            "Alerts",
            "A bar for the time in which an alert was pending (yellow) or firing (red); none is good.",
            "{{alertname}} {{layer}} {{expert}}",
            f'max by (alertname, layer, expert) (ALERTS{{{JOB}, alertstate="firing"}} * 2 or ALERTS{{{JOB}}})',
            width=24,
            colours={None: "yellow", 2: "red"},
        )
    )


def overview_latency(page: Dashboard) -> None:
    page.with_row(Row("Latency"))
    for metric, (title, reading) in LATENCIES.items():
        sentence = f"{reading} p95 is the time that 95 of 100 stay under."
        page.with_panel(lines(title, sentence, quantiles(f"moescope_{metric}_seconds"), unit="s"))


def overview_batching(page: Dashboard) -> None:
    page.with_row(Row("Batching"))
    page.with_panel(
        lines(
            "Batch size",
            "Sequences decoded in one step: the mean, and what 95 of 100 steps stay under; larger batches share the "
            "cost of reading the weights.",
            {"mean": mean("moescope_batch_size"), "p95": quantile(0.95, "moescope_batch_size")},
            unit="none",
        )
    )
    page.with_panel(
        lines(
            "Requests and slots",
            "Running requests against the slots there are; who does not fit is queued.",
            {
                "running": f"sum(moescope_requests_running{{{HERE}}})",
                "queued": f"sum(moescope_requests_queued{{{HERE}}})",
                "slots": f"sum(moescope_slots{{{HERE}}})",
            },
            unit="none",
        )
    )
    page.with_panel(
        lines(
            "Step time",
            "How long one step of the engine takes, by phase: prefill reads a piece of a prompt, decode draws a token "
            "for everybody.",
            {
                "{{phase}} p50": quantile(0.5, "moescope_step_seconds", "le, phase"),
                "{{phase}} p95": quantile(0.95, "moescope_step_seconds", "le, phase"),
            },
            unit="s",
        )
    )
    page.with_panel(
        lines(
            "Engine at work",
            "The part of the time that the engine spends in steps, by phase; near 100 % more load only makes "
            "everybody slower.",
            {"{{phase}}": f"avg by (phase) (rate(moescope_step_seconds_sum{{{HERE}}}[$__rate_interval]))"},
            unit="percentunit",
            stacked=True,
        )
    )


def overview_process(page: Dashboard) -> None:
    page.with_row(Row("Process"))
    page.with_panel(
        lines(
            "CPU",
            "Processor seconds used per second, so 2 is two cores at work; idle should be near zero.",
            {"{{instance}}": f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval])"},
            unit="none",
            width=8,
        )
    )
    page.with_panel(
        lines(
            "Memory",
            "Resident memory; it stays level once all slots have been used, and steady growth is a leak.",
            {"{{instance}}": f"process_resident_memory_bytes{{{HERE}}}"},
            unit="bytes",
            width=8,
        )
    )
    page.with_panel(
        lines(
            "File descriptors",
            "Open files and connections as a part of the limit; at 100 % new connections fail.",
            {"{{instance}}": f"process_open_fds{{{HERE}}} / process_max_fds{{{HERE}}}"},
            unit="percentunit",
            width=8,
            colours={None: "transparent", 0.8: "red"},
        )
    )
    page.with_panel(
        lines(
            "Up since",
            "How long each instance has been running; a fall to zero is a restart.",
            {"{{instance}}": f"time() - process_start_time_seconds{{{HERE}}}"},
            unit="s",
            width=8,
        )
    )
    page.with_panel(
        lines(
            "Age of the figures",
            "How old the engine's figures were when they were scraped; seconds mean that a step takes that long.",
            {"{{instance}}": f"moescope_figures_age_seconds{{{HERE}}}"},
            unit="s",
            width=8,
        )
    )
    page.with_panel(
        words(
            "Build",
            "What is running: version, the first letters of the checkpoint's SHA-256, device, runner and PyTorch.",
            "{{version}}, checkpoint {{checkpoint}}, {{device}}, {{runner}}, PyTorch {{torch}}",
            f"max by (version, checkpoint, device, runner, torch) (moescope_build_info{{{HERE}}})",
            width=8,
        )
    )


def experts() -> Dashboard:
    page = dashboard(
        "moescope-experts",
        "Moescope / Experts",
        "What the experts are doing. Cells of single experts stay empty with --expert-metrics layer or off.",
    )
    layers = f"label_values(moescope_routed_tokens_total{{{HERE}}}, layer)"
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
    page.with_row(Row("Now"))
    page.with_panel(
        number(
            "Idle experts",
            "Experts that got no token in the window, over all layers; a trained model under traffic has none.",
            f"sum(moescope_experts_idle{{{LAYERS}}})",
            colours=BAD_FROM_ONE,
            width=5,
        )
    )
    page.with_panel(
        number(
            "Drift, worst layer",
            "How far the routing is from that on validation text: 0 is the same, 1 shares no expert; high means that "
            "people send other text than the model was trained for.",
            f"max(moescope_expert_drift_ratio{{{LAYERS}}})",
            unit="none",
            colours={None: "green", DRIFT_ALERT: "red"},
            width=5,
        )
    )
    page.with_panel(
        number(
            "Load of the hottest, worst layer",
            "The busiest expert's load as a multiple of its layer's mean: 1 is perfectly even, the number of experts "
            "is one that does everything.",
            f"max(moescope_expert_max_load_ratio{{{LAYERS}}})",
            unit="none",
            colours={None: "green", 2: "orange", 3: "red"},
            width=5,
        )
    )
    page.with_panel(
        number(
            "Evenness, worst layer",
            "Entropy of the load over its maximum: 100 % is perfectly even, 0 % is one expert that does everything.",
            f"min(moescope_expert_load_entropy_ratio{{{LAYERS}}})",
            unit="percentunit",
            colours={None: "red", 0.7: "orange", 0.9: "green"},
            width=5,
        )
    )
    page.with_panel(
        number(
            "Routed",
            "Tokens routed per second in one layer; every layer sees each of them.",
            f"max({rate('moescope_routed_tokens_total', 'layer', LAYERS)})",
            unit="tokens/s",
        )
    )


def experts_who_does_the_work(page: Dashboard) -> None:
    page.with_row(Row("Who does the work"))
    page.with_panel(
        matrix(
            "Share",
            "Each expert's share of its layer's work in the last five minutes: a row adds up to 100 %, red is busy, "
            "blue is not.",
            SHARE,
        )
    )
    page.with_panel(
        matrix(
            "Share against baseline",
            "The share as a multiple of that on validation text: 1 is as trained, near 0 is dead, 3 is hot.",
            f"{SHARE} / {BASELINE}",
            unit="none",
            decimals=2,
            colours=RATIO_TO_BASELINE,
        )
    )
    page.with_panel(
        heat(
            "Share over time",
            "A row for each expert, named layer.expert: a row that goes dark has lost its work, one that lights up has "
            "taken over another's.",
            "{{layer}}.{{expert}}",
            SHARE,
        )
    )
    page.with_panel(
        states(
            "Hottest expert",
            "For each expert that was its layer's busiest, when it was and with which share; many short bars are "
            "an even layer.",
            "layer {{layer}}, expert {{expert}}",
            f"topk by (layer) (1, {SHARE})",
            unit="percentunit",
        )
    )
    page.with_panel(
        matrix(
            "Idle map",
            "Tokens each expert worked on in the last five minutes; red had none, and all red is no traffic at all.",
            f"sum by (layer, expert) (increase(moescope_expert_tokens_total{{{CELLS}}}[{MATRIX_WINDOW}]))",
            unit="short",
            decimals=0,
            colours=GOOD_FROM_ONE,
            zero_is="idle",
        )
    )


def experts_how_even_layer_by_layer(page: Dashboard) -> None:
    page.with_row(Row("How even, layer by layer"))
    for metric, (title, reading) in EVENNESS.items():
        query = f"max by (layer) ({metric}{{{LAYERS}}})"
        page.with_panel(lines(title, reading, {"layer {{layer}}": query}, unit="none", width=8))
    page.with_panel(
        lines(
            "Jain index",
            "1 is even load; 1 divided by the number of experts is one expert that does everything.",
            {"layer {{layer}}": f"avg by (layer) (moescope:expert_jain_index:rate5m{{{RECORDED}}})"},
            unit="none",
            width=8,
            most=1,
        )
    )
    page.with_panel(
        lines(
            "Drift",
            "Distance of the window's routing from the baseline: above the dashed line the alert RoutingDrift fires.",
            {"layer {{layer}}": f"max by (layer) (moescope_expert_drift_ratio{{{LAYERS}}})"},
            unit="none",
            width=8,
            colours={None: "transparent", DRIFT_ALERT: "red"},
        )
    )
    page.with_panel(
        lines(
            "Farthest from baseline",
            "The largest difference between an expert's share and its baseline, in each layer: who is meant, the "
            "matrix above tells.",
            {"layer {{layer}}": f"max by (layer) (abs({SHARE} - {BASELINE}))"},
            unit="percentunit",
            width=8,
        )
    )


def experts_reading_and_writing(page: Dashboard) -> None:
    page.with_row(Row("Reading and writing"))
    page.with_panel(
        lines(
            "Prefill against decode",
            "Tokens routed per second and layer while prompts are read (prefill) and while text is drawn (decode).",
            {"{{phase}}": f"max by (phase) ({rate('moescope_routed_tokens_total', 'phase, layer', LAYERS)})"},
            unit="tokens/s",
            stacked=True,
            width=8,
        )
    )
    page.with_panel(
        matrix(
            "Writers and readers",
            "Share while drawing minus share while reading: orange experts write more than they read, blue ones read "
            "more than they write.",
            f"{share_in('decode')} - {share_in('prefill')}",
            colours={None: "blue", -0.02: "transparent", 0.02: "orange"},
            width=8,
        )
    )
    page.with_panel(
        matrix(
            "Weight",
            "The mean weight of an expert's answers: 50 % is an equal say of two, more means that the router is sure "
            "of it.",
            f"{per_expert('moescope_expert_gate_weight_total')} / {per_expert('moescope_expert_tokens_total')}",
            width=8,
        )
    )


def per_expert(counter: str, where: str = CELLS) -> str:
    return rate(counter, "layer, expert", where, MATRIX_WINDOW)


def share_in(phase: str) -> str:
    where = f'{CELLS}, phase="{phase}"'
    of_layer = rate("moescope_expert_tokens_total", "layer", where, MATRIX_WINDOW)
    return f"({per_expert('moescope_expert_tokens_total', where)} / on (layer) group_left () {of_layer})"


def files() -> dict[str, str]:
    """Name and text of every dashboard's file."""
    return {"overview.json": as_json(overview()), "experts.json": as_json(experts())}


def as_json(page: Dashboard) -> str:
    model: dict[str, Any] = json.loads(json.dumps(page.build(), cls=JSONEncoder))
    for place, panel in enumerate(model["panels"], start=1):
        panel["id"] = place  # without one Grafana numbers them itself
    return json.dumps(model, indent=1, sort_keys=True) + "\n"


def stale(folder: Path) -> list[str]:
    """Names of the files in it that are not what would be written, missing ones and those of nobody included."""
    there = {path.name: path.read_text() for path in folder.glob("*.json")}
    wanted = files()
    return sorted(name for name in there | wanted if there.get(name) != wanted.get(name))


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Grafana's dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are stale, exit 1")
    if not parser.parse_args().check:
        write(TARGET)
    elif names := stale(TARGET):
        sys.exit(f"deploy/grafana/dashboards: {', '.join(names)} not as the script writes it; run make dashboards")


if __name__ == "__main__":
    main()
