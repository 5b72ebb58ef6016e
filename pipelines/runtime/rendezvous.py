"""Where the processes of a run meet: a key-value store that the first of them keeps, or torchrun."""

import contextlib
import socket
import threading
import time

import click
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from kdpipe.pipelines.runtime.launch import Launch, LaunchError, ToldError

__all__ = ["connect", "meet"]

_START_SECONDS = 300.0
_NOTICE_SECONDS, _NEXT_NOTICE_SECONDS = 5.0, 60.0
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
# How long the first process keeps the store after it gave up, for the others to hear of it.
_LINGER_SECONDS = 1.0


class _Patience:
    """Says after a few seconds what is waited for, then every minute, and gives up after five."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._start = launch, time.monotonic()
        self._notice = _NOTICE_SECONDS

    def wait(self, what: str, *, quiet: bool = False) -> None:
        """Let a moment pass.

        Args:
            what: Is waited for, with what is known of it.
            quiet: Another process says it.

        Raises:
            LaunchError: It has been too long.
        """
        waited = time.monotonic() - self._start
        place = f"MASTER_ADDR {self._launch.host}, MASTER_PORT {self._launch.port}"
        if waited > _START_SECONDS:
            raise LaunchError(
                f"Waited {waited:.0f} s for {what}, at {place}. Where others were started, look at what they printed, "
                "and whether they have the same MASTER_ADDR and MASTER_PORT. If this is the only one (srun --pty, a "
                f"notebook, a shell in a container): {self._launch.alone_advice}"
            )
        if waited >= self._notice:
            self._notice = waited + _NEXT_NOTICE_SECONDS
            if not quiet:
                left = _START_SECONDS - waited
                click.echo(f"Waiting for {what}, at {place}; Ctrl-C stops, {left:.0f} s are left.", err=True)
        time.sleep(_POLL_SECONDS)


def connect(launch: Launch) -> Store:
    """One more connection to the store, for a process that has met the others.

    While one waits for a key, nothing else goes through the same connection.
    """
    host = "localhost" if launch.rank == 0 and not launch.is_hosted else launch.host
    store: Store = TCPStore(host, launch.port, is_master=False, wait_for_workers=False)
    return PrefixStore(f"kdpipe {launch.attempt}", store)


def meet(launch: Launch) -> Store:
    """Wait until all processes of a run have come.

    Signals are obeyed at once, since nothing here blocks; torch's own rendezvous hears none.

    Returns:
        What they can tell each other by. The key `stop` is set where one wants all to end.

    Raises:
        LaunchError: The store cannot be kept or reached, or not all have come after five minutes; in one process, with
            what to do.
        ToldError: The same, in the others.
        KeyboardInterrupt: Of this process, or of another.
    """
    patience = _Patience(launch)
    server = launch.rank == 0 and not launch.is_hosted
    store = PrefixStore(f"kdpipe {launch.attempt}", _host(launch) if server else _reach(launch, patience))
    try:
        _gather(launch, store, patience)
    except (KeyboardInterrupt, LaunchError):
        with contextlib.suppress(DistError):
            store.set("stop", "")
            if server and store.add("come", 0) > 1:
                time.sleep(_LINGER_SECONDS)
        raise
    except DistError as error:
        if launch.rank > 1:
            raise ToldError("The first process of this run is gone.") from error
        raise LaunchError("The first process of this run is gone. Look at what it printed, and start again.") from error
    return store


def _gather(launch: Launch, store: Store, patience: _Patience) -> None:
    if store.add(f"rank {launch.rank}", 1) > 1:
        raise LaunchError(
            f"Two processes of this run have the number {launch.rank} ({launch.variables[0]}). Each needs its own, "
            f"from 0 to {launch.size - 1}. {launch.alone_advice}"
        )
    come = store.add("come", 1)
    while come < launch.size:
        if store.check(["stop"]):
            if store.check(["gave up"]):
                raise ToldError("Another process of this run gave up waiting.")
            raise KeyboardInterrupt
        try:
            patience.wait(f"{launch.size} processes ({come} came)", quiet=launch.rank > 0)
        except LaunchError:
            if store.add("gave up", 1) > 1:
                raise ToldError("Another process of this run gave up waiting.") from None
            raise
        come = store.add("come", 0)


def _host(launch: Launch) -> Store:
    try:
        # It listens at all addresses; MASTER_ADDR need not be a name that this machine knows itself by.
        return TCPStore("localhost", launch.port, is_master=True, wait_for_workers=False)
    except DistError as error:
        raise LaunchError(
            f"The first process cannot let the others in at MASTER_PORT {launch.port}: {str(error).splitlines()[0]}. "
            "Is the port taken? Set MASTER_PORT to another one, for all processes."
        ) from error


class _Search(threading.Thread):
    """Looks for the store until it answers; beside the main thread, since neither names nor torch hear signals.

    Attributes:
        store: What was found.
        reason: Why there is nothing yet.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__(name="kdpipe-connect", daemon=True)
        self._launch = launch
        self.store: Store | None = None
        self.reason = "no answer yet"

    def run(self) -> None:
        """Look again and again."""
        place = self._launch.host, self._launch.port
        while self.store is None:
            try:
                socket.create_connection(place, timeout=_LOOK_SECONDS).close()
                self.reason = "what listens there does not answer"  # something else; torch waits for it without an end
                self.store = TCPStore(*place, is_master=False, wait_for_workers=False)
            except (OSError, UnicodeError, DistError) as error:
                self.reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
                time.sleep(_POLL_SECONDS)


def _reach(launch: Launch, patience: _Patience) -> Store:
    keeper = "torchrun" if launch.is_hosted else "the first process"
    search = _Search(launch)
    search.start()
    while search.store is None:
        patience.wait(f"{keeper} (this is number {launch.rank} of {launch.size}, from 0; {search.reason})")
    return search.store
