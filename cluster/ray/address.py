"""Which Ray a run uses: what RAY_ADDRESS says, and whether a Ray answers there that takes our token."""

import os
import time

import grpc
from ray._common.utils import get_default_ray_temp_dir
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.services import _find_address_from_flag
from ray._private.utils import read_ray_address
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from moray import UserError
from moray.cluster.ray.keeper import DEFAULT_TEMP_DIR

ANSWER_S = 5.0
RETRY_S = 0.2
OWN = "RAY_ADDRESS=local gives this run a Ray of its own"


def find_address() -> str | None:
    """HOST:PORT of the cluster that RAY_ADDRESS names, once it answers; None for a local Ray of the run's own.

    Raises UserError where RAY_ADDRESS is no such address, or no Ray answers there; where its Ray wants another token;
    and where RAY_ADDRESS is not set although a cluster runs on this machine: which one is meant is not ours to say.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    if named in ("", "auto"):
        running = running_cluster()
        if running and not named:
            raise UserError(f"a Ray cluster runs on this machine: set RAY_ADDRESS={running} to use it; {OWN}")
        if named and not running:
            raise UserError(f"RAY_ADDRESS=auto, but no Ray cluster runs on this machine; {OWN}")
        address = running
    else:
        address = named
    if address and (problem := _problem(address)):
        raise UserError(f"RAY_ADDRESS={named}{problem}")
    return address


def running_cluster() -> str | None:
    """The address of the Ray that `ray start` made this machine a node of; None where there is none.

    The file that names it may outlive its cluster. Local Rays of other drivers have no such file.
    """
    living = _find_address_from_flag("--gcs-address")
    named = [read_ray_address(folder) for folder in (get_default_ray_temp_dir(), DEFAULT_TEMP_DIR)]
    return next((address for address in named if address in living), None)


def ask(address: str, timeout_s: float) -> grpc.StatusCode:
    """How the Ray at HOST:PORT answers a simple question: OK, or why not.

    Ray's own client asks for minutes, and tells of it on standard error.
    """
    try:
        with init_grpc_channel(address, GLOBAL_GRPC_OPTIONS) as channel:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=timeout_s)
    except AuthenticationError:  # there is no token to send
        return grpc.StatusCode.UNAUTHENTICATED
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def is_open(address: str) -> bool:
    """Whether the Ray at HOST:PORT answers who has no token: whoever reaches it can run code as its user."""
    with grpc.insecure_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=ANSWER_S)
        except grpc.RpcError:
            return False
    return True


def _problem(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return f" must be HOST:PORT of the head node, as `ray start --head` prints it (the port is often 6379); {OWN}"
    deadline = time.monotonic() + ANSWER_S
    # The head may be about to start.
    while (answer := ask(address, ANSWER_S)) == grpc.StatusCode.UNAVAILABLE and time.monotonic() < deadline:
        time.sleep(RETRY_S)
    if answer == grpc.StatusCode.OK:
        return None
    if answer == grpc.StatusCode.UNAUTHENTICATED:
        return ": its Ray wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they are on the cluster"
    return f": no Ray answers there within {ANSWER_S:g} s; start it or correct the address; {OWN}"
