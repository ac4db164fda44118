"""Worker processes that read batches: each has a pipe and memory of its own, and none can leave the caller waiting.

A pipe has one writer, so that a worker that dies closes it, in the middle of a message too. Arrays are passed through
anonymous memory that the processes share from the start. That needs no ``/dev/shm``, which has only 64 MB in many
containers, no semaphores and no sockets.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from fastmem.errors import FastmemError

# batches that every worker prepares ahead
PREFETCH = 2
# stands for the end of the batches
_END = object()

Read = Callable[[np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class _Worker:
    """A worker process with the caller's end of its pipe, and the memory for its next results, if it has any."""

    process: BaseProcess
    pipe: Connection
    memory: mmap.mmap | None


@dataclass(frozen=True)
class _Raised:
    """An exception that the code in a worker raised, with the worker's traceback as text."""

    error: Exception
    trace: str


class WorkersNotStarted(FastmemError):
    """The system refuses to start worker processes."""


def read_in_workers(read: Read, batches: Iterable[np.ndarray | None], workers: int, batch_bytes: int) -> Iterator[Any]:
    """Start worker processes and yield ``read(batch)`` for each of the given batches, in their order.

    An exception that ``read`` raises is raised again. The processes end with the iterator.

    Args:
        read: returns the result for a batch.
        batches: integers [n] each, taken a little before they are read; None where there is none until the results of
            those before have been taken.
        workers: number of processes.
        batch_bytes: how large a result usually is at most, in bytes; a larger one is passed through the pipe.

    Raises:
        WorkersNotStarted: the system refuses to start processes.
        FastmemError: a worker died.
    """
    slot_bytes, ahead = max(1, batch_bytes), PREFETCH * workers
    started: list[_Worker] = []
    source, asked, given = iter(batches), 0, 0
    try:
        _start_all(started, read, workers, slot_bytes)
        over = False
        while not over or given < asked:
            while not over and asked - given < ahead:
                batch = next(source, _END)
                if batch is None:
                    break
                over = batch is _END
                if not over:
                    _ask(started, asked, batch)
                    asked += 1
            if given == asked:
                continue
            result = _receive(started, given, slot_bytes)
            given += 1
            if isinstance(result, _Raised):
                raise result.error from RuntimeError(f"in a worker process:\n{result.trace}")
            yield result
    finally:
        _stop(started)


def _start_all(started: list[_Worker], read: Read, workers: int, slot_bytes: int) -> None:
    """Start worker processes and append them to ``started``, which names those to stop after an error too."""
    if multiprocessing.current_process().daemon:
        raise WorkersNotStarted(
            f"expected to start {workers} worker processes to read images, got a daemonic process, which may have "
            "none: use 0 workers"
        )
    # Ctrl-C is sent to the workers too: they inherit that it is blocked, and the main process stops them instead
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for _ in range(workers):
            started.append(_start(read, slot_bytes, [other.pipe for other in started]))
    except OSError as error:
        raise WorkersNotStarted(
            f"expected to start {workers} worker processes to read images, got {error.strerror or error}: use fewer "
            "workers (0 for none)"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start(read: Read, slot_bytes: int, others: list[Connection]) -> _Worker:
    # a forked worker starts at once and shares memory, but a fresh process would have to import torch first
    forked = sys.platform == "linux"
    context: Any = multiprocessing.get_context("fork" if forked else None)
    memory = _shared(PREFETCH * slot_bytes) if forked else None
    pipe, theirs = context.Pipe()
    # a forked worker has copies of the caller's ends of all pipes; they would keep a pipe open when the caller is gone
    inherited = [pipe, *others] if forked else []
    arguments = (read, theirs, inherited, memory, slot_bytes)
    process = context.Process(target=_work, args=arguments, daemon=True)
    try:
        process.start()
    except OSError:
        pipe.close()
        raise
    finally:
        theirs.close()
    return _Worker(process, pipe, memory)


def _shared(size: int) -> mmap.mmap | None:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError):
        # where so much cannot be had, results are passed through the pipe
        return None


def _ask(workers: list[_Worker], number: int, batch: Any) -> None:
    worker = workers[number % len(workers)]
    try:
        worker.pipe.send(batch)
    except OSError as error:
        raise _death(workers, worker) from error


def _receive(workers: list[_Worker], number: int, slot_bytes: int) -> Any:
    worker = workers[number % len(workers)]
    wait([worker.pipe, worker.process.sentinel])
    try:
        # what a worker sent before it died can still be received
        if not worker.pipe.poll():
            raise EOFError
        content, sizes = worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _death(workers, worker) from error
    start, buffers = _slot_of(number, len(workers), slot_bytes), []
    for size in sizes:
        assert worker.memory is not None
        # numpy asks the system for large pages, which makes this copy several times as fast as one to a bytearray
        buffers.append(np.frombuffer(worker.memory, np.uint8, size, start).copy())
        start += size
    return pickle.loads(content, buffers=buffers)


def _slot_of(number: int, workers: int, slot_bytes: int) -> int:
    return number // workers % PREFETCH * slot_bytes


def _death(workers: list[_Worker], worker: _Worker) -> FastmemError:
    worker.process.join(1)
    code = worker.process.exitcode
    how = "it closed its pipe" if code is None else f"exit status {code}"
    if code is not None and code < 0:
        how = f"killed by signal {-code}"
    return FastmemError(
        f"expected {len(workers)} worker processes to read images until the end, got one that died ({how}); it may "
        "have run out of memory: use fewer workers (0 for none) or smaller batches"
    )


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        # they only read, so nothing is lost; a stopped process would not heed a milder signal
        worker.process.kill()
    for worker in workers:
        worker.process.join()


def _work(
    read: Read,
    pipe: Connection,
    inherited: list[Connection],
    memory: mmap.mmap | None,
    slot_bytes: int,
) -> None:
    """Read the batches that come through the pipe, until the caller closes it."""
    for other in inherited:
        other.close()
    # the caller's handler, if it has one, is not meant for a worker
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # threads of the caller's torch do not exist in a forked process
    torch.set_num_threads(1)
    asked = 0
    try:
        while True:
            batch = pipe.recv()
            try:
                message = _packed(read(batch), memory, asked % PREFETCH * slot_bytes, slot_bytes)
            except Exception as error:
                message = _packed_error(error)
            asked += 1
            pipe.send(message)
    except (EOFError, OSError):
        # the caller is gone or needs no more
        return


def _packed(result: Any, memory: mmap.mmap | None, start: int, room: int) -> tuple[bytes, list[int]]:
    """Return a result as bytes, without the arrays that were copied to the shared memory, and the arrays' sizes."""
    sizes: list[int] = []

    def keep_in_bytes(buffer: pickle.PickleBuffer) -> bool:
        nonlocal start, room
        raw = buffer.raw()
        if memory is None or raw.nbytes > room:
            return True
        memory[start : start + raw.nbytes] = raw
        sizes.append(raw.nbytes)
        start, room = start + raw.nbytes, room - raw.nbytes
        return False

    content = io.BytesIO()
    _Pickler(content, protocol=5, buffer_callback=keep_in_bytes).dump(result)
    return content.getvalue(), sizes


def _packed_error(error: Exception) -> tuple[bytes, list[int]]:
    trace = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps(_Raised(error, trace))
        # some exceptions can be pickled but not made again
        pickle.loads(content)
    except Exception:
        content = pickle.dumps(_Raised(RuntimeError(f"a worker process failed:\n{trace}"), trace))
    return content, []


class _Pickler(pickle.Pickler):
    """A pickler that writes a tensor as its array, because torch would pass it through ``/dev/shm``."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor:
            return torch.from_numpy, (np.ascontiguousarray(value.detach().numpy()),)
        return NotImplemented
