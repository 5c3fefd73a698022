"""Weights that several processes hold parts of: on their devices, and in their host memory."""

from lightning_topkast.distributed.host import HostGroup, RowSharding, Shares, exchange, host_group, mark_background
from lightning_topkast.distributed.sharding import Sharding, check_ranks_agree, from_rank_0_, to_local

__all__ = [
    "HostGroup",
    "RowSharding",
    "Sharding",
    "Shares",
    "check_ranks_agree",
    "exchange",
    "from_rank_0_",
    "host_group",
    "mark_background",
    "to_local",
]
