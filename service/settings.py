"""Flags, environment, defaults, and one line for a value that cannot be. Knows nothing of what the settings steer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliImplicitFlag, SettingsConfigDict, SettingsError

from model.machine import usable_cpus

ENV_PREFIX = "MOESCOPE_"


class SettingsRefused(ValueError):
    """A flag or an environment variable cannot be honoured. The message is one line for whoever typed it."""


class Settings(BaseSettings):
    """Serve a mixture-of-experts language model over HTTP. The environment names a flag --max-new-tokens
    MOESCOPE_MAX_NEW_TOKENS; where both are given the flag wins."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 is every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    checkpoint: Path = Field(Path("checkpoints/shakespeare"), description="folder of the model to serve")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs; auto is cuda if there is one"
    )
    runner: Literal["auto", "native", "torch"] = Field(
        "auto", description="what runs the model on a CPU; auto is the native step, and torch where that cannot be had"
    )
    threads: int = Field(usable_cpus(), ge=1, le=1024, description="CPU threads of the model")
    slots: int | None = Field(
        None, ge=1, le=4096, description="requests that run at the same time; otherwise what fits in memory, at most 64"
    )
    kv_memory_mib: int = Field(1024, ge=1, description="most memory that the slots' caches may take, in MiB")
    queue: int = Field(
        256,
        ge=0,
        description="requests that may wait for a slot; one more, or one that would wait too long, gets a 429",
    )
    queue_timeout_s: float = Field(
        30, gt=0, le=86_400, allow_inf_nan=False, description="longest wait for a slot, in seconds; then a 504"
    )
    request_timeout_s: float = Field(
        300, gt=0, le=86_400, allow_inf_nan=False, description="longest life of a request, in seconds"
    )
    max_new_tokens: int = Field(4096, ge=1, le=1_000_000, description="most tokens that one request may ask for")
    prefill_chunk: int = Field(
        128,
        ge=16,
        multiple_of=16,
        description="tokens of a prompt that are read in one step; of several, twice as many",
    )
    grace_s: float = Field(
        30,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="time for running requests to finish at shutdown, in seconds",
    )
    stuck_after_s: float = Field(
        30,
        ge=1,
        le=86_400,
        allow_inf_nan=False,
        description="a step that takes longer is a failure, in seconds; the process then ends with code 70",
    )
    api_key: SecretStr | None = Field(
        None,
        description="what clients send as Authorization: Bearer KEY to everything but the page, /docs and the probes; "
        "the environment is the better place for it, as every user of the machine can read a command line",
    )
    open_metrics: CliImplicitFlag[bool] = Field(False, description="/metrics needs no key")
    allowed_hosts: str = Field(
        "",
        description="names, comma-separated, that clients may call this server by (Host), or * for any; against DNS "
        "rebinding. Allowed anyway: localhost, loopback addresses, the value of --host and, unless that is a loopback "
        "address, every address in numbers, which cannot be rebound",
    )
    allow_origin: str = Field(
        "",
        description="origins, comma-separated, whose pages may call this server from a browser, or * for all; "
        "for instance https://example.org",
    )
    expert_metrics: Literal["auto", "full", "layer", "off"] = Field(
        "auto",
        description="series of /metrics about experts: full has every expert's own, layer the sums over a layer's "
        "experts, off none; auto is full up to 2,000 such series, else layer",
    )
    expert_window_s: int = Field(
        300, ge=1, le=600, description="how far back the figures of experts' balance in /metrics look, in seconds"
    )
    targets: Path | None = Field(
        None, description="folder for a file that tells Prometheus (file_sd) where this process's metrics are"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, key: SecretStr | None) -> SecretStr | None:
        """A header carries nothing else unchanged."""
        if key is not None and not re.fullmatch(r"[!-~]+", key.get_secret_value()):
            raise ValueError("it should be ASCII letters, digits and signs, without a space")
        return key


class ReplicaSettings(Settings):
    """What ``service.ray_app`` heeds. --port is left to Ray: its proxy has one, and every replica takes a free one."""

    min_replicas: int = Field(1, ge=1, description="replicas that are always there")
    max_replicas: int | None = Field(
        None, ge=1, description="replicas that there may be while the slots of all are taken; otherwise the least"
    )

    @field_validator("checkpoint", "targets")
    @classmethod
    def _same_from_every_folder(cls, folder: Path | None) -> Path | None:
        return folder and folder.resolve()


def read_settings(arguments: Sequence[str]) -> Settings:
    """Flags, then environment, then defaults. Raises SettingsRefused; prints and exits for --help."""
    try:
        settings = Settings(_cli_parse_args=list(arguments))
    except SettingsError as error:
        raise SettingsRefused(str(error).removeprefix("error parsing CLI: ")) from None
    except ValidationError as error:
        raise SettingsRefused(_sentence(error)) from None
    if settings.api_key is None and any(argument.partition("=")[0] == "--api-key" for argument in arguments):
        raise SettingsRefused(
            "--api-key is empty; without a key leave the flag out"
        )  # "$UNSET" must not open the doors
    return settings


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should", "it should").replace("String should", "it should")
    value = "not shown" if name == "api_key" else repr(str(first["input"]))
    return f"--{name.replace('_', '-')} ({ENV_PREFIX}{name.upper()}) is {value}; {reason}"
