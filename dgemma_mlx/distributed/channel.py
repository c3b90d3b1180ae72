"""The channel between rank 0 and the other machines: messages, and the watch over who still answers.

Collective operations hang when a machine dies, stops or was never started. The channel is a TCP connection from each
machine to rank 0 beside them. Both ends send a heartbeat every second, from a thread of its own, and a machine that is
silent for ten seconds, or whose connection closes, is lost. What happens then is for the owner of the channel to say:
work on one cut model ends everywhere, with one line that names the machine; independent work goes on without it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

from dgemma_mlx.distributed.launch import OTHER_PORTS, Launch
from dgemma_mlx.distributed.terminal import terminal_state
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

Message = dict[str, Any]

SILENCE = 10.0  # seconds without a sign of life after which a machine is lost
WORD = 1.0  # seconds in which the channel ends the process with a better line, after MLX has lost a machine
_LEAVE = 5.0  # seconds that another machine has to end when rank 0 has ended
_BEAT = 1.0  # seconds between two heartbeats
_RETRY = 0.2  # seconds between two attempts to reach rank 0
_BACKLOG = 64  # connections that wait to be accepted, with those of strangers
_NO_MACHINE = "`dgemma-mlx cluster check` finds what is wrong."


class MachineLostError(DgemmaError):
    """A machine no longer answers.

    Attributes:
        rank: Its rank.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message, _NO_MACHINE)
        self.rank = rank


class Peer:
    """The other end of a connection.

    Attributes:
        rank: Its rank.
        hello: What it has said of itself; ``name`` is the name of the machine.
        heard: When it was last heard, in seconds of the monotonic clock.
        done: The number of commands that it has carried out.
        loss: What has happened to it; None while it answers.
    """

    def __init__(self, rank: int, hello: Message, connection: Connection) -> None:
        self.rank, self.hello, self._connection = rank, hello, connection
        with socket.socket(fileno=os.dup(connection.fileno())) as same:  # a command must not wait for the next one
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard, self.done = time.monotonic(), 0
        self.loss: str | None = None
        self.inbox: SimpleQueue[Message | None] = SimpleQueue()  # None after the last message
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{self.hello.get('name', '?')} (rank {self.rank})"

    def send(self, message: Message) -> None:
        """Send a message. Raises ``MachineLostError``."""
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps(message).encode())
        except (OSError, ValueError):
            raise MachineLostError(self.rank, f"{self} has ended") from None

    def read(self) -> Message:
        """Return the next message, heartbeats among them. Raises ``EOFError`` or ``OSError`` when there is none."""
        message: Message = parse_json(self._connection.recv_bytes())
        self.heard = time.monotonic()
        return message

    def cut(self) -> None:
        """Break the connection off, so that nothing waits for the other end any more: a send to one that is stopped."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._connection.close()


class Channel:
    """The connections of one machine: of rank 0 to all others, or of another one to rank 0.

    Attributes:
        rank: The rank of this machine.
        size: The number of machines.
        peers: The other ends, by rank.
        ends_with: Whether the loss of a machine ends this process, with one line and exit code 1. Otherwise the machine
            is left out, and ``receive`` raises.
        done: The number of commands that this machine has carried out.
        is_over: Whether rank 0 has said that the work is done.
        last_acts: Called when the loss of a machine ends this process.
    """

    def __init__(self, launch: Launch, peers: Mapping[int, Peer]) -> None:
        """Begin to watch the peers."""
        self.rank, self.size, self.peers = launch.rank, launch.size, dict(sorted(peers.items()))
        self.ends_with = launch.rank != 0  # nobody goes on without rank 0
        self.done = 0
        self.last_acts: list[Callable[[], None]] = []
        self.is_over = False
        self._closing = False
        self._failing = threading.Lock()
        self._deadline: float | None = None
        self._restore = terminal_state()
        for peer in self.peers.values():
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
            threading.Thread(target=self._beat, args=(peer,), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def alive(self) -> list[int]:
        """The ranks of the peers that answer."""
        return [rank for rank, peer in self.peers.items() if peer.loss is None]

    def send(self, message: Message, rank: int = 0) -> None:
        """Send a message to a peer. Raises ``MachineLostError``."""
        try:
            self.peers[rank].send(message)
        except MachineLostError as error:
            if self.ends_with and not self.is_over:
                self.fail(error.message)
            raise

    def tell(self, message: Message) -> None:
        """Send a message to all peers. Raises ``MachineLostError``."""
        for rank in self.peers:
            self.send(message, rank)

    def receive(self, rank: int = 0) -> Message:
        """Wait for the next message of a peer. Raises ``MachineLostError``."""
        message = self.peers[rank].inbox.get()
        if message is None:
            self.peers[rank].inbox.put(None)  # for the next call
            raise MachineLostError(rank, self.peers[rank].loss or f"{self.peers[rank]} has ended")
        return message

    def next_message(self, rank: int, seconds: float) -> Message | None:
        """Return the next message of a peer, or None when there is none within ``seconds`` or it is lost."""
        with suppress(Empty):
            message = self.peers[rank].inbox.get(timeout=seconds)
            if message is None:
                self.peers[rank].inbox.put(None)
            return message
        return None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """End all machines when the block takes longer: some of them wait for each other."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def close(self, reason: str | None = None) -> None:
        """Tell the peers that the work is done, or the reason why it ends, and close the connections."""
        self._closing = True
        for peer in self.peers.values():
            with suppress(MachineLostError):
                peer.send({"end": reason})
        for peer in self.peers.values():
            peer.close()

    def _read(self, peer: Peer) -> None:
        """Sort the messages of a peer until its connection closes."""
        try:
            while True:
                message = peer.read()
                if "beat" in message:
                    peer.done = message["beat"]
                elif "end" in message:
                    self._ended(peer, message["end"])
                    return
                else:
                    peer.inbox.put(message)
        except (OSError, EOFError, ValueError, TypeError):  # a TypeError when it is closed here at the same time
            self._lose(peer, f"{peer} has ended")

    def _ended(self, peer: Peer, reason: str | None) -> None:
        """The peer has closed the channel: rank 0 because the work is done, or any machine because of a fault."""
        if reason is None and peer.rank == 0:
            self.is_over = True
            peer.loss = f"{peer} has ended"
            peer.inbox.put(None)
            time.sleep(_LEAVE)  # this thread ends with the process
            os._exit(0)  # which waits in an operation that rank 0 has left
        else:
            self._lose(peer, reason or f"{peer} has ended")

    def _beat(self, peer: Peer) -> None:
        """Send heartbeats until the connection closes."""
        with suppress(MachineLostError):
            while not self._closing:
                peer.send({"beat": self.done})
                time.sleep(_BEAT)

    def _watch(self) -> None:
        """Look for peers that are silent, and for work that does not go on. Never blocks."""
        while not self._closing:
            now = time.monotonic()
            for peer in self.peers.values():
                if peer.loss is None and now - peer.heard > SILENCE:
                    self._lose(peer, f"{peer} has not answered for {SILENCE:.0f} s")
            deadline = self._deadline  # another thread may set it to None in between
            if deadline is not None and now > deadline:
                slowest = min(self.peers.values(), key=lambda peer: peer.done)
                self._lose(slowest, f"no progress; the last to be heard of is {slowest}")
            time.sleep(_BEAT / 2)

    def _lose(self, peer: Peer, what: str) -> None:
        """A machine is lost: end this process, or leave the machine out."""
        if self._closing or peer.loss is not None:
            return
        peer.loss = what
        if self.ends_with:
            self.fail(what)
        peer.inbox.put(None)
        peer.cut()

    def fail(self, line: str) -> NoReturn:
        """End all machines with one line on stderr and exit code 1, whatever the main thread waits for."""
        self._failing.acquire()  # never released: the first thread that comes here ends the process
        self._closing = True
        threads = [threading.Thread(target=self._last_word, args=(peer, line)) for peer in self.peers.values()]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join(0.5)  # a machine that has stopped may take nothing more
        self._restore()
        with suppress(OSError):
            os.write(2, f"dgemma-mlx: {line}\n".encode(errors="replace"))
        for act in self.last_acts:
            act()
        os._exit(1)

    @staticmethod
    def _last_word(peer: Peer, line: str) -> None:
        with suppress(MachineLostError):
            peer.send({"end": line})


def own_hello() -> Message:
    """Return what a machine says of itself: its name, and what must be the same everywhere."""
    from importlib.metadata import version

    from dgemma_mlx.version import __version__

    return {"name": socket.gethostname(), "version": __version__, "mlx": version("mlx")}


def open_channel(
    launch: Launch, seconds: float = SILENCE, has_ended: Callable[[int], bool] = lambda rank: False
) -> Channel:
    """Connect the machines, and return the channel of this one.

    ``has_ended`` says of a rank, on rank 0, that it cannot come any more. Raises ``DgemmaError`` when a machine is
    missing after ``seconds``, when the port of rank 0 is taken, or when the machines' versions of the program or of MLX
    differ.
    """
    mine, began = own_hello() | {"rank": launch.rank}, time.monotonic()
    peers = _accept(launch, mine, seconds, has_ended) if launch.rank == 0 else {0: _join(launch, mine, seconds)}
    if missing := [rank for rank in range(1, launch.size) if launch.rank == 0 and rank not in peers]:
        names = ", ".join(address_of(launch, rank) for rank in missing)
        late = time.monotonic() - began >= seconds
        line = f"{names} did not come within {seconds:.0f} s" if late else f"{names} could not be started"
        for peer in peers.values():
            with suppress(MachineLostError):
                peer.send({"end": line})
        raise DgemmaError(line, _NO_MACHINE)
    channel = Channel(launch, peers)
    for peer in channel.peers.values():
        if (differs := difference(peer, mine)) is not None:
            channel.close(differs)
            raise DgemmaError(differs, "Install the same versions on all machines.")
    return channel


def open_for_check(launch: Launch, has_ended: Callable[[int], bool], seconds: float = SILENCE) -> Channel:
    """Connect rank 0 with those machines that come within ``seconds``, whatever their versions are.

    ``has_ended`` says of a rank that it cannot come any more. Raises ``DgemmaError`` when the port of rank 0 is taken.
    """
    mine = own_hello() | {"rank": 0}
    return Channel(launch, _accept(launch, mine, seconds, has_ended))


def difference(peer: Peer, mine: Message) -> str | None:
    """Return how the versions of a machine differ from those in this one's hello; None where they are the same."""
    for what, label in (("version", "dgemma-mlx"), ("mlx", "MLX")):
        if peer.hello.get(what) != mine[what]:
            return f"{peer} has {label} {peer.hello.get(what)}, and {mine['name']} has {mine[what]}"
    return None


def _accept(
    launch: Launch, mine: Message, seconds: float, has_ended: Callable[[int], bool] = lambda rank: False
) -> dict[int, Peer]:
    """Wait until every other machine has connected or has ended, and return those that have connected by rank."""
    host, port = launch.channel_address
    try:
        listener = Listener((host, port), backlog=_BACKLOG)
    except OSError as error:
        hint = "The first host must be this machine, with an address that it has."
        if error.errno == errno.EADDRINUSE:
            hint = OTHER_PORTS
        raise DgemmaError(f"cannot listen on {host}:{port}: {error.strerror}", hint) from None
    arrived: SimpleQueue[Peer] = SimpleQueue()
    is_over = threading.Event()

    def greet(connection: Connection) -> None:
        with suppress(AuthenticationError, OSError, EOFError, ValueError, KeyError, TypeError):
            arrived.put(_greet(connection, launch.key, mine))

    def listen() -> None:
        with listener:
            while not is_over.is_set():
                with suppress(OSError):  # one that is gone already
                    threading.Thread(target=greet, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + seconds
    while (missing := [rank for rank in range(1, launch.size) if rank not in peers]) and time.monotonic() < deadline:
        are_gone = all(map(has_ended, missing))
        try:
            peer = arrived.get(timeout=_RETRY)
            peers[peer.rank] = peer
        except Empty:
            if are_gone:
                break
    is_over.set()
    with suppress(OSError):  # wakes the thread
        socket.create_connection((host, port), 1).close()
    return peers


def _greet(connection: Connection, key: bytes, mine: Message) -> Peer:
    """Return who has connected. Each connection has a thread of its own: a stranger may say nothing at all.

    Raises ``AuthenticationError`` for a program that cannot prove that it belongs here, or what comes of its bytes.
    """
    deliver_challenge(connection, key)
    answer_challenge(connection, key)
    hello = parse_json(connection.recv_bytes())
    connection.send_bytes(json.dumps(mine).encode())
    return Peer(int(hello["rank"]), hello, connection)


def _join(launch: Launch, mine: Message, seconds: float) -> Peer:
    """Connect to rank 0, which may begin later than this machine."""
    found: SimpleQueue[Peer] = SimpleQueue()
    deadline = time.monotonic() + seconds

    def connect() -> None:
        while time.monotonic() < deadline:
            with suppress(OSError, EOFError, ValueError, AuthenticationError):
                connection = Client(launch.channel_address, authkey=launch.key)
                connection.send_bytes(json.dumps(mine).encode())
                found.put(Peer(0, parse_json(connection.recv_bytes()), connection))
                return
            time.sleep(_RETRY)

    threading.Thread(target=connect, daemon=True).start()  # a host that drops packets blocks much longer
    try:
        return found.get(timeout=seconds)
    except Empty:
        host, port = launch.channel_address
        raise DgemmaError(f"{host}:{port} (rank 0) did not answer within {seconds:.0f} s", _NO_MACHINE) from None


def address_of(launch: Launch, rank: int) -> str:
    """Return how messages name a machine that has not said its name."""
    known = launch.addresses[rank][0] if rank < len(launch.addresses) else "?"
    return f"{known} (rank {rank})"
