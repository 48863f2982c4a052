"""Ray with two replicas of a small model: python -m tests.server.ray_program PORT.

Prints "ready" when they serve. Then each line on stdin is an order: {"body": ..., "tried": [...]}
sends a request past the gateway to another replica than those of `tried`; "delete" ends the
application. Ray shares nothing with other clusters of this machine.
"""

import json
import os
import sys
import tempfile
from typing import Any

NAME = "minnow"
KEY = "integration-test-key"
APPLICATION = "lowlat"


def main() -> None:
    import ray
    from ray import serve

    from lowlat.replicas.application import build
    from lowlat.replicas.options import ReplicaOptions

    # Ray prints to stdout; answers have a copy of it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Paths of Unix sockets are short.
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        with open(f"{folder}/keys", "w") as keys:
            keys.write(KEY)
        arguments = {"model": NAME, "threads": 1, "cache_memory": 0.05, "api_key_file": keys.name}
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
            serve.run(build(ReplicaOptions.model_validate(arguments)), name=APPLICATION)
            print("ready", file=answers)
            for line in sys.stdin:
                print(json.dumps(obey(json.loads(line))), file=answers)
        finally:
            serve.shutdown()
            ray.shutdown()


def obey(order: Any) -> Any:
    from ray import serve

    if order == "delete":
        serve.delete(APPLICATION)
        return "deleted"
    handle = serve.get_deployment_handle("Replica", APPLICATION)
    parts = handle.options(method_name="handle", stream=True).remote(request_of(**order))
    head = next(parts)
    body = head.body + b"".join(parts)
    return {"replica": head.replica, "status": head.status, "body": json.loads(body)}


def request_of(body: Any, tried: list[str]) -> Any:
    from lowlat.replicas.messages import ReplicaRequest
    from lowlat.replicas.prefix import Prefix

    data = json.dumps(body).encode()
    headers = {
        b"host": b"127.0.0.1",
        b"authorization": f"Bearer {KEY}".encode(),
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(data),
    }
    path = "/v1/chat/completions"
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"client": ("127.0.0.1", 1), "headers": list(headers.items())}
    return ReplicaRequest(scope=scope, body=data, prefix=Prefix(), tried=tuple(tried))


if __name__ == "__main__":
    main()
