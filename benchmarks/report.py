"""From trials to figures, and from figures to a table for people. Starts nothing and measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.engine import EngineTrial
from benchmarks.over_http import HttpTrial

Figures = dict[str, Any]
# Two lines of heading, where the figure is found, how it is written.
COLUMNS = (
    ("", "streams", "streams", "{}"),
    ("engine", "tokens/s", "engine.tokens_per_second", "{:,.0f}"),
    ("(decode", "only)", "engine.decode_tokens_per_second", "{:,.0f}"),
    ("HTTP", "tokens/s", "http.tokens_per_second", "{:,.0f}"),
    ("HTTP of", "engine", "share", "{:.1%}"),
    ("1st token", "p50 ms", "http.first_token_ms.p50", "{:.1f}"),
    ("", "p95 ms", "http.first_token_ms.p95", "{:.1f}"),
    ("next token", "p50 ms", "http.inter_token_ms.p50", "{:.2f}"),
    ("", "p95 ms", "http.inter_token_ms.p95", "{:.2f}"),
    ("", "p99 ms", "http.inter_token_ms.p99", "{:.2f}"),
    ("CPU us/token", "engine", "engine.cpu_us_per_token", "{:,.0f}"),
    ("", "server", "http.cpu_us_per_token", "{:,.0f}"),
    ("", "client", "http.client_cpu_us_per_token", "{:,.0f}"),
)


def figures(streams: int, engine: Sequence[EngineTrial], http: Sequence[HttpTrial]) -> Figures:
    """Medians over the rounds. The share is of each round's pair, since a machine that slows down slows both."""
    shares = [over.tokens_per_second / alone.tokens_per_second for over, alone in zip(http, engine, strict=True)]
    return {
        "streams": streams,
        "engine": _engine(engine),
        "http": over_http(http),
        "share": round(statistics.median(shares), 4),
        "shares": [round(share, 4) for share in shares],
    }


def table(rows: Sequence[Figures]) -> str:
    lines = [[column[0] for column in COLUMNS], [column[1] for column in COLUMNS]]
    lines += [[_write(form, _find(row, path)) for _, _, path, form in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, cells, widths)).rstrip() for cells in lines)


def _engine(trials: Sequence[EngineTrial]) -> Figures:
    decode_rates = [trial.decode_rate for trial in trials if trial.decode_rate]
    return {
        **_rates(trials, [trial.cpu_seconds for trial in trials]),
        "decode_tokens_per_second": round(statistics.median(decode_rates), 1) if decode_rates else None,
    }


def over_http(trials: Sequence[HttpTrial]) -> Figures:
    answers = [answer for trial in trials for answer in trial.answers]
    return {
        "requests": len(trials[0].answers),
        **_rates(trials, [trial.server_cpu_seconds for trial in trials]),
        "client_cpu_us_per_token": _per_token(trials, [trial.client_cpu_seconds for trial in trials]),
        "first_token_ms": _percentiles([answer.token_times[0] - answer.sent_at for answer in answers], 50, 95),
        "inter_token_ms": _percentiles([gap for answer in answers for gap in answer.gaps], 50, 95, 99),
    }


def cores_of_others(trials: Sequence[HttpTrial]) -> float | None:
    """How many cores were busy with neither servers nor clients, on average over all trials; None without any."""
    others = sum(trial.others_cpu_seconds for trial in trials)
    return round(max(0.0, others) / sum(trial.seconds for trial in trials), 2) if trials else None


def _rates(trials: Sequence[EngineTrial | HttpTrial], cpu_seconds: Sequence[float]) -> Figures:
    rates = [trial.tokens_per_second for trial in trials]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "rounds": [round(rate, 1) for rate in rates],
        "cpu_us_per_token": _per_token(trials, cpu_seconds),
    }


def _percentiles(seconds: Sequence[float], *wanted: int) -> Figures:
    """By nearest rank, in milliseconds, over all values of all rounds at once: percentiles have no mean."""
    ranked = sorted(seconds)
    return {f"p{percent}": round(ranked[-(-len(ranked) * percent // 100) - 1] * 1000, 3) for percent in wanted}


def _per_token(trials: Sequence[EngineTrial | HttpTrial], seconds: Sequence[float]) -> float:
    """In microseconds."""
    return round(sum(seconds) / sum(trial.tokens for trial in trials) * 1e6, 1)


def _find(row: Figures, path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value[name]
    return value


def _write(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value)
