"""Is it well, who uses it, how long does that take?"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.panels import (
    GOOD_FROM_ONE,
    HERE,
    JOB,
    choice,
    dashboard,
    lines,
    mean,
    number,
    quantile,
    quantiles,
    rate,
    row,
    states,
    words,
)

LATENCIES: Final = {
    "time_to_first_token": ("Time to first token", "From accepting a request to its first token: waiting and reading."),
    "inter_token": ("Between two tokens", "What a reader feels while text streams; more streams make it longer."),
    "queue": ("In the queue", "From accepting a request to giving it a slot; near zero while slots are free."),
    "request": ("Whole request", "From accepting a request to its end; it follows the length that people ask for."),
}


def overview() -> Dashboard:
    page = dashboard("moescope-overview", "Moescope / Overview", "Is it well, who uses it, how long does that take?")
    page.with_variable(choice("instance", "Instance", f"label_values(moescope_ready{{{JOB}}}, instance)"))
    for section in (overview_now, overview_traffic, overview_latency, overview_batching, overview_process):
        section(page)
    return page


def overview_now(page: Dashboard) -> None:
    row(
        page,
        "Now",
        number(
            "Ready",
            "Instances that can generate text now; fewer than you run means that one is loading, draining or down.",
            f"sum(moescope_ready{{{HERE}}})",
            colours=GOOD_FROM_ONE,
        ),
        number(
            "Running",
            "Requests that have a slot and are generating; beside Slots it tells how full the house is.",
            f"sum(moescope_requests_running{{{HERE}}})",
        ),
        number(
            "Slots", "Requests that can run at the same time; more have to queue.", f"sum(moescope_slots{{{HERE}}})"
        ),
        number(
            "Queued",
            "Requests that wait for a slot; a number that stays above zero means more demand than slots.",
            f"sum(moescope_requests_queued{{{HERE}}})",
            colours={None: "green", 1: "yellow", 64: "red"},
        ),
        number(
            "Text",
            "Tokens drawn per second over all requests: the speed of the whole machine, not that of one stream.",
            rate("moescope_generated_tokens_total"),
            unit="tokens/s",
        ),
        number(
            "Same text in any company",
            "1 if the start-up probe found that a request's text does not depend on who else is there; 0 is a warning.",
            f"min(moescope_batch_invariant{{{HERE}}})",
            colours={None: "yellow", 1: "green"},
        ),
    )


def overview_traffic(page: Dashboard) -> None:
    row(
        page,
        "Traffic",
        lines(
            "Requests by outcome",
            "How requests end: stop, length and eos are texts that came to an end, the rest are people who left, "
            "refusals and faults.",
            {"{{outcome}}": rate("moescope_requests_total", "outcome") + " > 0"},
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Tokens",
            "Prompt tokens read and tokens drawn per second; reading is much cheaper than drawing.",
            {"read": rate("moescope_prompt_tokens_total"), "drawn": rate("moescope_generated_tokens_total")},
            unit="tokens/s",
        ),
        states(
            "Alerts",
            "A bar for the time in which an alert was pending (yellow) or firing (red); none is good.",
            "{{alertname}} {{layer}} {{expert}}",
            f'max by (alertname, layer, expert) (ALERTS{{{JOB}, alertstate="firing"}} * 2 or ALERTS{{{JOB}}})',
            width=24,
            colours={None: "yellow", 2: "red"},
        ),
    )


def overview_latency(page: Dashboard) -> None:
    more = "p95 is the time that 95 of 100 stay under."
    row(
        page,
        "Latency",
        *(
            lines(title, f"{reading} {more}", quantiles(f"moescope_{metric}_seconds"), unit="s")
            for metric, (title, reading) in LATENCIES.items()
        ),
    )


def overview_batching(page: Dashboard) -> None:
    row(
        page,
        "Batching",
        lines(
            "Batch size",
            "Sequences decoded in one step: the mean, and what 95 of 100 steps stay under; larger batches share the "
            "cost of reading the weights.",
            {"mean": mean("moescope_batch_size"), "p95": quantile(0.95, "moescope_batch_size")},
            unit="none",
        ),
        lines(
            "Requests and slots",
            "Running requests against the slots there are; who does not fit is queued.",
            {
                "running": f"sum(moescope_requests_running{{{HERE}}})",
                "queued": f"sum(moescope_requests_queued{{{HERE}}})",
                "slots": f"sum(moescope_slots{{{HERE}}})",
            },
            unit="none",
        ),
        lines(
            "Step time",
            "How long one step of the engine takes, by phase: prefill reads a piece of a prompt, decode draws a token "
            "for everybody.",
            {
                "{{phase}} p50": quantile(0.5, "moescope_step_seconds", "le, phase"),
                "{{phase}} p95": quantile(0.95, "moescope_step_seconds", "le, phase"),
            },
            unit="s",
        ),
        lines(
            "Engine at work",
            "The part of the time that the engine spends in steps, by phase; near 100 % more load only makes "
            "everybody slower.",
            {"{{phase}}": f"avg by (phase) (rate(moescope_step_seconds_sum{{{HERE}}}[$__rate_interval]))"},
            unit="percentunit",
            stacked=True,
        ),
    )


def overview_process(page: Dashboard) -> None:
    row(
        page,
        "Process",
        lines(
            "CPU",
            "Processor seconds used per second, so 2 is two cores at work; idle should be near zero.",
            {"{{instance}}": f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval])"},
            unit="none",
            width=8,
        ),
        lines(
            "Memory",
            "Resident memory; it stays level once all slots have been used, and steady growth is a leak.",
            {"{{instance}}": f"process_resident_memory_bytes{{{HERE}}}"},
            unit="bytes",
            width=8,
        ),
        lines(
            "File descriptors",
            "Open files and connections as a part of the limit; at 100 % new connections fail.",
            {"{{instance}}": f"process_open_fds{{{HERE}}} / process_max_fds{{{HERE}}}"},
            unit="percentunit",
            width=8,
            colours={None: "transparent", 0.8: "red"},
        ),
        lines(
            "Up since",
            "How long each instance has been running; a fall to zero is a restart.",
            {"{{instance}}": f"time() - process_start_time_seconds{{{HERE}}}"},
            unit="s",
            width=8,
        ),
        lines(
            "Age of the figures",
            "How old the engine's figures were when they were scraped; seconds mean that a step takes that long.",
            {"{{instance}}": f"moescope_figures_age_seconds{{{HERE}}}"},
            unit="s",
            width=8,
        ),
        words(
            "Build",
            "What is running: version, the first letters of the checkpoint's SHA-256, device, runner and PyTorch.",
            "{{version}}, checkpoint {{checkpoint}}, {{device}}, {{runner}}, PyTorch {{torch}}",
            f"max by (version, checkpoint, device, runner, torch) (moescope_build_info{{{HERE}}})",
            width=8,
        ),
    )
