"""Runs on Ray and on Dask, undisturbed and with a node or a process killed amid them; ``make test-executors`` has both."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, JobError, OptionError, run
from metamask_ext.experiments.sweep import sweep

HAS = {name: importlib.util.find_spec(name) is not None for name in ("ray", "dask")}
needs_ray = pytest.mark.skipif(not HAS["ray"], reason="make test-executors installs Ray")
needs_dask = pytest.mark.skipif(not HAS["dask"], reason="make test-executors installs Dask")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Entry("support.toy_experiment", "for tests"))


@pytest.fixture(scope="module", autouse=True)
def paths():
    """Processes of a cluster find the package and the tests' support."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """``linear --quick`` in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("linear", folder, quick=True, workers=1)
    return folder


def _numbers(folder: Path) -> tuple[bytes, dict[str, bytes]]:
    """The numbers of ``metrics.json`` as bytes, and the results of the jobs, without those that are times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["study"].pop("cost")
    kept = {name: metrics[name] for name in ("settings", "seeds", "data", "results", "baselines", "study", "budget")}
    jobs = {path.name: path.read_bytes() for path in (folder / "seed-0").iterdir() if path.name != "cost.json"}
    return json.dumps(kept, indent=2).encode(), jobs


def _once_begun(folder: Path, jobs: int, act: Callable[[], None]) -> threading.Thread:
    """Act when so many results are in the folder of a run."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while len([*folder.glob("seed-*/*.json")]) < jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def ray_cluster():
    """Two nodes of a core each, and no node that only leads."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster, second
    cluster.shutdown()


@needs_ray
def test_ray_node_killed_amid_a_run(tmp_path, undisturbed, ray_cluster):
    cluster, second = ray_cluster
    out, left = tmp_path / "out", []

    def kill() -> None:
        left.append(len([*out.glob("seed-*/*.json")]))
        cluster.remove_node(second, allow_graceful=False)
        left.append(len(cluster.list_all_nodes()))

    watching = _once_begun(out, 3, kill)
    metrics = run("linear", out, quick=True, executor="ray", address=cluster.address)
    watching.join(60)
    assert left[0] < len([*out.glob("seed-*/*.json")]) - 2 and left[1] == 1  # amid the run, and one node left
    assert _numbers(out) == _numbers(undisturbed)
    assert (metrics["executor"], metrics["workers"]) == ("ray", 2)


@needs_ray
def test_ray_of_its_own_and_errors(tmp_path):
    """No address: a cluster for the run. A job's error is not tried again, and no node has a GPU."""
    with pytest.raises(OptionError, match="gpus must be at most 0, what one node of the cluster has, got 0.25"):
        run("toy", tmp_path / "gpu", executor="ray", workers=2, gpus=0.25)
    assert not (tmp_path / "gpu").exists()
    with pytest.raises(JobError, match="job 'shared' of seed 1 failed: FloatingPointError: the loss is nan"):
        run("toy", tmp_path / "raises", executor="ray", workers=2, fault="shared:raises")
    # Once more after the first death, and then no more.
    with pytest.raises(JobError, match="job 'shared' of seed 1 failed on the executor 'ray': WorkerCrashedError"):
        run("toy", tmp_path / "dies", executor="ray", workers=2, fault="shared:killed")


@needs_ray
def test_ray_shares_gpus(tmp_path):
    """Fractions of a GPU, as Ray counts them: here of one that does not exist, and that no job uses."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    try:
        one = run("toy", tmp_path / "one", workers=1)
        shared = run("toy", tmp_path / "shared", executor="ray", address=cluster.address, gpus=0.5)
        assert shared["results"] == one["results"]
        with pytest.raises(OptionError, match="gpus must be at most 1"):
            run("toy", tmp_path / "more", executor="ray", address=cluster.address, gpus=2)
        rows = sweep("toy", tmp_path / "sweep", ["tasks=2,3"], quick=True, workers=2, executor="ray", address=cluster.address)
        assert len(rows) == 5
    finally:
        cluster.shutdown()


@needs_ray
def test_no_ray_cluster_there(tmp_path):
    with pytest.raises(OptionError, match="address must be that of a Ray cluster, got '127.0.0.1:1'"):
        run("toy", tmp_path / "out", executor="ray", address="127.0.0.1:1")
    assert not (tmp_path / "out").exists()


@needs_dask
def test_dask_worker_killed_amid_a_run(tmp_path, undisturbed):
    from distributed import LocalCluster

    out, killed = tmp_path / "out", []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:

        def kill() -> None:
            process = next(iter(cluster.workers.values())).process.pid
            killed.append((process, len([*out.glob("seed-*/*.json")])))
            os.kill(process, signal.SIGKILL)

        watching = _once_begun(out, 3, kill)
        metrics = run("linear", out, quick=True, executor="dask", address=cluster.scheduler_address)
        watching.join(60)
    assert killed and killed[0][1] < len([*out.glob("seed-*/*.json")]) - 2
    assert _numbers(out) == _numbers(undisturbed)
    assert (metrics["executor"], metrics["workers"]) == ("dask", 2)


@needs_dask
def test_dask_of_its_own_and_errors(tmp_path):
    one = run("toy", tmp_path / "one", workers=1)
    metrics = run("toy", tmp_path / "out", executor="dask", workers=2, tracking="csv")
    assert metrics["results"] == one["results"] and metrics["workers"] == 2 and len([*tmp_path.rglob("seed-*/*.csv")]) == 9
    with pytest.raises(JobError, match="job 'shared' of seed 1 failed: FloatingPointError: the loss is nan"):
        run("toy", tmp_path / "raises", executor="dask", workers=2, fault="shared:raises")
    with pytest.raises(OptionError, match="address must be that of a Dask scheduler with workers, got 'tcp://127.0.0.1:1'"):
        run("toy", tmp_path / "nobody", executor="dask", address="tcp://127.0.0.1:1")
    assert not (tmp_path / "nobody").exists()
