"""Flower's simulation as an engine: each client is a virtual SuperNode, Ray actors run them. The one file with flwr.

The simulation runs in a thread of its own; its ServerApp hands out the grid and waits for the end, and `exchange`
sends over that grid. A body travels as one uint8 array, so it has no size limit.
"""

import functools
import importlib.util
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import thread as executors
from typing import cast

from kilofed.engines.inprocess import Handler
from kilofed.engines.opener import Opener, as_text, raise_again, safe_path
from kilofed.errors import RunError

# Read at import: no telemetry, no look for updates, no second cluster after a shutdown; actors see every accelerator and
# have the priority of their user's other processes.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_AUTO_CONNECT="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_worker_niceness="0",
)
if not (importlib.util.find_spec("flwr") and importlib.util.find_spec("ray")):
    raise RunError("engine flower needs Flower's simulation: pip install 'kilofed[flower]'")

import ray
import ray.job_config
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

log = logging.getLogger("kilofed")
logging.getLogger("flwr").setLevel(logging.CRITICAL)  # Importing flwr sets it to INFO.

AHEAD = 64
"""Clients per actor that may be asked before their turn; Flower looks at its queues ten times a second."""

START_SECONDS = 180.0
"""Longest wait for Ray and the first sign of the virtual nodes."""

POLL_SECONDS = 0.02


class Flower:
    """An engine on Flower's simulation.

    A client's id is its own: each node is asked once which partition it holds. An actor that dies takes only the
    client in its hands out of the exchange; Ray starts another.

    Args:
        ids: numbers of the clients.
        opener: how an actor builds its handler.
        workers: number of actors.
        timeout: seconds after which an exchange ends without those who have not answered.
    """

    def __init__(self, ids: Sequence[int], opener: Opener, *, workers: int = 2, timeout: float = 3600.0) -> None:
        self._ids, self._opener = sorted(ids), opener
        self._workers, self._timeout = max(1, min(workers, len(self._ids))), timeout
        self._simulation: _Simulation | None = None

    def client_ids(self) -> list[int]:
        return list(self._ids)

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        if self._simulation is None:
            if ray.is_initialized():  # Actors of two simulations would wait for each other's processors.
                raise RunError("Ray runs in this process already: close the other engine first, or use engine pool")
            self._simulation = _Simulation(self._opener, len(self._ids), self._workers)
        nodes = self._simulation.nodes()
        by_client = {client: nodes[place] for place, client in enumerate(self._ids) if client in asks}

        def write(client: int) -> Message:
            content = RecordDict({"ask": _pack(asks[client]), "about": ConfigRecord({"client": client})})
            return Message(content, by_client[client], "train")

        late = []
        for client, reply in self._simulation.converse(sorted(by_client), write, time.monotonic() + self._timeout):
            if reply is None:
                late.append(client)
            elif reply.has_error():
                log.warning("client %d is left out: its actor died (%s)", client, reply.error.reason)
            elif "failure" in reply.content:
                raise_again(str(reply.content.config_records["failure"]["text"]), f"client {client}")
            else:
                yield client, reply.content.array_records["reply"]["body"].data
        if late:  # Their actors may never come back, and late replies must not meet the next exchange.
            log.warning("%d clients did not answer in time; the simulation starts afresh", len(late))
            self._end(grace=1.0)

    def overhead(self) -> int:
        """Not known: Flower does not say."""
        return 0

    def close(self) -> None:
        """End the simulation and Ray."""
        self._end(grace=10.0)

    def _end(self, grace: float) -> None:
        if self._simulation:
            self._simulation.end(grace)
        self._simulation = None


class _Simulation:
    """One run of Flower's simulation, in a thread."""

    def __init__(self, opener: Opener, num_nodes: int, workers: int) -> None:
        self._num_nodes, self._ahead = num_nodes, AHEAD * workers
        self._grid: Grid | None = None
        self._met: list[int] = []
        self._over, self._failure = threading.Event(), ""
        self._pulse = tempfile.NamedTemporaryFile(prefix="kilofed-flower-")  # noqa: SIM115
        self._thread = threading.Thread(target=self._run, args=(opener, workers), name="kilofed-flower", daemon=True)
        self._thread.start()

    def nodes(self) -> list[int]:
        """Flower's node number of each partition."""
        if not self._met:
            deadline = time.monotonic() + START_SECONDS
            found: list[int] = []
            while len(found) < self._num_nodes:
                self._wait(deadline)
                found = sorted(self._grid.get_node_ids()) if self._grid else []
            partition: dict[int, int] = {}
            for node, reply in self.converse(found, lambda node: Message(RecordDict(), node, "query"), deadline):
                if reply is None or reply.has_error():
                    raise RunError(f"node {node} of Flower's simulation does not answer")
                partition[int(reply.content.config_records["about"]["partition"])] = node
            self._met = [partition[place] for place in range(self._num_nodes)]
        return self._met

    def converse(
        self, order: Sequence[int], write: Callable[[int], Message], deadline: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Send what `write` gives for each of `order` and yield (it, reply) in that order; None came too late."""
        assert self._grid is not None
        sent: dict[str, int] = {}
        replies: dict[int, Message] = {}
        unsent = list(reversed(order))
        for place, this in enumerate(order):
            num_due = min(len(order), place + self._ahead) - (len(order) - len(unsent))
            # A batch at a time: each push costs Flower a look at all its queues.
            if num_due >= min(self._ahead // 2, len(unsent)):
                batch = [unsent.pop() for _ in range(num_due)]
                sent.update(zip(self._grid.push_messages([write(one) for one in batch]), batch, strict=True))
            while this not in replies and time.monotonic() < deadline:
                for reply in self._grid.pull_messages(list(sent)):
                    one = sent.pop(reply.metadata.reply_to_message_id)
                    if _never_ran(reply):
                        sent.update(zip(self._grid.push_messages([write(one)]), [one], strict=True))
                    else:
                        replies[one] = reply
                if this not in replies:
                    self._wait(deadline + POLL_SECONDS)
            yield this, replies.pop(this, None)

    def end(self, grace: float) -> None:
        """Stop the simulation; actors that are still at work after `grace` seconds are killed."""
        self._over.set()
        self._thread.join(grace)
        self._pulse.close()  # The file goes, and with it actors that are still at work.
        self._thread.join(30)
        if self._thread.is_alive():
            log.warning("Flower's simulation does not end; shutting Ray down under it")
            ray.shutdown()
            # Its threads wait for actors that never started; the interpreter must not wait for them at its exit.
            joined = cast(MutableMapping[threading.Thread, object], executors._threads_queues)
            for thread in [thread for thread in joined if thread.daemon]:
                del joined[thread]

    def _wait(self, deadline: float) -> None:
        if not self._thread.is_alive() or time.monotonic() > deadline:
            raise RunError(f"Flower's simulation ended or did not start: {self._failure or 'no word from Ray'}")
        time.sleep(POLL_SECONDS)

    def _run(self, opener: Opener, workers: int) -> None:
        server = ServerApp()

        def main(grid: Grid, context: Context) -> None:
            self._grid = grid
            # The thread of this function is not a daemon: it must see the end of the program by itself.
            while not self._over.wait(0.2) and threading.main_thread().is_alive():
                pass

        server.main()(main)
        client = ClientApp()
        client.query()(_introduce)
        client.train()(functools.partial(_answer, opener, self._pulse.name))
        config: dict[str, dict[str, int | float | str | bool]] = {
            # Flower hands these to Ray's `options`: an actor that died is started again.
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1},
        }
        try:
            _start_ray(workers)
            run_simulation(server, client, self._num_nodes, backend_config=config)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error.__cause__ or error}"


class _Job(ray.job_config.JobConfig):  # type: ignore[misc]
    """A job whose actors import what this process can; Ray would put the current folder in front of that."""

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _start_ray(workers: int) -> None:
    """Start Ray before Flower does, which then takes it as it is and shuts it down in the end."""
    # What trust put last is put last there as well; on PYTHONPATH, which Python reads first, its sitecustomize would run.
    found = sys.path[:-1] if sys.path[-1:] == [os.getcwd()] else sys.path
    paths = os.pathsep.join(path for path in found if path)
    with safe_path():
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            logging_level="CRITICAL",
            log_to_driver=False,
            job_config=_Job(),
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )


def _introduce(message: Message, context: Context) -> Message:
    about = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"about": about}), reply_to=message)


def _answer(opener: Opener, pulse: str, message: Message, context: Context) -> Message:
    """One message in an actor; actors serve many clients, so only the handler is kept between messages."""
    client = int(message.content.config_records["about"]["client"])
    try:
        handler = _handler(opener, pulse)
        reply = handler(client, message.content.array_records["ask"]["body"].data)
    except Exception as error:
        return Message(RecordDict({"failure": ConfigRecord({"text": as_text(error)})}), reply_to=message)
    return Message(RecordDict({"reply": _pack(reply)}), reply_to=message)


@functools.cache
def _handler(opener: Opener, pulse: str) -> Handler:
    threading.Thread(target=_watch, args=(pulse,), daemon=True).start()
    return opener.open()


def _watch(pulse: str) -> None:
    # Ray's shutdown does not wake a thread of the server that waits for a busy actor; the actor's end does.
    while os.path.exists(pulse):
        time.sleep(0.5)
    os._exit(1)


def _pack(body: bytes) -> ArrayRecord:
    return ArrayRecord({"body": Array(dtype="uint8", shape=(len(body),), stype="kilofed", data=body)})


def _never_ran(reply: Message) -> bool:
    # While Ray brings a dead actor back, it refuses calls to it at once.
    return reply.has_error() and "actor is restarting" in reply.error.reason
