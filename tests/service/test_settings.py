"""Settings come from flags, then the environment, then defaults, and a bad one is refused in one helpful line."""

from pathlib import Path

import pytest

from service.settings import Settings, SettingsRefused, read_settings
from tests.service.serving import run_to_the_end


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MOESCOPE_{name.upper()}", raising=False)


def test_defaults_serve_the_shipped_checkpoint_on_this_machine_only() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.checkpoint == Path("checkpoints/shakespeare")


def test_a_flag_wins_over_the_environment_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_PORT", "9000")
    monkeypatch.setenv("MOESCOPE_MAX_NEW_TOKENS", "100")
    monkeypatch.setenv("MOESCOPE_QUEUE", "")
    settings = read_settings(["--port", "9001"])
    assert (settings.port, settings.max_new_tokens, settings.queue) == (9001, 100, 256)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port (MOESCOPE_PORT) is '70000'"),
        (["--port", "http"], "--port (MOESCOPE_PORT) is 'http'"),
        (["--grace-s", "nan"], "--grace-s (MOESCOPE_GRACE_S) is 'nan'"),
        (["--device", "tpu"], "'auto', 'cpu' or 'cuda'"),
        (["--expert-metrics", "some"], "'auto', 'full', 'layer' or 'off'"),
        (["--slots", "0"], "greater than or equal to 1"),
        (["--prefill-chunk", "100"], "multiple of 16"),
        (["--slot", "4"], "unrecognized arguments: --slot 4"),
        (["--api-keys", "x"], "unrecognized arguments"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key="], "--api-key is empty"),
        (["--api-key", "hush hush"], "without a space"),
        (["--queue"], "expected one argument"),
        (["serve"], "unrecognized arguments: serve"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it(arguments: list[str], said: str) -> None:
    with pytest.raises(SettingsRefused) as refusal:
        read_settings(arguments)
    assert said in str(refusal.value)
    assert "hush" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_bad_variable_is_refused_by_the_name_it_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_REQUEST_TIMEOUT_S", "soon")
    with pytest.raises(SettingsRefused, match="MOESCOPE_REQUEST_TIMEOUT_S"):
        read_settings([])


def test_the_command_refuses_with_one_line_and_no_traceback() -> None:
    refused = run_to_the_end("--slots", "many")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("moescope: --slots")
    assert refused.stdout == ""


def test_help_lists_every_setting() -> None:
    told = run_to_the_end("--help")
    assert told.returncode == 0
    assert all(f"--{name.replace('_', '-')}" in told.stdout for name in Settings.model_fields)
