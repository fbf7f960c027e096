"""Every op family, one folder each. Importing this package registers them all."""

from fastllm.ops import activation as activation
from fastllm.ops import grouped as grouped
from fastllm.ops import moe as moe
from fastllm.ops import norm as norm
