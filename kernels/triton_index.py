"""Where a voxel lies: index arithmetic that every convolution kernel shares.

Rows are voxels of packed features [N, bd, bh, bw, C]; a block's row r is voxel (z, y, x) of it.
Triples of constexprs are in the order d, h, w. A coordinate may step out of its block by less than
the block's width; the mask's table of 27 neighbours then names the block it lands in, if any.
"""

import triton
import triton.language as tl


@triton.jit
def coordinates(rows, BLOCK: tl.constexpr):
    """Block number (int64) and voxel (z, y, x) of packed rows."""
    n = rows // (BLOCK[0] * BLOCK[1] * BLOCK[2])
    inside = (rows - n * (BLOCK[0] * BLOCK[1] * BLOCK[2])).to(tl.int32)
    z = inside // (BLOCK[1] * BLOCK[2])
    y = inside // BLOCK[2] % BLOCK[1]
    return n.to(tl.int64), z, y, inside % BLOCK[2]


@triton.jit
def locate(neighbors_ptr, n, z, y, x, live, BLOCK: tl.constexpr):
    """Packed row (int64) of voxel (z, y, x) relative to block n, and whether there is one."""
    # 0, 1 or 2: the previous, the own, or the next block along each axis
    step_d = (z >= 0).to(tl.int32) + (z >= BLOCK[0]).to(tl.int32)
    step_h = (y >= 0).to(tl.int32) + (y >= BLOCK[1]).to(tl.int32)
    step_w = (x >= 0).to(tl.int32) + (x >= BLOCK[2]).to(tl.int32)
    direction = step_d * 9 + step_h * 3 + step_w
    block = tl.load(neighbors_ptr + n * 27 + direction, mask=live, other=-1)
    z -= (step_d - 1) * BLOCK[0]
    y -= (step_h - 1) * BLOCK[1]
    x -= (step_w - 1) * BLOCK[2]
    inside = (z * BLOCK[1] + y) * BLOCK[2] + x
    return block.to(tl.int64) * (BLOCK[0] * BLOCK[1] * BLOCK[2]) + inside, block >= 0


@triton.jit
def moments(values, live, count):
    """Mean and sum of squared deviations of each column over the `count` live rows of a tile."""
    mean = tl.sum(tl.where(live[:, None], values, 0.0), 0) / count
    deviation = tl.where(live[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def merge(mean, squares, tiles, values, live, count):
    """The moments of `tiles` tiles of `count` rows each, with one more tile added (Chan et al.)."""
    other, more = moments(values, live, count)
    difference = other - mean
    mean += difference / (tiles + 1)
    squares += more + difference * difference * (count * tiles / (tiles + 1.0))
    return mean, squares
