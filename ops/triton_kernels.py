"""The Triton kernels: multi-scale deformable attention, forward and backward, plain and fused form.

Imported only by the Triton backend, so that `import ops` needs no Triton.

A program computes a few neighbouring queries of one head of one image, whose samples tend to be
close together. Tiles have the axes queries, samples, channels; no intermediate result goes through
memory. Sizes fixed by the model are compile-time constants. Those that vary between batches
(tokens, queries, sizes of the levels) are not, so that they cause no recompilation.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl
from triton import TritonError

__all__ = ["INTERPRETED", "TritonError", "msda_backward", "msda_forward"]

# N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points. Samples: L * K.
# All arrays are contiguous. FORM is 0 for the plain form, else how many numbers a reference has.

_VARYING = ["tokens", "queries"]  # Triton would recompile for multiples of 16


@triton.jit
def _place(queries, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return image, head and queries [BLOCK_Q] of this program; neighbours share a head."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    pid = tl.program_id(0)
    head = pid // tiles % HEADS
    image = (pid // tiles // HEADS).to(tl.int64)
    return image, head, pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit
def _corners(
    points, reference, levels, row, slot, sample, inside,
    SAMPLES: tl.constexpr, PER_LEVEL: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Return the corners of samples.

    These are the token of the top left one, shares of the right and the lower side, height and
    width of the level, and which of the left, right, top and bottom sides exist: none for a point
    more than one cell outside, or NaN. row: image * Q + query; slot: row * M + head; inside: which
    samples exist.
    """
    level = sample // PER_LEVEL
    present = sample < SAMPLES
    height = tl.load(levels + 3 * level, mask=present, other=1)
    width = tl.load(levels + 3 * level + 1, mask=present, other=1)
    start = tl.load(levels + 3 * level + 2, mask=present, other=0)

    place = 2 * (slot * SAMPLES + sample)
    x = tl.load(points + place, mask=inside, other=0.0)
    y = tl.load(points + place + 1, mask=inside, other=0.0)
    if FORM == 0:
        x *= width.to(x.dtype)
        y *= height.to(y.dtype)
    else:
        box = reference + (row * (SAMPLES // PER_LEVEL) + level) * FORM
        centre_x = tl.load(box, mask=inside, other=0.0)
        centre_y = tl.load(box + 1, mask=inside, other=0.0)
        if FORM == 2:
            x += centre_x * width.to(x.dtype)
            y += centre_y * height.to(y.dtype)
        else:
            box_width = tl.load(box + 2, mask=inside, other=0.0)
            box_height = tl.load(box + 3, mask=inside, other=0.0)
            x = (centre_x + x * box_width * (0.5 / PER_LEVEL)) * width.to(x.dtype)
            y = (centre_y + y * box_height * (0.5 / PER_LEVEL)) * height.to(y.dtype)
    x -= 0.5  # in cells, cell centres at integers
    y -= 0.5

    near = inside & (x > -1) & (x < width.to(x.dtype)) & (y > -1) & (y < height.to(y.dtype))
    x = tl.where(near, x, -2.0)  # keeps the conversions to integers in range
    y = tl.where(near, y, -2.0)
    column = tl.floor(x).to(tl.int32)
    line = tl.floor(y).to(tl.int32)
    has_left = column >= 0
    has_right = (column >= -1) & (column < width - 1)
    has_top = line >= 0
    has_bottom = (line >= -1) & (line < height - 1)
    token = start + line * width + column
    right = x - tl.floor(x)
    down = y - tl.floor(y)
    return token, right, down, height, width, has_left, has_right, has_top, has_bottom


@triton.jit
def _read(value, token, exists, channel, ROW: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the offsets of the rows of tokens, which elements exist, and the elements."""
    offset = token.to(tl.int64)[:, :, None] * ROW + channel[None, None, :]
    mask = exists[:, :, None] & (channel < CHANNELS)[None, None, :]
    return offset, mask, tl.load(value + offset, mask=mask, other=0.0)


@triton.jit
def _interpolate(
    value, token, right, down, width, has_left, has_right, has_top, has_bottom, channel,
    ROW: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return samples [BLOCK_Q, BLOCK_S, BLOCK_D] in the type of the shares."""
    _, _, v = _read(value, token, has_top & has_left, channel, ROW, CHANNELS)
    result = ((1 - down) * (1 - right))[:, :, None] * v.to(right.dtype)
    _, _, v = _read(value, token + 1, has_top & has_right, channel, ROW, CHANNELS)
    result += ((1 - down) * right)[:, :, None] * v.to(right.dtype)
    _, _, v = _read(value, token + width, has_bottom & has_left, channel, ROW, CHANNELS)
    result += (down * (1 - right))[:, :, None] * v.to(right.dtype)
    _, _, v = _read(value, token + width + 1, has_bottom & has_right, channel, ROW, CHANNELS)
    result += (down * right)[:, :, None] * v.to(right.dtype)
    return result


@triton.jit(do_not_specialize=_VARYING)
def msda_forward(
    value, levels, reference, points, weights, output, tokens, queries,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr, PER_LEVEL: tl.constexpr,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL_SAMPLES: tl.constexpr,
):  # fmt: skip
    """Write the output of BLOCK_Q queries, BLOCK_S samples of each at a time.

    levels [L,3]: height, width and first token. ALL_SAMPLES: SAMPLES as a power of two, or more.
    """
    ROW: tl.constexpr = HEADS * CHANNELS
    image, head, query = _place(queries, HEADS, BLOCK_Q)
    row = (image * queries + query)[:, None]
    slot = row * HEADS + head
    channel = tl.arange(0, BLOCK_D)
    value += image * tokens * ROW + head * CHANNELS

    if FORM != 0:
        every = tl.arange(0, ALL_SAMPLES)[None, :]
        there = (query < queries)[:, None] & (every < SAMPLES)
        logits = tl.load(weights + slot * SAMPLES + every, mask=there, other=0.0)
        logits = tl.where(every < SAMPLES, logits, float("-inf"))
        largest = tl.max(logits, 1)
        total = tl.sum(tl.exp(logits - largest[:, None]), 1)

    sums = tl.zeros([BLOCK_Q, BLOCK_S, BLOCK_D], dtype=points.dtype.element_ty)
    for first in range(0, SAMPLES, BLOCK_S):
        sample = (first + tl.arange(0, BLOCK_S))[None, :]
        inside = (query < queries)[:, None] & (sample < SAMPLES)
        attention = tl.load(weights + slot * SAMPLES + sample, mask=inside, other=0.0)
        if FORM != 0:
            attention = tl.exp(attention - largest[:, None])
        token, right, down, _, width, has_left, has_right, has_top, has_bottom = _corners(
            points, reference, levels, row, slot, sample, inside, SAMPLES, PER_LEVEL, FORM
        )
        # attention is not in the shares: its layout differs, and so it is moved only once
        sums += attention[:, :, None] * _interpolate(
            value, token, right, down, width, has_left, has_right, has_top, has_bottom, channel,
            ROW, CHANNELS,
        )  # fmt: skip

    result = tl.sum(sums, 1)
    if FORM != 0:
        result *= (1 / total)[:, None]
    to = output + slot * CHANNELS + channel[None, :]
    there = (query < queries)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(to, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def _corner_backward(
    value, grad_value, scale, token, exists, share, grad, attended, channel,
    ROW: tl.constexpr, CHANNELS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Add share * attended to the gradient of a corner's row; return the dot of grad and its value.

    share [BLOCK_Q, BLOCK_S]: bilinear weights; attended: attention * grad.
    """
    offset, mask, v = _read(value, token, exists, channel, ROW, CHANNELS)
    addend = share[:, :, None] * attended
    if DETERMINISTIC:
        addend = (addend.to(tl.float64) * tl.load(scale)).to(tl.int64)
    tl.atomic_add(grad_value + offset, addend, mask=mask, sem="relaxed")
    return tl.sum(v.to(grad.dtype) * grad[:, None, :], 2)


@triton.jit
def _corners_backward(
    value, grad_value, scale, token, right, down, width, has_left, has_right, has_top, has_bottom,
    grad, attention, channel,
    ROW: tl.constexpr, CHANNELS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Return gradients of attention, and of x and y in cells before the factor attention."""
    # attention is not in the shares: its layout differs, and so it is moved only once
    attended = attention[:, :, None] * grad[:, None, :]
    left = 1 - right
    up = 1 - down
    top_left = _corner_backward(
        value, grad_value, scale, token, has_top & has_left, up * left, grad, attended, channel,
        ROW, CHANNELS, DETERMINISTIC,
    )  # fmt: skip
    top_right = _corner_backward(
        value, grad_value, scale, token + 1, has_top & has_right, up * right, grad, attended,
        channel, ROW, CHANNELS, DETERMINISTIC,
    )  # fmt: skip
    bottom_left = _corner_backward(
        value, grad_value, scale, token + width, has_bottom & has_left, down * left, grad, attended,
        channel, ROW, CHANNELS, DETERMINISTIC,
    )  # fmt: skip
    bottom_right = _corner_backward(
        value, grad_value, scale, token + width + 1, has_bottom & has_right, down * right, grad,
        attended, channel, ROW, CHANNELS, DETERMINISTIC,
    )  # fmt: skip
    of_attention = up * (left * top_left + right * top_right)
    of_attention += down * (left * bottom_left + right * bottom_right)
    of_x = up * (top_right - top_left) + down * (bottom_right - bottom_left)
    of_y = left * (bottom_left - top_left) + right * (bottom_right - top_right)
    return of_attention, of_x, of_y


@triton.jit(do_not_specialize=_VARYING)
def msda_backward(
    value, levels, reference, points, weights, grad_output, scale, grad_value, grad_points,
    grad_weights, tokens, queries,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr, PER_LEVEL: tl.constexpr,
    FORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    TO_LOCATIONS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Add to `grad_value` and write the other gradients of BLOCK_Q queries, all samples at a time.

    levels: as in `msda_forward`. TO_LOCATIONS: `grad_points` is of sampling locations, in any form.
    DETERMINISTIC: `grad_value` is a sum of 64-bit integers, `scale` [1] times as large.
    """
    ROW: tl.constexpr = HEADS * CHANNELS
    image, head, query = _place(queries, HEADS, BLOCK_Q)
    row = (image * queries + query)[:, None]
    slot = row * HEADS + head
    channel = tl.arange(0, BLOCK_D)
    value += image * tokens * ROW + head * CHANNELS
    grad_value += image * tokens * ROW + head * CHANNELS
    sample = tl.arange(0, BLOCK_S)[None, :]
    inside = (query < queries)[:, None] & (sample < SAMPLES)

    there = (query < queries)[:, None] & (channel < CHANNELS)[None, :]
    grad = tl.load(grad_output + slot * CHANNELS + channel[None, :], mask=there, other=0.0)
    grad = grad.to(points.dtype.element_ty)
    attention = tl.load(weights + slot * SAMPLES + sample, mask=inside, other=0.0)
    if FORM != 0:
        attention = tl.where(sample < SAMPLES, attention, float("-inf"))
        attention = tl.exp(attention - tl.max(attention, 1)[:, None])
        attention /= tl.sum(attention, 1)[:, None]
    token, right, down, height, width, has_left, has_right, has_top, has_bottom = _corners(
        points, reference, levels, row, slot, sample, inside, SAMPLES, PER_LEVEL, FORM
    )
    of_weight, of_x, of_y = _corners_backward(
        value, grad_value, scale, token, right, down, width, has_left, has_right, has_top,
        has_bottom, grad, attention, channel, ROW, CHANNELS, DETERMINISTIC,
    )  # fmt: skip
    of_x *= attention
    of_y *= attention
    if FORM != 2 or TO_LOCATIONS:
        of_x *= width.to(of_x.dtype)
        of_y *= height.to(of_y.dtype)
    if FORM == 4 and not TO_LOCATIONS:
        box = reference + (row * (SAMPLES // PER_LEVEL) + sample // PER_LEVEL) * FORM
        of_x *= tl.load(box + 2, mask=inside, other=0.0) * (0.5 / PER_LEVEL)
        of_y *= tl.load(box + 3, mask=inside, other=0.0) * (0.5 / PER_LEVEL)
    to = grad_points + 2 * (slot * SAMPLES + sample)
    tl.store(to, of_x, mask=inside)
    tl.store(to + 1, of_y, mask=inside)
    if FORM != 0:  # the softmax subtracts the mean of all from each
        of_weight = attention * (of_weight - tl.sum(attention * of_weight, 1)[:, None])
    tl.store(grad_weights + slot * SAMPLES + sample, of_weight, mask=inside)


INTERPRETED = not isinstance(msda_forward, triton.JITFunction)  # by TRITON_INTERPRET=1
