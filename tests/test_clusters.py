"""Jobs of several processes known by their environment, and wrong options refused."""

import http.server
import threading

import pytest

from balora_jax.errors import InputError
from balora_jax.parallel import launch as clusters

WAITS = clusters.Timeouts(start=10, host=20, stall=30)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_environment_tells_of_others(environment, several):
    found = clusters.start_of(None, None, None, WAITS, environment)
    assert found == (clusters.Start(None, None, None, WAITS) if several else None)


def test_options_go_before_the_environment():
    start = clusters.start_of("10.0.0.1:8476", 2, 1, WAITS, {"SLURM_NTASKS": "8"})
    assert start == clusters.Start("10.0.0.1:8476", 2, 1, WAITS)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ((None, 2, 0, WAITS), "--coordinator, --processes, --process: expected all three or none"),
        (("a:1", 2, None, WAITS), "expected all three or none, got a:1, 2 and None"),
        (("a", 2, 0, WAITS), "--coordinator: expected HOST:PORT, got 'a'"),
        (("a:b", 2, 0, WAITS), "--coordinator: expected HOST:PORT, got 'a:b'"),
        (("a:99999", 2, 0, WAITS), "--coordinator: expected HOST:PORT, got 'a:99999'"),
        (("a:²", 2, 0, WAITS), "--coordinator: expected HOST:PORT, got 'a:²'"),
        (("a:1", 2, 2, WAITS), "--process: expected a number from 0 to 1, got 2"),
        (
            (None, None, None, clusters.Timeouts(host=1)),
            "--host-timeout: expected at least 5 seconds, got 1",
        ),
        (
            (None, None, None, clusters.Timeouts(start=0)),
            "--start-timeout: expected at least 5 seconds, got 0",
        ),
        (
            (None, None, None, clusters.Timeouts(stall=-1)),
            "--stall-timeout: expected at least 5 seconds, got -1",
        ),
    ],
)
def test_wrong_options(options, phrase):
    with pytest.raises(InputError) as caught:
        clusters.start_of(*options, {})
    assert phrase in str(caught.value)


@pytest.mark.parametrize("text", ["four", "-2", "1.5", "²"])
def test_a_count_that_is_no_number(text):
    with pytest.raises(InputError) as caught:
        clusters.start_of(None, None, None, WAITS, {"SLURM_NTASKS": text})
    assert f"SLURM_NTASKS: expected the number of processes that SLURM started, got {text!r}" in (
        str(caught.value)
    )


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server as TPU VMs have it; the server's ``workers`` are its only answer."""

    def do_GET(self):
        wanted = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        known = self.path == wanted and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(self.server.workers.encode() if known else b"")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("workers", "several"), [("0:1:10.0.0.1", False), ("0:1:10.0.0.1,1:2:10.0.0.2", True)]
)
def test_a_tpu_slice_is_known_by_its_metadata(monkeypatch, workers, several):
    monkeypatch.setattr(clusters, "_has_tpu", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.workers = workers
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        found = clusters.start_of(None, None, None, WAITS, environment)
        server.shutdown()
    assert (found is not None) is several


def test_a_tpu_without_a_metadata_server_is_one_host(monkeypatch):
    monkeypatch.setattr(clusters, "_has_tpu", lambda: True)
    nobody = {"GCE_METADATA_IP": "127.0.0.1:9"}
    assert clusters.start_of(None, None, None, WAITS, nobody) is None
