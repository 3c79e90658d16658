"""moto's S3 server, which can be stopped and started again with its buckets as they were: `python s3_switch.py PORT`.

SIGUSR1: nobody listens any more. SIGUSR2: it listens again.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server


def main(port: int) -> None:
    """Serves until it is killed."""
    application, listening = DomainDispatcherApplication(create_backend_app), threading.Event()
    listening.set()
    running: list[BaseWSGIServer] = []

    def stop() -> None:
        while running:
            running.pop().shutdown()

    def on_stop(*signal_and_frame: Any) -> None:
        listening.clear()
        threading.Thread(target=stop).start()  # it waits for the loop that this handler interrupts

    signal.signal(signal.SIGUSR1, on_stop)
    signal.signal(signal.SIGUSR2, lambda *signal_and_frame: listening.set())
    while True:
        listening.wait()
        server = make_server("127.0.0.1", port, application, threaded=True)
        running.append(server)
        server.serve_forever()
        server.server_close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
