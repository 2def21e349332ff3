"""Types and ranges that several options share."""

from typing import Literal

SHARD_GIB = (1e-6, 1e6, "0.000001 to 1000000 (GiB)")
DtypeName = Literal["float32", "float16", "bfloat16"]
