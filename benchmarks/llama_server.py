"""llama.cpp's own HTTP server, compiled here for the processor that it will run on. Knows nothing of the race.

Its wheels know no instructions newer than AVX2, so that they run anywhere; our native step is compiled for the
processor at hand, and so is this. The sources come with the source distribution of xllamacpp.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.environments import XLLAMACPP, PeerFailed, environment, install, run_quietly
from benchmarks.over_http import started
from service.engine.native.library import compiler
from service.engine.processor import cpu_flags, cpu_model

SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # it would be fetched
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    # Or it would ask git, and this folder lies in a repository of ours.
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": XLLAMACPP.replace("==", "-"),
}


def program(environments: Path) -> Path:
    """The server, which is compiled on first use: some ten minutes of two cores. Raises PeerFailed."""
    build = build_folder(environments)
    home = build.parent
    whole = build / "whole"  # an interrupted linker may leave half a server
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            compile_in(home, build)
            whole.touch()
    return build / "bin" / "llama-server"


def build_folder(environments: Path) -> Path:
    """Of this version of llama.cpp and of this processor."""
    home = environments.resolve() / f"llama.cpp-{XLLAMACPP.partition('==')[2]}"  # cmake goes elsewhere
    processor = sha256(f"{cpu_model()} {sorted(cpu_flags())}".encode()).hexdigest()[:8]
    return home / f"build-{processor}"


def compile_in(home: Path, build: Path) -> None:
    """Goes on where it was interrupted. Raises PeerFailed."""
    if compiler() is None or shutil.which("cc") is None:
        raise PeerFailed("llama.cpp is compiled here, and there is no C and C++ compiler (Debian: apt install g++)")
    print(f"compiling llama.cpp's server for this processor in {build}: some ten minutes", flush=True)
    python = environment(home / "tools")
    tools = python.parent
    if not all((tools / each.partition("==")[0]).exists() for each in TOOLS):
        install(python, *TOOLS)
    source = _source(home, python)
    where = ("-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}")
    _logged([tools / "cmake", *where, *(f"-D{name}={value}" for name, value in OPTIONS.items())], home)
    _logged([tools / "cmake", "--build", build, "--target", "llama-server"], home)


def _source(home: Path, python: Path) -> Path:
    """llama.cpp's sources, fetched and unpacked whole or not at all. Raises PeerFailed."""
    source = home / "source"
    if source.exists():
        return source
    with tempfile.TemporaryDirectory(dir=home) as name:
        fetch = (python, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:")
        run_quietly([*fetch, "--dest", name, XLLAMACPP], f"fetching {XLLAMACPP}")
        (archive,) = Path(name).glob("*.tar.gz")
        if sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise PeerFailed(f"{archive.name} is not the one that was raced before: its SHA-256 is another")
        with tarfile.open(archive) as tar:
            tar.extractall(name)  # what it holds is known by its digest
        (unpacked,) = Path(name).glob("*/thirdparty/llama.cpp")
        unpacked.rename(source)
    return source


def _logged(command: Sequence[str | Path], home: Path) -> None:
    log = home / "build.log"
    # Its own group, which ends with us: cmake leaves the compilers running.
    with log.open("a") as file, started(command, stdout=file, stderr=subprocess.STDOUT) as process:
        status = process.wait()
    if status:
        raise PeerFailed(f"compiling llama.cpp ended with {status}; {log} says why")


def flags(model: Path, slots: int, context: int, threads: int, port: int) -> list[str | Path]:
    """Its best settings as far as we know them; what is not here is its default.

    So keys and values are float16, under flash attention: float32 without it took as much CPU time a token here.
    """
    return [
        *("-m", model, "-t", str(threads), "-tb", str(threads)),
        *("-np", str(slots), "-c", str(slots * context)),
        "--no-kv-unified",  # a slot's attention then looks at its own cache alone
        *("--no-cache-prompt", "--cache-ram", "0"),  # every prompt is read, as elsewhere
        *("--no-ui", "--no-slots", "--log-verbosity", "2"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def about(server: Path) -> dict[str, Any]:
    """Its version, and what of this processor it was compiled for and uses. Raises PeerFailed."""
    version = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    # It tells what it uses before it looks for its model, and only to whom wants to hear more than usual.
    talkative = ("--log-verbosity", "4", "--log-colors", "off", "-m", os.devnull)
    told = subprocess.run([str(server), *talkative], capture_output=True, text=True, check=False)
    lines = (version.stdout + version.stderr + told.stdout + told.stderr).splitlines()
    found: dict[str, Any] = {
        name: next((line.partition(name)[2].strip(" :") for line in lines if name in line), None)
        for name in ("version", "system_info")
    }
    if None in found.values():
        raise PeerFailed(f"{server} does not run here: it ended with {version.returncode}")
    return {"source": XLLAMACPP, **found}
