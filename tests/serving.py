"""A server in a thread of this process, for tests that are its clients."""

import contextlib
import threading
import time

import uvicorn

from minipaged.server.running import address, bind


@contextlib.contextmanager
def serving(app):
    """Yields its address. The engine stays open."""
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listening)
    finally:
        server.should_exit = True
        thread.join()
