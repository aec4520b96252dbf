"""What a stranger's machine needs: pins that cover everything, one-line refusals, an image with nothing extra in it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def groups() -> dict[str, list[Requirement]]:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return {name: [Requirement(line) for line in lines] for name, lines in named.items()}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def installed_for(requirements: list[Requirement]) -> dict[str, str]:
    """Name and version of every installed distribution that the requirements reach, themselves included."""
    found: dict[str, str] = {}
    waiting = [(canonicalize_name(each.name), frozenset(each.extras)) for each in requirements]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        distribution = importlib.metadata.distribution(name)
        found[name] = Version(distribution.version).public
        needed = map(Requirement, distribution.requires or [])
        wanted = [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras | {""})]
        fresh = {(canonicalize_name(r.name), frozenset(r.extras)) for r in wanted} - seen
        seen |= fresh
        waiting += fresh
    return found


def test_everything_that_is_installed_has_its_exact_version_in_the_constraints() -> None:
    needed = groups()
    installed = installed_for(needed["run"] + needed["train"] + needed["test"])
    pinned = pins()
    assert {name: pinned.get(name) for name in installed} == installed


def test_every_pin_satisfies_its_dependency_group_and_names_no_build() -> None:
    pinned = pins()
    for requirement in [each for group in groups().values() for each in group]:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert not [version for version in pinned.values() if "+" in version]


def test_serving_installs_nothing_for_training_or_tests() -> None:
    served = installed_for(groups()["run"])
    assert not {"rich", "pytest", "transformers", "playwright"} & set(served)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without its code and .venv: all that `make` reads before anything of ours runs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def without_pip_s_settings() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PIP_"))}


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = without_pip_s_settings() | environment
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=100
    )


def our_words(made: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said on stderr, less the trailer that make adds after any command that failed."""
    assert made.returncode == 2
    return [line for line in made.stderr.splitlines() if not line.startswith("make: ***")]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_make_alone_lists_every_command(checkout: Path) -> None:
    listed = re.findall(r"^  make (\w+)", make(checkout).stdout, re.MULTILINE)
    assert set(listed) == {
        "help",
        "serve",
        "test",
        "train",
        "lint",
        "sanitize",
        "bench",
        "prove",
        "evidence",
        "walkthrough",
        "dashboards",
        "picture",
        "traffic",
    }


def test_an_old_python_is_refused_in_one_line(checkout: Path) -> None:
    old = script(checkout / "python3.9", "echo 3.9")
    (line,) = our_words(make(checkout, "serve", f"PYTHON={old}"))
    assert "needs Python 3.11 or newer" in line
    assert f"{old} is 3.9" in line
    assert not (checkout / ".venv").exists()


def test_a_python_that_does_not_run_is_refused_in_one_line(checkout: Path) -> None:
    (line,) = our_words(make(checkout, "test", "PYTHON=/nowhere/python3"))
    assert "/nowhere/python3 does not run" in line
    assert "make serve PYTHON=" in line


def test_a_python_without_its_venv_module_is_refused_in_one_line(checkout: Path) -> None:
    # Debian's python3 without python3-venv is a Python that cannot import ensurepip.
    (checkout / "ensurepip.py").write_text("raise ImportError('not on this machine')")
    bare = script(checkout / "python3", f'PYTHONPATH="{checkout}" exec "{sys.executable}" "$@"')
    (line,) = our_words(make(checkout, "serve", f"PYTHON={bare}"))
    assert "has no venv module" in line
    assert "apt install python3-venv" in line


def test_no_network_is_told_in_one_line_and_a_second_run_can_go_on(checkout: Path) -> None:
    nobody_listens = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):
        made = make(checkout, "serve", f"PYTHON={sys.executable}", PIP_NO_CACHE_DIR="1", **nobody_listens)
        (line,) = our_words(made)
        assert "The package index cannot be reached" in line
        assert ".venv/install.log" in line
    assert "Making .venv" not in made.stdout
    assert not (checkout / ".venv/serve.stamp").exists()


def test_a_second_installation_waits_for_the_first_while_that_lives(checkout: Path) -> None:
    first = subprocess.Popen(["sleep", "100"])
    (checkout / ".venv.lock").symlink_to(str(first.pid))
    nobody_listens = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    second = subprocess.Popen(
        ["bash", "scripts/install.sh", "run"],
        cwd=checkout,
        env=without_pip_s_settings() | {"PYTHON": sys.executable, "PIP_NO_CACHE_DIR": "1", **nobody_listens},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"Another installation is at work here (process {first.pid})")
    first.kill()
    first.wait()
    output, errors = second.communicate(timeout=60)
    assert output.startswith("Making .venv")
    assert "The package index cannot be reached" in errors
    assert not (checkout / ".venv.lock").is_symlink()


def test_host_and_port_reach_the_service_only_from_the_command_line(checkout: Path) -> None:
    def command(*arguments: str) -> str:
        return make(checkout, "-n", "-o", ".venv/serve.stamp", "serve", *arguments, HOST="conda", PORT="1").stdout

    assert command().split() == ["exec", ".venv/bin/python", "-m", "service"]
    assert command("PORT=9000", "ARGS=--slots 4").split()[-4:] == ["--port", "'9000'", "--slots", "4"]


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied(stages: str) -> set[str]:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", stages, re.MULTILINE)
    return {source for line in copies for source in line.split()}


def test_the_image_holds_the_service_the_model_and_checkpoints_only() -> None:
    assert copied(DOCKERFILE.rpartition("\nFROM ")[2]) == {"service", "model", "checkpoints", "pyproject.toml"}


def test_the_build_context_holds_what_the_image_copies_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied(DOCKERFILE)


IN_A_CLONE = pytest.mark.skipif(
    not (shutil.which("git") and (ROOT / ".git").exists()), reason="it asks git, and these files are no clone"
)


@IN_A_CLONE
def test_checkpoints_are_kept_byte_for_byte_by_git() -> None:
    names = ["checkpoints/shakespeare/tokenizer.json", "checkpoints/shakespeare/model.safetensors"]
    git = ["git", "-C", str(ROOT), "check-attr", "text", "--", *names]
    told = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["unset", "unset"]


@IN_A_CLONE
def test_git_ignores_what_running_and_training_leave_behind() -> None:
    left = ["x/.venv/bin/python", "data/tinyshakespeare.txt", "runs/quick/step-1/README.md", "model/__pycache__/a.pyc"]
    git = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--", *left, "model/router.py"]
    told = subprocess.run(git, capture_output=True, text=True)
    assert told.stdout.splitlines() == left, told.stderr
