"""Every op family, one folder each. Importing this package registers them all."""

from fastllm.ops import activation as activation
from fastllm.ops import attention as attention
from fastllm.ops import dropout as dropout
from fastllm.ops import embedding as embedding
from fastllm.ops import grouped as grouped
from fastllm.ops import linear_distill as linear_distill
from fastllm.ops import linear_loss as linear_loss
from fastllm.ops import loss as loss
from fastllm.ops import matmul as matmul
from fastllm.ops import moe as moe
from fastllm.ops import norm as norm
from fastllm.ops import quant as quant
from fastllm.ops import quant_linear as quant_linear
from fastllm.ops import rotary as rotary
from fastllm.ops import softmax as softmax
from fastllm.ops import sparse_linear as sparse_linear
