"""The ranks of a run, watched: where each of them is, a stop at one step, and who is missing when nothing moves.

A thread of each rank looks into the store that all have in common, whatever the main thread does: it may be deep in a
compiler, in a collective that will never end, or in a data wait. Who has to say something (a signal came, nothing
moves, an error) asks all; who lives answers with where he is; the asking rank judges, and all do what it finds.
"""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import torch.distributed as dist

from mmfunc import tree
from mmfunc.shard import state
from mmfunc.shard.meet import FAULT, Agreed, Start, absent, brief, collective, fault, named, process, stacks
from mmfunc.shard.use import use

BAD, STOPPED = 3, 75  # exit codes
BEAT = 0.5  # seconds between two looks into the store; of thousands of ranks each looks less often
ANSWER = 8.0  # seconds in which a rank that lives answers
LONG = {"load": 10, "compile": 10, "show": math.inf, "work": math.inf, "end": math.inf}  # times the patience


class Stop(BaseException):
    """Waiting that is broken off, because the run is to stop."""


class Job:
    """The run of this rank among others: what it is doing, and what it does when one of them stops or is missing."""

    def __init__(self, store: dist.Store, at: Start, people: list[tuple[str, int]], *, out: Path | None,
                 patience: float):
        self.store, self.begun, self.people, self.out, self.patience = store, at, people, out, patience
        self.rank, self.world = at.rank, at.world
        self.phase, self.turn, self.since, self.beaten = "start", 0, time.monotonic(), time.monotonic()
        self.number = self.kept = 0  # updates that are done, and of these on their way to the disk
        self.written: Future | None = None  # when they are there
        self.asked = self.stopping = self.stopped = self.waiting = False
        self.error: tuple[int, str] | None = None
        self.judged, self.ended, self.free, self.words = *(threading.Event() for _ in range(3)), 0
        self.free.set()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Job":
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        self.was = signal.signal(signal.SIGTERM, self._signalled)
        # the main thread may be where Python handles no signals: the thread hears of them by this
        self.fd = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        threading.Thread(target=self._pulse, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self._together()
        elif self.world > 1 and not isinstance(error, Agreed):
            code = BAD if isinstance(error, ValueError | FileNotFoundError) else 1
            self.error = code, f"{type(error).__name__}: {brief(error)}"
            self.judged.wait(3 * ANSWER)
        self.ended.set()
        self.mouth.send(b"\0")  # wakes it
        self.thread.join()
        self._last(range(self.world), 3)
        signal.set_wakeup_fd(self.fd)
        # a launcher that sees one rank's end would break off the others' on their last lines
        signal.signal(signal.SIGTERM, self.was if self.world == 1 else signal.SIG_IGN)
        self.ear.close()
        self.mouth.close()

    def _together(self) -> None:
        """Until all ranks are here; the thread answers as long."""
        self.mark("end")
        self.store.set(f"end/{self.rank}", "")
        keys = [f"end/{r}" for r in range(self.world)] if self.rank == 0 else ["end"]
        while not self.store.check(keys):
            time.sleep(0.1)
        self.store.set("end", "")

    # ---- what the main thread tells

    def mark(self, phase: str) -> None:
        """Something new begins; all ranks say so."""
        self.free.wait()
        self.phase, self.since, self.turn = phase, time.monotonic(), self.turn + 1

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Within, something goes on that all ranks wait for."""
        self.mark(phase)
        yield
        self.mark("after")

    def save(self, number: int) -> None:
        """Have saved, as steps() was told, that so many updates are done."""
        self.written = self.saving(number)
        self.number = self.kept = number

    def alone(self, fn: Callable, *args: object) -> None:
        """fn of whole tensors, run by the first rank, for which the others wait as long as it takes."""
        with self.at("show"):
            state.alone(fn, *args)

    def everyone(self, error: Exception | None, said: Any) -> list:
        """What each rank says; an error of one of them is raised by all."""
        if self.world == 1 and error:
            raise error
        told = state.everyone((str(error) if error else None, said))
        if wrong := [f"rank {r}: {e}" for r, (e, _) in enumerate(told) if e]:
            raise Agreed("; ".join(wrong[:3])) from error
        return [x for _, x in told]

    def steps(self, stream: Iterable, done: int, save: Callable[[int], Future], *, ahead: bool) -> Iterator:
        """The items (number, micro-batches, facts) of a stream, each when all ranks have theirs. It ends too, with
        `stopped` and what was done saved, where one of them is asked to stop.

        save: starts to save what is done, so many updates. ahead: also before a batch of new shapes, the compilation of
        which cannot be broken off.
        """
        stream, known = iter(stream), set()
        self.saving, self.number, self.kept = save, done, done
        while True:
            item, error = self._next(stream)
            new = str([tree.map(lambda t: tuple(t.shape), m) for m in item[1]]) if item else ""
            self.mark("meeting")
            said = self.everyone(error, (self.stopping, item is None, ahead and new not in known))
            self.stopped, over, fresh = (any(x) for x in zip(*said))
            if (self.stopped or fresh and not over) and self.number > self.kept:
                self.mark("checkpoint")
                self.save(self.number)
            if self.stopped or over:
                return
            known.add(new)
            self.mark("compile" if fresh else "compute")
            yield item
            self.number = item[0] + 1

    def _next(self, stream: Iterator) -> tuple[Any, Exception | None]:
        """(the next item, None), (None, what went wrong), or nothing of both: it is over, or the run is to stop."""
        self.mark("data")
        try:
            self.waiting = True
            item = None if self.stopping else next(stream, None)
            self.waiting = False
            return item, None
        except Stop:
            return None, None
        except (ValueError, OSError) as e:
            return None, e
        finally:
            self.waiting = False

    def each(self, fn: Callable, items: Iterable) -> Iterator:
        """fn of each item, in their order; ranks take turns, each works alone, and all get to know all results."""
        items = list(items)
        for start in range(0, len(items), self.world):
            found = error = None
            self.mark("work")
            try:
                with use(None):
                    found = fn(items[start + self.rank]) if start + self.rank < len(items) else None
            except (ValueError, OSError) as e:
                error = e
            self.mark("meeting")
            yield from self.everyone(error, found)[: len(items) - start]

    def once(self, fn: Callable, *args: Any) -> Any:
        """What the first rank gets of fn, which it runs alone."""
        return next(self.each(lambda _: fn(*args), [0]))

    # ---- what the thread does

    def _signalled(self, *_: Any) -> None:
        if self.waiting and self.stopping:
            self.waiting = False
            raise Stop

    def _watch(self) -> None:
        while not self.ended.is_set():
            if select([self.ear], [], [], BEAT * max(1, self.world / 2000))[0]:
                self.asked |= signal.SIGTERM in self.ear.recv(64)
            try:
                self._beat()
                self.beaten = time.monotonic()
            except RuntimeError as e:
                if not self.ended.is_set():
                    self._lost(brief(e))

    def _pulse(self) -> None:
        """See that the other thread does not wait for a store that does not answer, which torch never gives up."""
        while not self.ended.wait(BEAT):
            if (late := time.monotonic() - self.beaten) > max(self.patience, 4 * ANSWER):
                self._lost(f"no answer since {late:.0f} s")

    def _beat(self) -> None:
        key = f"word/{self.words}"
        if not self.store.check([key]):
            over, late = self.over(), f"nothing moves since {time.monotonic() - self.since:.0f} s"
            why = ("failed", self.error[1]) if self.error and not self.judged.is_set() else (
                ("stop", "SIGTERM") if self.asked and not self.stopping else ("hang", late) if over else None)
            if why:
                code = self.error[0] if why[0] == "failed" else FAULT
                self.store.compare_set(key, "", json.dumps([self.rank, *why, code]))
        if self.store.check([key]):
            self._answer(*json.loads(self.store.get(key)))
        if self.stopping and self.waiting:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def _lost(self, why: str) -> None:
        """The store is gone, with the process that held it."""
        said = f"the store, which {'the launcher' if self.begun.agent else 'it'} held, is gone: {why}"
        self._leave(FAULT, said if self.begun.agent else fault(said, self.people, [0], {}), tell=True)

    def over(self) -> bool:
        """Whether the main thread has been where it is for too long."""
        return time.monotonic() - self.since > self.patience * LONG.get(self.phase, 1)

    def _answer(self, asking: int, kind: str, said: str, code: int) -> None:
        """Say where this rank is, and do what the asking one finds."""
        at, self.words = self.words, self.words + 1
        if kind == "stop":
            self.free.clear()  # nothing new begins before it is known where to stop
        mine = {"order": [self.turn, collective()[0]], "phase": self.phase, "number": self.number, "kept": self.kept,
                "over": self.over(), "collective": collective()[1]}
        self.store.set(f"answer/{at}/{self.rank}", json.dumps(mine))
        if asking == self.rank:
            found = self._judge(at, kind, said, code)
            self.store.set(f"found/{at}", json.dumps(found))
        if not absent(self.store, [f"found/{at}"], 2 * ANSWER):
            found = json.loads(self.store.get(f"found/{at}"))
        else:
            found = {"code": FAULT, "text": f"rank {asking} asked all others ({said}) and is gone", "there": []}
        if kind == "hang" and not found:
            self.since = time.monotonic()  # what all wait for may take longer
        self.stopping |= kind == "stop"
        if not found:
            self.free.set()
        if found and not (self.error and found.get("code") != FAULT):
            self._leave(**found, tell=self.rank in (0, asking))
        if self.error:
            self.judged.set()

    def _judge(self, at: int, kind: str, said: str, code: int) -> dict:
        """What all are to do: nothing, or to leave with a code."""
        keys = [f"answer/{at}/{r}" for r in range(self.world)]
        gone = absent(self.store, keys, ANSWER, lambda r: process(*self.people[r]) != "")
        told = {r: json.loads(self.store.get(keys[r])) for r in range(self.world) if r not in gone}
        there = sorted(told)
        if gone:
            return {"code": FAULT, "text": fault(said, self.people, gone, told), "there": there}
        if kind == "stop":
            same = all(t["kept"] == t["number"] == told[0]["number"] for t in told.values())
            wait = any(t["phase"] in LONG for t in told.values())  # else a step ends soon
            return {"code": STOPPED, "text": "", "there": there} if same and wait else {}
        if kind == "failed":
            return {"code": code, "text": f"{named(self.people, self.rank)}: {said}", "there": there}
        behind = [r for r, t in told.items() if t["order"] == min(t["order"] for t in told.values())]
        if not any(told[r]["over"] for r in behind):
            return {}
        return {"code": FAULT, "text": fault(said, self.people, behind, told), "there": there}

    def _leave(self, code: int, text: str, there: Sequence[int] = (), tell: bool = False) -> None:
        """End this process from the thread."""
        if code == STOPPED and self.written and (e := self.written.exception()):
            code, text, tell = 1, str(e), True
        if code == FAULT and self.out:
            stacks(Path(self.out) / f"rank-{self.rank}", text)
        if tell and text:
            where = f"\nThe stacks of all are in {self.out}/rank-*" if code == FAULT and self.out else ""
            print(text + where, file=sys.stderr)
        self._last(there, 3)
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # only now: the main thread would fail at it
            child.kill()
        os._exit(code)

    def _last(self, there: Sequence[int], seconds: float) -> None:
        """The rank that holds the store leaves last."""
        if not there:
            return
        try:
            self.store.set(f"left/{self.rank}", "")
            if self.begun.hosts:
                absent(self.store, [f"left/{r}" for r in there], seconds, lambda r: process(*self.people[r]) == "gone")
        except RuntimeError:
            pass  # the one who holds it is gone
