"""An iterator's items, fetched by a thread while the one before is in use."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


class Prefetch:
    """The items of an iterator in their order, and its error. What loader processes share takes some ms to be mapped:
    that is done here while a step runs. Nothing is kept of an item that was taken."""

    def __init__(self, items: Iterator):
        self.found: queue.Queue = queue.Queue(1)
        self.over = threading.Event()
        threading.Thread(target=_fetch, args=(items, self.found, self.over), daemon=True).start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        item, error = self.found.get()
        if error is None:
            return item
        self.found.put((None, error))  # for who asks again
        raise error

    def __del__(self) -> None:
        self.over.set()
        with suppress(queue.Empty):
            self.found.get_nowait()  # the thread may wait for room


def _fetch(items: Iterator, found: queue.Queue, over: threading.Event) -> None:
    error = None
    while error is None and not over.is_set():
        item = None
        try:
            item = next(items)
        except BaseException as e:  # whoever takes items raises it
            error = e
        found.put((item, error))
