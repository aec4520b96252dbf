"""``python -m service``: settings in, port bound, checkpoint checked, then served until a signal.

Every refusal is one line on standard error and a nonzero exit code.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from service.settings import Settings

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2


class PortRefused(Exception):
    """The address cannot be listened on. One line that says what to do."""


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, _leave)  # until the server takes over; while importing, to begin with
    from model.checkpoint import CheckpointError
    from service.logs import configure_logging
    from service.settings import SettingsRefused, read_settings
    from service.targets import TargetsRefused
    from service.threads import tune_process

    tune_process()
    try:
        settings = read_settings(arguments)
    except SettingsRefused as refusal:
        return _refuse(f"{refusal} (--help lists all settings)", EXIT_USAGE)
    configure_logging(settings.log_level)
    try:
        listener = bind(settings.host, settings.port)
        return _serve(settings, listener)
    except (PortRefused, CheckpointError, TargetsRefused) as refusal:
        return _refuse(str(refusal), EXIT_REFUSED)


def _leave(*_: object) -> None:
    # GNU make, which gets the same Ctrl-C, says "wait: No child processes" if we are gone before it has noticed.
    time.sleep(0.2)
    os._exit(0)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortRefused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # two processes can bind one port; only one can listen
        return listener
    except (socket.gaierror, UnicodeError):
        raise PortRefused(f"--host {host} is no address of this machine") from None
    except OSError as error:
        raise PortRefused(_advice(host, port, error)) from None


def _advice(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what runs there, or choose another port: --port {port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one from 1024 up, for instance --port 8000"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def _serve(settings: Settings, listener: socket.socket) -> int:
    from service.app import create_app  # after the port: a busy one is refused at once
    from service.server import serve
    from service.targets import announce

    app = create_app(settings)
    return serve(app, listener, announce(settings.targets, listener))


def _refuse(message: str, code: int) -> int:
    print(f"moescope: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
