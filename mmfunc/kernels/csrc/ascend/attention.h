// What the forward and the backward of flash attention share: tiling, products of tiles on the cube unit, masks.
//
// q, o [B, S, H, K], k, v [B, L, G, K]. The cube core of a group multiplies tiles, its two vector cores do the softmax
// of half the rows each; between them tiles pass through a workspace in global memory (which stays in L2), two steps
// deep, under cross-core flags. Whether a tile of scores is skipped, whole or masked stands in a table that the host
// makes. In a masked tile, what is hidden gets a penalty of -1e30 from the distance of the positions to the window and
// of the segments to each other: no compare, no select.
#pragma once
#include "rows.h"

constexpr int32_t QUERIES = 128;  // of a tile
constexpr int32_t CUBE = 128;     // largest side of one product
constexpr float HIDDEN = -1e30f, LOWEST = -1e29f;
enum Code { SKIP, WHOLE, MASKED };
enum Flag { SCORES, WEIGHTS, VALUES };  // cross-core flags

struct AttentionTiling {
  int32_t batch, queries, keys, heads, groups, width, pitch, step, causal_start, left, right, items;
  int32_t bounded;  // whether left and right limit anything
  float scale;
  __aicore__ inline int32_t Tiles() const { return (queries + QUERIES - 1) / QUERIES; }
  __aicore__ inline int32_t Steps() const { return (keys + step - 1) / step; }
};

// A matrix in L1 as fractals: `high` fractals to a column.
struct Fractals { LocalTensor<T> data; int32_t high; };

template <class Q> __aicore__ inline Fractals Bring(Q& queue, GlobalTensor<T> from, int32_t rows, int32_t width,
                                                    int32_t stride) {
  LocalTensor<T> t = queue.template AllocTensor<T>();
  int32_t high = Up(rows, 16);
  if (rows % 16) {  // products read whole fractals
    InitConstValueParams<T> zero;
    zero.blockNum = high * Up(width, 16) / 16;
    InitConstValue(t, zero);
    PipeBarrier<PIPE_MTE2>();
  }
  Nd2NzParams n;
  n.nValue = rows; n.dValue = width; n.srcDValue = stride; n.dstNzC0Stride = high;
  DataCopy(t, from, n);
  queue.EnQue(t);
  return {queue.template DeQue<T>(), high / 16};
}

template <class D> struct Rounding { static constexpr QuantMode_t mode = NoQuant; };
template <> struct Rounding<half> { static constexpr QuantMode_t mode = F322F16; };
template <> struct Rounding<bfloat16_t> { static constexpr QuantMode_t mode = F322BF16; };

class Cube {
 public:
  __aicore__ inline void Init(TPipe& pipe) {
    pipe.InitBuffer(left, 2, CUBE * CUBE * sizeof(T));
    pipe.InitBuffer(right, 2, CUBE * CUBE * sizeof(T));
    pipe.InitBuffer(sums, 2, CUBE * CUBE * sizeof(float));
  }
  // out [m, n] = a b, where a is [m, k] or (A) given as its transpose, b is [k, n] or (B) given as its transpose
  template <bool A, bool B, class D> __aicore__ inline void Product(GlobalTensor<D> out, int32_t stride, Fractals a,
                                                                    Fractals b, int32_t m, int32_t n, int32_t k) {
    for (int32_t j = 0; j < n; j += CUBE) {
      int32_t w = Least(CUBE, n - j);
      LocalTensor<float> sum = sums.AllocTensor<float>();
      for (int32_t i = 0; i < k; i += CUBE) Part<A, B>(sum, a, b, m, w, Least(CUBE, k - i), j / 16, i / 16, i == 0);
      sums.EnQue(sum);
      sum = sums.DeQue<float>();
      FixpipeParamsV220 p;
      p.nSize = w; p.mSize = m; p.srcStride = Up(m, 16); p.dstStride = stride;
      p.quantPre = Rounding<D>::mode;
      Fixpipe(out[j], sum, p);
      sums.FreeTensor(sum);
    }
  }

 private:
  template <bool A, bool B> __aicore__ inline void Part(LocalTensor<float> sum, Fractals a, Fractals b, int32_t m,
                                                        int32_t n, int32_t k, int32_t n0, int32_t k0, bool first) {
    int32_t m16 = Up(m, 16) / 16, n16 = Up(n, 16) / 16, k16 = Up(k, 16) / 16;
    LocalTensor<T> x = left.AllocTensor<T>();
    for (int32_t i = 0; i < m16; i++) {  // ZZ: a row of fractals after the other
      LoadData2DParams p;
      p.startIndex = A ? i * a.high + k0 : k0 * a.high + i;
      p.repeatTimes = k16; p.srcStride = A ? 1 : a.high; p.ifTranspose = A;
      LoadData(x[i * k16 * 256], a.data, p);
    }
    left.EnQue(x);
    LocalTensor<T> y = right.AllocTensor<T>();
    for (int32_t i = 0; i < k16; i++) {  // ZN: the fractal itself is column-major, as a transposed source has it
      LoadData2DParams p;
      p.startIndex = B ? (k0 + i) * b.high + n0 : n0 * b.high + k0 + i;
      p.repeatTimes = n16; p.srcStride = B ? 1 : b.high; p.ifTranspose = !B;
      LoadData(y[i * n16 * 256], b.data, p);
    }
    right.EnQue(y);
    x = left.DeQue<T>();
    y = right.DeQue<T>();
    MmadParams p;
    p.m = m; p.n = n; p.k = k; p.cmatrixInitVal = first;
    Mmad(sum, x, y, p);
    left.FreeTensor(x);
    right.FreeTensor(y);
  }
  TQue<TPosition::A2, 1> left;
  TQue<TPosition::B2, 1> right;
  TQue<TPosition::CO1, 1> sums;
};

// The penalty of a masked tile of scores.
class Mask {
 public:
  __aicore__ inline void Init(TPipe& pipe, const AttentionTiling& tiling, GM_ADDR query_segments,
                              GM_ADDR key_segments) {
    t = tiling;
    tube = &pipe;
    qs.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(query_segments));
    ks.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(key_segments));
    pipe.InitBuffer(columnBuf, t.step * sizeof(float));
    pipe.InitBuffer(placeBuf, t.step * sizeof(float));
    pipe.InitBuffer(rowBuf, QUERIES * sizeof(float));
    pipe.InitBuffer(rowWide, QUERIES / 2 * 8 * sizeof(float));
    pipe.InitBuffer(whereBuf, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(whereWide, QUERIES / 2 * 8 * sizeof(float));
    CreateVecIndex(placeBuf.Get<float>(), 0.0f, t.step);
    Duplicate(rowBuf.Get<float>(), 0.0f, QUERIES);
  }
  // for the rows of this vector core in one tile of queries; the segment vectors are padded to whole tiles
  __aicore__ inline void Rows(int32_t b, int32_t query) {
    Fetch(*tube, rowBuf.Get<float>(), qs[static_cast<int64_t>(b) * t.Tiles() * QUERIES + query], QUERIES / 2);
    Spread(rowWide.Get<float>(), rowBuf.Get<float>(), QUERIES / 2);
    LocalTensor<float> where = whereBuf.Get<float>();
    CreateVecIndex(where, static_cast<float>(query + t.causal_start), QUERIES / 2);
    Spread(whereWide.Get<float>(), where, QUERIES / 2);
  }
  __aicore__ inline void Columns(int32_t b, int32_t key) {
    first = key;
    Fetch(*tube, columnBuf.Get<float>(), ks[static_cast<int64_t>(b) * t.Steps() * t.step + key], t.step);
  }
  // x [rows, pitch] += penalty, for rows from `row` on; scratch of the same size
  __aicore__ inline void Add(LocalTensor<float> x, LocalTensor<float> scratch, int32_t row, int32_t rows,
                             int32_t pitch) {
    int32_t n = rows * pitch;
    Duplicate(scratch, 0.0f, n);
    ByColumn<ADD>(scratch, scratch, columnBuf.Get<float>(), rows, pitch, pitch);
    ByRow<SUB>(scratch, scratch, rowWide.Get<float>()[row * 8], rows, pitch);
    Mul(scratch, scratch, scratch, n);
    Give(x, scratch, n);
    if (!t.bounded) return;
    Distance(scratch, row, rows, pitch);
    Adds(scratch, scratch, static_cast<float>(-t.right), n);
    Maxs(scratch, scratch, 0.0f, n);
    Give(x, scratch, n);
    Distance(scratch, row, rows, pitch);
    Muls(scratch, scratch, -1.0f, n);
    Adds(scratch, scratch, static_cast<float>(-t.left), n);
    Maxs(scratch, scratch, 0.0f, n);
    Give(x, scratch, n);
  }

 private:
  __aicore__ inline void Distance(LocalTensor<float> to, int32_t row, int32_t rows, int32_t pitch) {  // key - query
    Duplicate(to, static_cast<float>(first), rows * pitch);
    ByColumn<ADD>(to, to, placeBuf.Get<float>(), rows, pitch, pitch);
    ByRow<SUB>(to, to, whereWide.Get<float>()[row * 8], rows, pitch);
  }
  __aicore__ inline void Give(LocalTensor<float> x, LocalTensor<float> scratch, int32_t n) {
    Mins(scratch, scratch, 1.0f, n);
    Muls(scratch, scratch, HIDDEN, n);
    AscendC::Add(x, x, scratch, n);
  }
  AttentionTiling t;
  TPipe* tube;
  GlobalTensor<float> qs, ks;
  TBuf<TPosition::VECCALC> columnBuf, placeBuf, rowBuf, rowWide, whereBuf, whereWide;
  int32_t first;
};
