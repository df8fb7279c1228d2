"""A server in a thread of the test: its engine can be asked, too."""

import contextlib
import threading
import time

from minipaged import AsyncLLM
from minipaged.server.app import create_app
from minipaged.server.running import address, bind, serve


class Served:
    """An application, from now on until `stop`; its engine stays open until `close`."""

    def __init__(self, app):
        self.app, self.house, self.llm = app, app.state.house, app.state.house.llm
        self.listening = bind("127.0.0.1", 0)
        self.url, self.port = address(self.listening) + "/", self.listening.getsockname()[1]
        self._thread = threading.Thread(target=serve, args=(app, self.listening))
        self._thread.start()

    def stop(self):
        """As a signal would. Returns the seconds that it took."""
        began = time.monotonic()
        self.house.closing = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        return time.monotonic() - began

    def close(self):
        self.stop()
        self.llm.shutdown()


class Slow(Served):
    """With an engine of its own. slow: seconds that a step takes at least, so that something can be seen."""

    def __init__(self, folder, config, **options):
        llm = AsyncLLM(folder, **{"num_blocks": 96, "block_size": 8, **options})
        self.slow = 0.0
        llm.engine.observers.append(lambda *_: time.sleep(self.slow))
        super().__init__(create_app(llm, config))

    @property
    def num_used(self):
        return self.llm.engine.memory.num_blocks - self.llm.engine.memory.num_free


@contextlib.contextmanager
def serving(app):
    """Yields its address. The engine stays open."""
    served = Served(app)
    try:
        yield served.url.rstrip("/")
    finally:
        served.stop()
