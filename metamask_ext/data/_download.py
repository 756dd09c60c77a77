"""One short try to download a data set."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable

PROBE_SECONDS = 3.0
STALL_SECONDS = 10.0


def try_download(url: str, download: Callable[[], object]) -> str | None:
    """Call ``download`` if ``url``, one of its files, answers in a few seconds.

    Returns:
        The reason why it failed, or None.
    """
    answer: list[str] = []

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answer.append("")
        except (OSError, ValueError) as error:
            answer.append(str(error))

    # The timeout does not cover a name server that does not answer: hence the thread.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answer or answer[0]:
        return answer[0] if answer else f"no answer in {PROBE_SECONDS:.0f} s"

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        download()
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    finally:
        socket.setdefaulttimeout(timeout)
    return None
