"""Every Prometheus name in the product. Knows what the engine counted and how requests ended; counts no experts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from model.config import ModelConfig
from service.engine.reports import Figures, StepReport
from service.engine.sequence import Ended, FinishReason, Phase
from service.engine.thread import EnginePhase, EngineThread
from service.expert_window import ExpertWindow
from service.histogram import Histogram

SECONDS: Final = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

OUTCOME_OF_REASON: Final = {reason: reason.value for reason in FinishReason} | {
    FinishReason.QUEUE_TIMEOUT: "rejected_deadline",
    FinishReason.INTERNAL: "error",
    FinishReason.NON_FINITE: "error",
}
# Refused while loading, draining or failed is an outcome of its own: it is nobody's mistake and no fault.
OUTCOME_OF_TYPE: Final = {
    "invalid_request": "rejected_invalid",
    "conflict": "rejected_invalid",
    "overloaded": "rejected_full",
    "unavailable": "rejected_unready",
    "unauthorized": "unauthorized",
    "cancelled": "cancelled",
    "internal": "error",
}
OUTCOMES: Final = sorted({*OUTCOME_OF_REASON.values(), *OUTCOME_OF_TYPE.values()})


Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)

ExpertDetail = Literal["full", "layer", "off"]
"""Whether the metrics of experts are told for each of them, summed over those of a layer, or left out."""

MAX_EXPERT_SERIES: Final = 2_000
SERIES_PER_EXPERT: Final = 4


def expert_series(config: ModelConfig) -> int:
    """How many series every expert's own metrics would be."""
    return config.num_layers * config.num_experts * SERIES_PER_EXPERT


def expert_detail(wish: Literal["auto"] | ExpertDetail, config: ModelConfig) -> ExpertDetail:
    """What ``--expert-metrics`` comes to for this model: a scrape has to stay small for Prometheus and quick for us."""
    if wish != "auto":
        return wish
    return "full" if expert_series(config) <= MAX_EXPERT_SERIES else "layer"


class Metrics:
    """What the edge itself sees: how requests end, and how long everything takes. Used on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "moescope_requests",
            "Requests to generate text, by how they ended",
            ["outcome", "stream"],
            registry=self.registry,
        )
        self._ttft = self._seconds("time_to_first_token", "From accepting a request to its first token")
        self._inter_token = self._seconds("inter_token", "Between two tokens of one request")
        self._queue = self._seconds("queue", "From accepting a request to giving it a slot")
        self._request = self._seconds("request", "From accepting a request to its end")
        phases = "phase", [phase.value for phase in Phase]
        self._steps = self._histogram("step_seconds", "One step of the engine", SECONDS, phases)
        self._batch_size = self._histogram("batch_size", "Sequences decoded in one step", ROWS)
        for outcome in OUTCOMES:
            for stream in ("true", "false"):
                self._requests.labels(outcome, stream)

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return self._histogram(f"{name}_seconds", help_text, SECONDS)

    def _histogram(
        self, name: str, help_text: str, bounds: Sequence[float], label: tuple[str, list[str]] | None = None
    ) -> Histogram:
        histogram = Histogram(f"moescope_{name}", help_text, bounds, label)
        self.registry.register(histogram)
        return histogram

    def record_step(self, report: StepReport) -> None:
        if report.phase is None:  # only news of sequences that ended between two steps
            return
        self._steps.observe(report.seconds / report.steps, report.steps, report.phase)
        if report.phase is Phase.DECODE:
            self._batch_size.observe(report.batch_size, report.steps)

    def record_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def record_next_tokens(self, seconds: float, num_tokens: int) -> None:
        """So many that came together, and so long after the one before them."""
        self._inter_token.observe(seconds)
        if num_tokens > 1:
            self._inter_token.observe(0.0, num_tokens - 1)

    def record_end(self, ended: Ended, *, stream: bool) -> None:
        if ended.queue_s < ended.total_s:  # or it never had a slot
            self._queue.observe(ended.queue_s)
        self._request.observe(ended.total_s)
        self._count(OUTCOME_OF_REASON[ended.reason], stream)

    def record_refusal(self, error_type: str, *, stream: bool) -> None:
        self._count(OUTCOME_OF_TYPE[error_type], stream)

    def _count(self, outcome: str, stream: bool) -> None:
        self._requests.labels(outcome, str(stream).lower()).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that the scraper prefers."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library parses the header, and does not expect an odd one
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type


class EngineCollector(Collector):
    """Turns the engine's last consistent copy of its figures into samples; all zero until the first copy is there."""

    def __init__(
        self,
        engine: EngineThread,
        config: ModelConfig,
        detail: ExpertDetail,
        build: dict[str, str],
        window: ExpertWindow,
        window_s: float,
    ) -> None:
        self._engine = engine
        self._config = config
        self._detail = detail
        self._build = build
        self._window = window
        self._window_s = window_s

    def collect(self) -> Iterator[Metric]:
        figures = self._engine.last_figures or self._window.start
        yield from self._experts(figures)
        if self._detail != "off":
            yield from self._balance(figures)
        yield from self._sequences(figures)
        ready = GaugeMetricFamily("moescope_ready", "1 while text can be generated")
        ready.add_metric([], float(self._engine.phase is EnginePhase.READY))
        yield ready
        yield from self._about_the_build()

    def _experts(self, figures: Figures) -> Iterator[Metric]:
        tokens, weight, phases = figures.expert_counts, figures.gate_weight, [phase.value for phase in Phase]
        if self._detail == "layer":
            tokens, weight = tokens.sum(axis=-1), weight.sum(axis=-1)
        if self._detail != "off":
            of = ["layer", "expert"][: weight.ndim]
            help_text = "Sum of the weights that experts' work had"
            work = CounterMetricFamily("moescope_expert_tokens", "Tokens experts worked on", labels=["phase", *of])
            yield _filled(work, tokens, phases)
            yield _filled(CounterMetricFamily("moescope_expert_gate_weight", help_text, labels=of), weight)
        total = CounterMetricFamily("moescope_routed_tokens", "Tokens routed in a layer", labels=["phase", "layer"])
        yield _filled(total, figures.routed_tokens, phases)

    def _balance(self, figures: Figures) -> Iterator[Metric]:
        """What ``GET /experts?window=`` says of the same seconds."""
        load = self._window.load(figures, self._window_s)
        of_layers = {
            "expert_load_entropy_ratio": ("Entropy of the experts' load over that of an even one", load.entropy_ratio),
            "expert_max_load_ratio": ("Load of the busiest expert over the mean load", load.max_load_ratio),
            "experts_idle": ("Experts that no token was routed to", load.num_idle),
            "expert_drift_ratio": ("Jensen-Shannon divergence of the experts' shares from the baseline", load.drift),
        }
        for name, (help_text, values) in of_layers.items():
            yield _filled(GaugeMetricFamily(f"moescope_{name}", help_text, labels=["layer"]), values)
        if self._window.baseline is not None and self._detail == "full":
            help_text = "Share of a layer's work that an expert did on the validation text"
            share = GaugeMetricFamily("moescope_expert_baseline_share", help_text, labels=["layer", "expert"])
            yield _filled(share, self._window.baseline)

    def _sequences(self, figures: Figures) -> Iterator[Metric]:
        yield CounterMetricFamily("moescope_prompt_tokens", "Prompt tokens read", value=figures.prompt_tokens)
        yield CounterMetricFamily("moescope_generated_tokens", "Tokens drawn", value=figures.generated_tokens)
        yield GaugeMetricFamily("moescope_requests_running", "Requests that have a slot", value=figures.running)
        yield GaugeMetricFamily("moescope_requests_queued", "Requests that wait for a slot", value=figures.queued)
        age = 0.0 if figures is self._window.start else time.monotonic() - figures.taken_at
        yield GaugeMetricFamily("moescope_figures_age_seconds", "How old the engine's figures are", value=age)

    def _about_the_build(self) -> Iterator[Metric]:
        info = self._engine.info
        if info is None:  # which device and which runner turns out while loading
            return
        yield GaugeMetricFamily("moescope_slots", "Requests that can run at the same time", value=info.num_slots)
        invariant = float(info.row_multiple is not None)
        yield GaugeMetricFamily(
            "moescope_batch_invariant", "1 if a text's bits do not depend on its company", invariant
        )
        labels = {**self._build, "device": info.device, "runner": info.runner, "torch": info.torch_version}
        build = GaugeMetricFamily("moescope_build_info", "What is running; always 1", labels=list(labels))
        build.add_metric(list(labels.values()), 1)
        yield build


def _filled(family: Family, values: npt.NDArray[np.generic], names: Sequence[str] | None = None) -> Family:
    """The family with one sample for every value; its labels are the array's axes, the first one's labels are names."""
    for index in np.ndindex(values.shape):
        first, *others = index
        labels = [names[first] if names else str(first), *map(str, others)]
        family.add_metric(labels, values[index].item())
    return family
