"""Nodes of a Ray cluster on this machine, for tests; to be run by `unshare -n`, so that all of it stays on 127.0.0.1.

Says the address of the cluster, whose head makes nothing, and then reads a JSON line per request and answers with one:
{"add": number} adds a node with one CPU; {"remove": number} ends it at once; {"hide": folder, "add": number} adds one
that sees an empty folder there. Ends where its input does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = "127.0.0.1"


def serve() -> None:
    """Answer requests until there are no more."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    from ray.cluster_utils import Cluster

    here: dict[str, Any] = {"node_ip_address": HOME, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **here})
    print(json.dumps(cluster.address), flush=True)
    nodes: dict[int, Any] = {}

    def wait_for_all() -> None:
        """Until the head and these nodes are alive, and no other. Those of `ray start` are not known to `cluster`."""
        while len(cluster.global_state._live_node_ids()) != 1 + len(nodes):
            time.sleep(0.1)

    for line in sys.stdin:
        request = json.loads(line)
        if "hide" in request:
            wait_for_all()
            ray = [str(Path(sys.executable).with_name("ray")), "start", f"--address={cluster.address}", "--block"]
            ray += [
                f"--node-ip-address={HOME}",
                "--num-cpus=1",
                "--disable-usage-stats",
                "--object-store-memory=100000000",
            ]
            mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', request["hide"]]
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                nodes[request["add"]] = subprocess.Popen([*mount, *ray], stdout=nowhere, start_new_session=True)
            wait_for_all()
        elif "add" in request:
            nodes[request["add"]] = cluster.add_node(num_cpus=1, **here)
        else:
            node = nodes.pop(request["remove"])
            if isinstance(node, subprocess.Popen):
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
            else:
                cluster.remove_node(node, allow_graceful=False)
        print("null", flush=True)
    for node in nodes.values():
        if isinstance(node, subprocess.Popen):
            os.killpg(node.pid, signal.SIGKILL)
    cluster.shutdown()


if __name__ == "__main__":
    serve()
