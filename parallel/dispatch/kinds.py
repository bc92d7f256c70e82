"""The ways to exchange tokens, by name, and whether one can be had here."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch

from moray import UserError
from moray.parallel.dispatch.bounded import all_to_all
from moray.parallel.dispatch.deepep import DeepEP
from moray.parallel.dispatch.hops import AllGather, Hop

Kind = Literal["alltoall", "allgather", "deepep"]
HOPS: dict[Kind, Callable[..., Hop]] = {"alltoall": all_to_all, "allgather": AllGather, "deepep": DeepEP}


def check_kind(kind: Kind, device_type: str, dtype: torch.dtype) -> None:
    """Raises UserError where this machine, or the products' dtype, does not suit a dispatcher."""
    if kind != "deepep":
        return
    lacks = []
    if device_type != "cuda":
        lacks.append(f"GPUs, and this run's device is {device_type}")
    if find_spec("deep_ep") is None:
        lacks.append("the package deep_ep, which is not installed here")
    if dtype != torch.bfloat16:
        lacks.append(f"train.dtype=bfloat16, which is {str(dtype)[6:]}")
    if lacks:
        raise UserError(f"layout.dispatcher=deepep needs {'; and '.join(lacks)}. Here there are alltoall and allgather")
