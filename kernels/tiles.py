"""What the matrix products share: block shapes, what fits a chip, activations, tile order."""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

# Bytes of shared memory that one program may have, by compute capability; None: AMD's LDS
SHARED = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
    (12, 0): 99 << 10,
    (12, 1): 99 << 10,
    None: 64 << 10,
}
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu", "relu2")


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product C[M, N] is cut up.

    split_k     programs that share the K of one tile; their sums are added in a fixed order
    persistent  a program works through many tiles; there are as many programs as fit the device
    tma         loads by tensor descriptors (Hopper and later), of blocks that TMA can describe
    specialize  a warp group of its own loads, two share a block of 128 rows (with tma, 4 warps)
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group_m: int = 8
    split_k: int = 1
    persistent: bool = False
    tma: bool = False
    specialize: bool = False

    def shared_bytes(self, itemsize, products=1):
        """Shared memory that the pipeline's buffers take, and the epilogue's staging."""
        stage = self.block_k * (self.block_m + products * self.block_n) * itemsize
        tile = self.block_m * self.block_n * products
        staging = tile * (itemsize * self.persistent + self.specialize)
        return max(1, self.stages) * stage + staging + 1024

    def lane_values(self, products=1):
        """fp32 accumulators that one thread holds."""
        warps = self.warps * (2 if self.specialize and self.block_m >= 128 else 1)
        return self.block_m * self.block_n * products // (32 * warps)


def fits(config, capability, dtype, products=1):
    """Whether `config` fits a chip's shared memory and registers, and its instructions."""
    limit = SHARED.get(capability, 99 << 10)
    if config.shared_bytes(dtype.itemsize, products) > limit:
        return False
    if config.tma and (capability is None or capability < (9, 0) or dtype.itemsize > 2):
        return False
    if config.specialize and capability != (9, 0):
        return False
    return config.lane_values(products) <= 128


@functools.cache
def capability(device):
    """(major, minor) of a GPU, None on AMD's; meta tensors and Triton's interpreter: an H100's."""
    if device.type == "cuda":
        return None if torch.version.hip else torch.cuda.get_device_capability(device)
    return (8, 0) if device.type == "xpu" else (9, 0)


def describable(*matrices):
    """Whether TMA can describe them: a contiguous side, and 16-byte bases and strides."""
    for m in matrices:
        if m is None:
            continue
        base = m.storage_offset() * m.element_size() if m.is_meta else m.data_ptr()
        rows = max(m.stride())
        if min(m.stride()) != 1 or rows < 2 or base % 16 or rows * m.element_size() % 16:
            return False
    return True


def workspace(size, alignment, stream):
    """Triton's allocator for tensor descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def contiguous_rows(matrix):
    """`matrix` with contiguous rows, itself where they are."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def precision(dtype, tf32):
    """How tl.dot rounds its operands."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def lanes(capability, plain):
    """fp32 accumulators that a thread may hold without spilling; plain: no epilogue to speak of."""
    return 128 if plain and (capability is None or capability >= (9, 0)) else 64


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of an fp32 block; NaN stays NaN."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        x = tl.where(x < 0.0, 0.0, x)
        x = x * x
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at an fp32 block."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        return s + x * s * (1.0 - s) * inner
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))
    elif ACTIVATION == "relu2":
        return 2.0 * tl.where(x < 0.0, 0.0, x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of tile number `tile`: GROUP_M rows of tiles are walked column by column, so
    that the programs that run together read few blocks of A and B."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    place = tile % per_group
    return first + place % size, place // size
