"""Every op family, one folder each. Importing this package registers them all."""

from fastllm.ops import activation as activation
from fastllm.ops import embedding as embedding
from fastllm.ops import norm as norm
from fastllm.ops import rotary as rotary
