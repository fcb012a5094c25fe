// Rows of vectors in UB: moves, sums over rows, and operations with one number per row or one per column.
//
// A tile is `rows` x `pitch` floats; pitch is a multiple of 8, at most 2040 when rows > 1 and short instructions can
// take a row per repeat, and at most 8192 else. DTYPE is the type in global memory.
#pragma once
#include "kernel_operator.h"
using namespace AscendC;
#ifndef DTYPE
#define DTYPE half
#endif
using T = DTYPE;
constexpr int32_t LANES = 64;    // floats of one vector repeat
constexpr int32_t STRIDED = 2040;  // the longest pitch that fits a repeat stride (255 blocks of 32 bytes)
constexpr int32_t GRAIN = 32 / sizeof(T);

__aicore__ inline int32_t Up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }
__aicore__ inline int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }
__aicore__ inline uint8_t Stride(int32_t pitch) { return static_cast<uint8_t>(pitch / 8); }

template <class S> __aicore__ inline void ReadTiling(S& to, GM_ADDR from) {
  auto* words = reinterpret_cast<__gm__ uint32_t*>(from);
  for (uint32_t i = 0; i < sizeof(S) / 4; i++) reinterpret_cast<uint32_t*>(&to)[i] = words[i];
}

template <class Q> __aicore__ inline void CopyIn(Q& queue, GlobalTensor<T> from, int32_t rows, int32_t width,
                                                 int32_t stride) {
  LocalTensor<T> t = queue.template AllocTensor<T>();
  DataCopyExtParams copy;
  copy.blockCount = rows; copy.blockLen = width * sizeof(T); copy.srcStride = (stride - width) * sizeof(T);
  DataCopyPadExtParams<T> pad;
  pad.isPad = true; pad.rightPadding = Up(width, GRAIN) - width;
  DataCopyPad(t, from, copy, pad);
  queue.EnQue(t);
}

template <class Q> __aicore__ inline void CopyOut(Q& queue, GlobalTensor<T> to, int32_t rows, int32_t width,
                                                  int32_t stride) {
  LocalTensor<T> t = queue.template DeQue<T>();
  DataCopyExtParams copy;
  copy.blockCount = rows; copy.blockLen = width * sizeof(T); copy.dstStride = (stride - width) * sizeof(T);
  DataCopyPad(to, t, copy);
  queue.FreeTensor(t);
}

// A vector of floats from global memory to a plain buffer, ordered by flags on both sides.
__aicore__ inline void Fetch(TPipe& pipe, LocalTensor<float> to, GlobalTensor<float> from, int32_t width) {
  event_t before = static_cast<event_t>(pipe.FetchEventID(HardEvent::V_MTE2));
  event_t after = static_cast<event_t>(pipe.FetchEventID(HardEvent::MTE2_V));
  if (width % GRAIN) Duplicate(to, 0.0f, Up(width, GRAIN));  // padding ends at 32 bytes, a tile's pitch may not
  SetFlag<HardEvent::V_MTE2>(before);
  WaitFlag<HardEvent::V_MTE2>(before);
  DataCopyExtParams copy;
  copy.blockLen = width * sizeof(float);
  DataCopyPadExtParams<float> pad;
  pad.isPad = true; pad.rightPadding = Up(width, 8) - width;
  DataCopyPad(to, from, copy, pad);
  SetFlag<HardEvent::MTE2_V>(after);
  WaitFlag<HardEvent::MTE2_V>(after);
}

// A vector of floats from a plain buffer to global memory.
__aicore__ inline void Flush(TPipe& pipe, GlobalTensor<float> to, LocalTensor<float> from, int32_t width) {
  event_t before = static_cast<event_t>(pipe.FetchEventID(HardEvent::V_MTE3));
  event_t after = static_cast<event_t>(pipe.FetchEventID(HardEvent::MTE3_V));
  SetFlag<HardEvent::V_MTE3>(before);
  WaitFlag<HardEvent::V_MTE3>(before);
  DataCopyExtParams copy;
  copy.blockLen = width * sizeof(float);
  DataCopyPad(to, from, copy);
  SetFlag<HardEvent::MTE3_V>(after);
  WaitFlag<HardEvent::MTE3_V>(after);
}

// Between the type of global memory and float; a copy where they are the same.
__aicore__ inline void Load(LocalTensor<float> to, LocalTensor<float> from, int32_t n) { Adds(to, from, 0.0f, n); }
__aicore__ inline void Store(LocalTensor<float> to, LocalTensor<float> from, int32_t n) { Adds(to, from, 0.0f, n); }
template <class U> __aicore__ inline void Load(LocalTensor<float> to, LocalTensor<U> from, int32_t n) {
  Cast(to, from, RoundMode::CAST_NONE, n);
}
template <class U> __aicore__ inline void Store(LocalTensor<U> to, LocalTensor<float> from, int32_t n) {
  Cast(to, from, RoundMode::CAST_RINT, n);
}

// Sums (or maxima) of the first `width` columns of each row; x is overwritten where its pitch is at most STRIDED, part
// holds 128 floats.
template <bool MAX> __aicore__ inline void Combine(LocalTensor<float> to, LocalTensor<float> a, LocalTensor<float> b,
                                                   int32_t mask, int32_t rows, uint8_t to_stride, uint8_t stride) {
  BinaryRepeatParams p = {1, 1, 1, to_stride, to_stride, stride};
  if constexpr (MAX) Max(to, a, b, mask, rows, p); else Add(to, a, b, mask, rows, p);
}
template <bool MAX> __aicore__ inline void Whole(LocalTensor<float> to, LocalTensor<float> x, int32_t mask,
                                                 int32_t rows, int32_t stride) {
  if constexpr (MAX) WholeReduceMax(to, x, mask, rows, 1, 1, stride, ReduceOrder::ORDER_ONLY_VALUE);
  else WholeReduceSum(to, x, mask, rows, 1, 1, stride);
}
template <bool MAX = false> __aicore__ inline void Reduce(LocalTensor<float> to, LocalTensor<float> x,
                                                          LocalTensor<float> part, int32_t rows, int32_t pitch,
                                                          int32_t width) {
  if (pitch <= STRIDED) {
    for (int32_t j = LANES; j < width; j += LANES)
      Combine<MAX>(x, x, x[j], Least(LANES, width - j), rows, Stride(pitch), Stride(pitch));
    Whole<MAX>(to, x, Least(LANES, width), rows, pitch / 8);
    return;
  }
  for (int32_t r = 0; r < rows; r++) {
    LocalTensor<float> row = x[r * pitch];
    int32_t whole = width / LANES, tail = width % LANES, parts = whole + (tail ? 1 : 0);
    Whole<MAX>(part, row, LANES, whole, 8);
    if (tail) Whole<MAX>(part[whole], row[whole * LANES], tail, 1, 8);
    if (parts > LANES) Combine<MAX>(part, part, part[LANES], parts - LANES, 1, 8, 8);
    Whole<MAX>(to[r], part, Least(LANES, parts), 1, 8);
  }
}

enum Binary { ADD, SUB, MUL, DIV };
template <Binary F> __aicore__ inline void Apply(LocalTensor<float> to, LocalTensor<float> a, LocalTensor<float> b,
                                                 int32_t mask, int32_t repeat, const BinaryRepeatParams& p) {
  if constexpr (F == ADD) Add(to, a, b, mask, repeat, p);
  else if constexpr (F == SUB) Sub(to, a, b, mask, repeat, p);
  else if constexpr (F == MUL) Mul(to, a, b, mask, repeat, p);
  else Div(to, a, b, mask, repeat, p);
}
template <Binary F> __aicore__ inline void Apply(LocalTensor<float> to, LocalTensor<float> a, LocalTensor<float> b,
                                                 int32_t n) {
  if constexpr (F == ADD) Add(to, a, b, n);
  else if constexpr (F == SUB) Sub(to, a, b, n);
  else if constexpr (F == MUL) Mul(to, a, b, n);
  else Div(to, a, b, n);
}

// One number per row to eight lanes per row; each must hold rows rounded up to 8.
__aicore__ inline void Spread(LocalTensor<float> to, LocalTensor<float> each, int32_t rows) {
  Brcb(to, each, (rows + 7) / 8, {1, 8});
}
// x (op) one number per row, given as Spread leaves it.
template <Binary F> __aicore__ inline void ByRow(LocalTensor<float> to, LocalTensor<float> x, LocalTensor<float> spread,
                                                 int32_t rows, int32_t pitch) {
  if (pitch <= STRIDED) {
    BinaryRepeatParams p = {1, 1, 0, Stride(pitch), Stride(pitch), 1};
    for (int32_t j = 0; j < pitch; j += LANES) Apply<F>(to[j], x[j], spread, Least(LANES, pitch - j), rows, p);
    return;
  }
  for (int32_t r = 0; r < rows; r++) {
    BinaryRepeatParams p = {1, 1, 0, 8, 8, 0};
    int32_t whole = pitch / LANES, tail = pitch % LANES, o = r * pitch;
    Apply<F>(to[o], x[o], spread[r * 8], LANES, whole, p);
    if (tail) Apply<F>(to[o + whole * LANES], x[o + whole * LANES], spread[r * 8], tail, 1, p);
  }
}
// x (op) a vector over the columns.
template <Binary F> __aicore__ inline void ByColumn(LocalTensor<float> to, LocalTensor<float> x, LocalTensor<float> v,
                                                    int32_t rows, int32_t pitch, int32_t width) {
  if (pitch <= STRIDED && rows > 1) {
    BinaryRepeatParams p = {1, 1, 1, Stride(pitch), Stride(pitch), 0};
    for (int32_t j = 0; j < width; j += LANES) Apply<F>(to[j], x[j], v[j], Least(LANES, width - j), rows, p);
    return;
  }
  for (int32_t r = 0; r < rows; r++) Apply<F>(to[r * pitch], x[r * pitch], v, width);
}
// What Reduce and Fold may overwrite: a copy of x where they do.
__aicore__ inline LocalTensor<float> Spare(LocalTensor<float> copy, LocalTensor<float> x, int32_t rows,
                                           int32_t pitch) {
  if (pitch > STRIDED) return x;
  Adds(copy, x, 0.0f, rows * pitch);
  return copy;
}
// total += the sum of the rows; x is overwritten where its pitch is at most STRIDED.
__aicore__ inline void Fold(LocalTensor<float> total, LocalTensor<float> x, int32_t rows, int32_t pitch) {
  if (pitch > STRIDED) {
    for (int32_t r = 0; r < rows; r++) Add(total, total, x[r * pitch], pitch);
    return;
  }
  for (int32_t n = rows; n > 1; n = (n + 1) / 2) Add(x, x, x[(n + 1) / 2 * pitch], n / 2 * pitch);
  Add(total, total, x, pitch);
}
// 1 / sqrt(sum / width + eps), each in place; ones is scratch.
__aicore__ inline void Inverse(LocalTensor<float> each, LocalTensor<float> ones, int32_t rows, int32_t width,
                               float eps) {
  Muls(each, each, 1.0f / width, rows);
  Adds(each, each, eps, rows);
  Sqrt(each, each, rows);
  Duplicate(ones, 1.0f, rows);
  Div(each, ones, each, rows);
}
