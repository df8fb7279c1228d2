"""Where the answers of one asker wait until they are taken. Whoever computes a step, each answer reaches who asked."""

from minipaged.text.outputs import RequestOutput


class Mailbox:
    """Of each request the newest state, which holds all that was before.

    Whoever takes the answers and is interrupted before they are there says `not_taken`, and finds them again.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, RequestOutput] = {}
        self._taken: dict[str, RequestOutput] = {}
        self._told: dict[str, RequestOutput] = {}  # of requests that are told only what is new: what they know

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def put(self, answer: RequestOutput) -> None:
        """Putting it twice does no harm."""
        self._waiting[answer.request_id] = answer

    def take(self) -> list[RequestOutput]:
        """All that wait, in the order in which the requests first had something to say."""
        self._taken, self._waiting = self._waiting, {}
        return [a.since(self._told.get(name)) if a.only_new else a for name, a in self._taken.items()]

    def not_taken(self) -> None:
        self._waiting, self._taken = self._taken | self._waiting, {}

    def arrived(self) -> None:
        """What was taken last is where it should be."""
        for name, answer in self._taken.items():
            if answer.only_new and not answer.finished:
                self._told[name] = answer
            else:
                self._told.pop(name, None)
        self._taken = {}

    def drop(self, request_id: str) -> None:
        for answers in (self._waiting, self._taken, self._told):
            answers.pop(request_id, None)
