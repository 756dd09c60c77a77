"""Executors of many machines, and those that users name: ``ray``, ``dask``, ``module:factory``."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from .executors import Opened, Workers, cores
from .named import by_name
from .settings import OptionError

R = TypeVar("R")
CONNECT_S = 60.0
PACKAGES = {"ray": ("ray",), "dask": ("dask", "distributed")}


def workers_of(executor: str | Executor, count: int | None = None, address: str | None = None, gpus: float = 0.0) -> Workers:
    """Make the workers that compute the jobs of a run. Nothing is started, and nothing connected to, before there are jobs.

    Args:
        executor: ``"local"``: processes of this machine. ``"ray"``, ``"dask"``: a cluster. ``"module:factory"``: a function without
            arguments, or the class, that makes an executor; with ``count`` it is called as ``factory(max_workers=count)``. Or an
            executor, which stays open: anything with the methods ``submit`` and ``shutdown`` of
            :class:`concurrent.futures.Executor`.
        count: how many jobs are computed at a time. None: as many as this machine or the cluster has cores. A cluster that
            exists, and an executor that is given, has a number of its own.
        address: of a Ray cluster (``ray.init``) or a Dask scheduler. None: that in ``RAY_ADDRESS`` or
            ``DASK_SCHEDULER_ADDRESS``, else a cluster on this machine, begun for the run.
        gpus: of each job on Ray; a fraction lets several jobs share a GPU.

    Raises:
        OptionError: an argument that cannot be, or does not go with the executor.
        ImportError: Ray or Dask is not installed.
    """
    name = executor if isinstance(executor, str) else type(executor).__name__
    if address is not None and name not in PACKAGES:
        raise OptionError(f"address must be given for ray or dask only, got {address!r} for the executor {name!r}")
    if gpus and name != "ray":
        raise OptionError(f"gpus must be given for ray only, got {gpus} for the executor {name!r}")
    if not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus)):
        raise OptionError(f"gpus must be a fraction up to 1, or a whole number, got {gpus}")
    if name == "local":
        return Workers(count)
    if not isinstance(executor, str):
        _check_is_executor(executor, name)
        if count is not None:
            raise OptionError(f"workers must not be given with an executor, which has its own, got {count}")
        return Workers(None, lambda: (executor, None), name, keep=True)
    if name in PACKAGES:
        for package in PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise ImportError(f'{package} is not installed: pip install "metamask_ext[{name}]"')
        if count is not None and address is not None:
            raise OptionError(f"workers must not be given with the address of a cluster, which has its own, got {count}")
        return Workers(count, partial(_ray, address, count, gpus) if name == "ray" else partial(_dask, address, count), name)
    if ":" not in executor:
        raise OptionError(f"executor must be local, ray, dask or module:factory, got {executor!r}")
    factory = by_name("executor", executor)
    if not callable(factory):
        raise OptionError(f"executor must be module:factory, {executor!r} is a {type(factory).__name__} that cannot be called")
    return Workers(count, partial(_made, executor, factory, count), name)


@contextmanager
def _no_cluster(wanted: str, address: str | None) -> Iterator[None]:
    """Turn the errors of a connection that fails into OptionError."""
    try:
        yield
    except Exception as error:  # Ray and Dask have many, of several libraries
        raise OptionError(f"address must be that of a {wanted}, got {address!r}: {type(error).__name__}: {error}") from error


def _made(name: str, factory: Callable[..., Executor], count: int | None) -> Opened:
    try:
        made = factory() if count is None else factory(max_workers=count)
    except Exception as error:
        raise OptionError(f"executor {name!r} cannot be made: {type(error).__name__}: {error}") from error
    _check_is_executor(made, name)
    return made, count


def _check_is_executor(made: object, name: str) -> None:
    for method in ("submit", "shutdown"):
        if not callable(getattr(made, method, None)):
            gives = f"{name!r} gives a {type(made).__name__} without {method}()"
            raise OptionError(f"executor must have the interface of concurrent.futures.Executor, {gives}")


class RayExecutor(Executor):
    """Jobs as tasks of Ray: each on one core, tried once more where the node or the process died that computed it.

    Args:
        address: as ``ray.init`` takes it; None: ``RAY_ADDRESS``, or a cluster on this machine. Ray that is connected already stays
            so.
        count: the cores of a cluster on this machine.
        gpus: of each task.

    Raises:
        OptionError: there is no such cluster, none of its nodes has so many GPUs, or Ray is connected and an address is given.
    """

    def __init__(self, address: str | None, count: int | None, gpus: float):
        import ray

        self._ray, self._connected = ray, not ray.is_initialized()
        if self._connected:
            here = {"num_cpus": count or cores(), "include_dashboard": False}
            begun = address is None and "RAY_ADDRESS" not in os.environ
            with _no_cluster("Ray cluster", address):
                _reach(address)
                ray.init(address, log_to_driver=False, **(here if begun else {}))
        elif address is not None:
            raise OptionError(f"address must not be given where Ray is connected already, got {address!r}")
        most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if gpus > most:
            self.shutdown()
            raise OptionError(f"gpus must be at most {most:g}, what one node of the cluster has, got {gpus:g}")
        self.count = int(ray.cluster_resources().get("CPU", 1))
        # An exception of the job is its result: only what Ray lost is computed again.
        self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(_call)

    def submit(self, function: Callable[..., R], /, *arguments: Any, **options: Any) -> Future[R]:
        """As of :class:`concurrent.futures.Executor`."""
        future: Future[R] = self._task.remote(function, arguments, options).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Disconnect, which ends the tasks that are left."""
        if self._connected:
            self._ray.shutdown()


def _reach(address: str | None) -> None:
    """OSError if nothing listens at ``host:port``; Ray itself would try for minutes. Other forms are Ray's to read."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def _call(function: Callable[..., R], arguments: tuple[Any, ...], options: dict[str, Any]) -> R:
    return function(*arguments, **options)


def _ray(address: str | None, count: int | None, gpus: float) -> Opened:
    executor = RayExecutor(address, count, gpus)
    return executor, executor.count


class DaskExecutor(Executor):
    """Jobs on a Dask cluster, which computes those again whose worker died.

    Args:
        address: of the scheduler; None: Dask's configuration, or a cluster on this machine.
        count: the processes of a cluster on this machine.

    Raises:
        OptionError: there is no such scheduler, or it has no workers.
    """

    def __init__(self, address: str | None, count: int | None):
        import dask
        from distributed import Client

        begun = address is None and dask.config.get("scheduler-address", None) is None
        here = {"n_workers": count or cores(), "threads_per_worker": 1, "dashboard_address": None}
        with _no_cluster("Dask scheduler with workers", address):
            self._client = Client(address, **(here if begun else {}))
            self._client.wait_for_workers(1, timeout=CONNECT_S)
        self.count = sum(self._client.nthreads().values())
        self._executor = self._client.get_executor(pure=False)

    def submit(self, function: Callable[..., R], /, *arguments: Any, **options: Any) -> Future[R]:
        """As of :class:`concurrent.futures.Executor`."""
        future: Future[R] = self._executor.submit(function, *arguments, **options)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Disconnect; jobs that are left are cancelled. A cluster that was begun here ends."""
        self._executor.shutdown(wait=False)
        self._client.close()


def _dask(address: str | None, count: int | None) -> Opened:
    executor = DaskExecutor(address, count)
    return executor, executor.count
