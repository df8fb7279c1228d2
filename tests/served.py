"""A server on a model of one's own, in threads of the test: its engine can be asked, too."""

import signal
import threading
import time

import uvicorn

from minipaged.async_llm import AsyncLLM
from minipaged.server.app import create_app
from minipaged.server.running import _Server, bind


class Served:
    """slow: seconds that a step takes at least, so that something can be seen."""

    def __init__(self, folder, config, **options):
        self.slow = 0.0
        self.llm = AsyncLLM(folder, **{"num_blocks": 96, "block_size": 8, **options})
        self.llm.engine.observers.append(lambda *_: time.sleep(self.slow))
        self.app = create_app(self.llm, config)
        self.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        options = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 1}
        self._server = _Server(uvicorn.Config(self.app, **options), self.app.state.house)
        self._thread = threading.Thread(target=self._server.run, args=([self.socket],))
        self._thread.start()

    def stop(self):
        """As a signal would. Returns the seconds that it took."""
        began = time.monotonic()
        self._server.handle_exit(signal.SIGTERM, None)
        self._thread.join(20)
        assert not self._thread.is_alive()
        return time.monotonic() - began

    def close(self):
        if self._thread.is_alive():
            self.stop()
        self.llm.shutdown()
        self.socket.close()

    @property
    def num_used(self):
        return self.llm.engine.memory.num_blocks - self.llm.engine.memory.num_free
