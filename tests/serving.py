"""Runs a server of a test on a thread."""

import contextlib
import threading


@contextlib.contextmanager
def serving(server):
    """Serve while the block runs; yields the base URL."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
