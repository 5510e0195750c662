// Bilinear sampling of a point of one level, and its gradient: the arithmetic that the compiled
// backends share. Numbers are scalars on a GPU and vectors of samples on a CPU; `select`, `to_int`
// and `to_float` come from the file that includes this one.
#pragma once

namespace msda {

// The four cells around a point, in the order top left, top right, bottom left, bottom right.
template <class F, class I>
struct Corners {
  decltype(F{} < F{}) exists[4];  // whether the cell is inside the level
  F weight[4];            // bilinear weights; 0 for a cell outside the level
  I cell[4];              // row * width + column; `nowhere` for a cell outside the level
  I first;                // the top left cell, as if the level had no edges
  F left, right, up, down;  // shares of the left and right columns, upper and lower rows, 0..1
};

// x, y: the point in cells, cell centres at whole numbers. A point further than one cell outside,
// or NaN, has no cell. A cell lies at start + row * pitch + column * step.
template <class F, class I>
MSDA_INLINE Corners<F, I> find_corners(F x, F y, F width, F height, I start, I pitch, I step,
                                       I nowhere) {
  const auto near = (x > F{} - 1) & (x < width) & (y > F{} - 1) & (y < height);
  x = select(near, x, F{} - 2);  // keeps the conversions to integers in range
  y = select(near, y, F{} - 2);
  F column = to_float(to_int(x)), row = to_float(to_int(y));
  column = select(column > x, column - 1, column);  // towards minus infinity
  row = select(row > y, row - 1, row);

  Corners<F, I> c;
  c.right = x - column;
  c.down = y - row;
  c.left = F{} + 1 - c.right;
  c.up = F{} + 1 - c.down;

  const I first = c.first = start + to_int(row) * pitch + to_int(column) * step;
  const auto has_left = column >= F{}, has_up = row >= F{};
  const auto has_right = (column < width - 1) & (column >= F{} - 1);
  const auto has_down = (row < height - 1) & (row >= F{} - 1);
  const F zero{};
  const F left = select(has_left, c.left, zero), right = select(has_right, c.right, zero);
  const F up = select(has_up, c.up, zero), down = select(has_down, c.down, zero);
  c.weight[0] = left * up;
  c.weight[1] = right * up;
  c.weight[2] = left * down;
  c.weight[3] = right * down;
  c.exists[0] = has_left & has_up, c.exists[1] = has_right & has_up;
  c.exists[2] = has_left & has_down, c.exists[3] = has_right & has_down;
  c.cell[0] = select(has_left, select(has_up, first, nowhere), nowhere);
  c.cell[1] = select(has_right, select(has_up, first + step, nowhere), nowhere);
  c.cell[2] = select(has_left, select(has_down, first + pitch, nowhere), nowhere);
  c.cell[3] = select(has_right, select(has_down, first + pitch + step, nowhere), nowhere);
  return c;
}

// dot[i]: output gradient times value of corner i over the channels, 0 for a cell outside.
template <class F, class I>
MSDA_INLINE F gradient_of_attention(const Corners<F, I>& c, const F (&dot)[4]) {
  return c.weight[0] * dot[0] + c.weight[1] * dot[1] + c.weight[2] * dot[2] + c.weight[3] * dot[3];
}

// With respect to x in cells; the attention weight of the sample is still to be multiplied.
template <class F, class I>
MSDA_INLINE F gradient_of_x(const Corners<F, I>& c, const F (&dot)[4]) {
  return c.up * (dot[1] - dot[0]) + c.down * (dot[3] - dot[2]);
}

template <class F, class I>
MSDA_INLINE F gradient_of_y(const Corners<F, I>& c, const F (&dot)[4]) {
  return c.left * (dot[2] - dot[0]) + c.right * (dot[3] - dot[1]);
}

}  // namespace msda
