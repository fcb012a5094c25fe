// RMSNorm (+ residual add) and LayerNorm (+ adaLN modulation), forward and backward.
//
// Each core takes a run of tiles; a tile is a few whole rows of one group (one batch entry when the modulation differs
// between them). A row too long for UB is read in chunks, once per statistic. Statistics are float. The gradients of
// factor and shift are summed by each core into a slot of its own (block + group); the host adds the slots.
#include "rows.h"

struct NormTiling {
  int32_t width, group_rows, groups, tile, tiles, chunk, chunks, center, residual, factor, shift, pitch;
  float eps, plus;  // y = x^ * (plus + factor) + shift
};

class Norm {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR r, GM_ADDR f, GM_ADDR s, GM_ADDR dy, GM_ADDR out, GM_ADDR sum,
                              GM_ADDR df, GM_ADDR ds, GM_ADDR tiling, bool backward) {
    ReadTiling(t, tiling);
    back = backward;
    xs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    rs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(r));
    gs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dy));
    outs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
    sums.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(sum));
    factors.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(f));
    shifts.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(s));
    dfs.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(df));
    dss.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(ds));
    int32_t n = t.tile * t.pitch, stats = Up(t.tile, 8) * sizeof(float);
    pipe.InitBuffer(xIn, 2, n * sizeof(T));
    if (back) pipe.InitBuffer(gIn, 2, n * sizeof(T));
    if (t.residual) pipe.InitBuffer(rIn, 2, n * sizeof(T));
    pipe.InitBuffer(yOut, 2, n * sizeof(T));
    if (t.residual && !back) pipe.InitBuffer(sOut, 2, n * sizeof(T));
    pipe.InitBuffer(aBuf, n * sizeof(float));
    pipe.InitBuffer(bBuf, n * sizeof(float));
    if (back) pipe.InitBuffer(cBuf, n * sizeof(float));
    if (t.factor) pipe.InitBuffer(fBuf, t.pitch * sizeof(float));
    if (t.shift && !back) pipe.InitBuffer(hBuf, t.pitch * sizeof(float));
    if (t.factor && back) pipe.InitBuffer(dfBuf, t.pitch * sizeof(float));
    if (t.shift && back) pipe.InitBuffer(dsBuf, t.pitch * sizeof(float));
    pipe.InitBuffer(oneBuf, stats);
    pipe.InitBuffer(twoBuf, stats);
    pipe.InitBuffer(threeBuf, stats);
    pipe.InitBuffer(oneWide, stats * 8);
    pipe.InitBuffer(twoWide, stats * 8);
    pipe.InitBuffer(threeWide, stats * 8);
    pipe.InitBuffer(partBuf, 128 * sizeof(float));
    a = aBuf.Get<float>(); b = bBuf.Get<float>(); part = partBuf.Get<float>();
    if (back) c = cBuf.Get<float>();
    if (t.factor) f_ = fBuf.Get<float>();
    if (t.shift && !back) h = hBuf.Get<float>();
    if (t.factor && back) df_ = dfBuf.Get<float>();
    if (t.shift && back) ds_ = dsBuf.Get<float>();
    one = oneBuf.Get<float>(); two = twoBuf.Get<float>(); three = threeBuf.Get<float>();
    one8 = oneWide.Get<float>(); two8 = twoWide.Get<float>(); three8 = threeWide.Get<float>();
  }

  __aicore__ inline void Process() {
    int64_t core = GetBlockIdx(), cores = GetBlockNum();
    int32_t per = t.tiles / t.groups, from = t.tiles * core / cores, to = t.tiles * (core + 1) / cores;
    if (from >= to) return;
    Duplicate(one, 0.0f, Up(t.tile, 8));
    Duplicate(two, 0.0f, Up(t.tile, 8));
    Duplicate(three, 0.0f, Up(t.tile, 8));
    group = -1;
    for (int32_t i = from; i < to; i++) {
      if (i / per != group) {
        Leave();
        Enter(i / per);
      }
      row = group * t.group_rows + i % per * t.tile;
      rows = Least(t.tile, (group + 1) * t.group_rows - row);
      if (t.chunks > 1) Long(); else if (back) ShortBackward(); else ShortForward();
    }
    Leave();
  }

 private:
  __aicore__ inline void Columns(int32_t column, int32_t width) {  // factor and shift of these columns
    int64_t at = static_cast<int64_t>(group) * t.width + column;
    if (t.factor) {
      Fetch(pipe, f_, factors[at], width);
      if (t.plus != 0) Adds(f_, f_, t.plus, Up(width, 8));
    }
    if (t.shift && !back) Fetch(pipe, h, shifts[at], width);
  }
  __aicore__ inline void Enter(int32_t g) {
    group = g;
    if (t.chunks > 1) return;
    Columns(0, t.width);
    if (t.factor && back) Duplicate(df_, 0.0f, t.pitch);
    if (t.shift && back) Duplicate(ds_, 0.0f, t.pitch);
  }
  __aicore__ inline void Leave() {  // the sums of a core over one group go to their own slot
    if (!back || group < 0 || t.chunks > 1) return;
    int64_t at = static_cast<int64_t>(GetBlockIdx() + group) * t.width;
    if (t.factor) Flush(pipe, dfs[at], df_, t.width);
    if (t.shift) Flush(pipe, dss[at], ds_, t.width);
  }
  __aicore__ inline int64_t Offset(int32_t column) { return static_cast<int64_t>(row) * t.width + column; }
  template <class Q> __aicore__ inline void Take(Q& queue, GlobalTensor<T>& from, LocalTensor<float> to,
                                                 int32_t column, int32_t width) {
    CopyIn(queue, from[Offset(column)], rows, width, t.width);
    LocalTensor<T> x = queue.template DeQue<T>();
    Load(to, x, rows * Up(width, GRAIN));
    queue.FreeTensor(x);
  }
  template <class Q> __aicore__ inline void Give(Q& queue, GlobalTensor<T>& to, LocalTensor<float> from,
                                                 int32_t column, int32_t width) {
    LocalTensor<T> y = queue.template AllocTensor<T>();
    Store(y, from, rows * Up(width, GRAIN));
    queue.EnQue(y);
    CopyOut(queue, to[Offset(column)], rows, width, t.width);
  }
  // x (+ residual, rounded as the stored sum is) into a
  __aicore__ inline void Input(int32_t column, int32_t width, bool store) {
    Take(xIn, xs, a, column, width);
    if (!t.residual || back) return;
    int32_t n = rows * Up(width, GRAIN);
    Take(rIn, rs, b, column, width);
    Add(a, a, b, n);
    LocalTensor<T> s = sOut.AllocTensor<T>();
    Store(s, a, n);
    Load(a, s, n);
    if (store) {
      sOut.EnQue(s);
      CopyOut(sOut, sums[Offset(column)], rows, width, t.width);
    } else {
      sOut.FreeTensor(s);
    }
  }
  __aicore__ inline void Sum(LocalTensor<float> to, LocalTensor<float> x, int32_t width) {
    Reduce(to, x, part, rows, Up(width, GRAIN), width);
  }

  __aicore__ inline void Statistics() {  // a becomes x^, one8 its 1 / deviation
    int32_t n = rows * t.pitch;
    if (t.center) {
      Sum(two, Spare(b, a, rows, t.pitch), t.width);
      Muls(two, two, 1.0f / t.width, rows);
      Spread(two8, two, rows);
      ByRow<SUB>(a, a, two8, rows, t.pitch);
    }
    Mul(b, a, a, n);
    Sum(one, b, t.width);
    Inverse(one, two, rows, t.width, t.eps);
    Spread(one8, one, rows);
    ByRow<MUL>(a, a, one8, rows, t.pitch);
  }
  __aicore__ inline void ShortForward() {
    Input(0, t.width, true);
    Statistics();
    if (t.factor) ByColumn<MUL>(a, a, f_, rows, t.pitch, t.width);
    if (t.shift) ByColumn<ADD>(a, a, h, rows, t.pitch, t.width);
    Give(yOut, outs, a, 0, t.width);
  }
  // c = dy * factor, b = c * x^, and the sums over columns
  __aicore__ inline void Weigh(int32_t pitch) {
    if (t.factor && pitch > STRIDED) {
      for (int32_t r = 0; r < rows; r++) MulAddDst(df_, c[r * pitch], a[r * pitch], pitch);
    } else if (t.factor) {
      Mul(b, c, a, rows * pitch);
      Fold(df_, b, rows, pitch);
    }
    if (t.shift) Fold(ds_, Spare(b, c, rows, pitch), rows, pitch);
    if (t.factor) ByColumn<MUL>(c, c, f_, rows, pitch, Least(pitch, t.width));
  }
  // c = (c - x^ mean(c x^) - mean(c)) / deviation, with two8 and three8 the means
  __aicore__ inline void Project(int32_t pitch) {
    ByRow<MUL>(a, a, two8, rows, pitch);
    Sub(c, c, a, rows * pitch);
    if (t.center) ByRow<SUB>(c, c, three8, rows, pitch);
    ByRow<MUL>(c, c, one8, rows, pitch);
  }
  __aicore__ inline void ShortBackward() {
    int32_t n = rows * t.pitch;
    Take(xIn, xs, a, 0, t.width);
    Statistics();
    Take(gIn, gs, c, 0, t.width);
    Weigh(t.pitch);
    Mul(b, c, a, n);
    Sum(two, b, t.width);
    Muls(two, two, 1.0f / t.width, rows);
    Spread(two8, two, rows);
    if (t.center) {
      Sum(three, Spare(b, c, rows, t.pitch), t.width);
      Muls(three, three, 1.0f / t.width, rows);
      Spread(three8, three, rows);
    }
    Project(t.pitch);
    Residual(0, t.width);
    Give(yOut, outs, c, 0, t.width);
  }
  __aicore__ inline void Residual(int32_t column, int32_t width) {  // the gradient that reaches the sum directly
    if (!t.residual) return;
    Take(rIn, rs, b, column, width);
    Add(c, c, b, rows * Up(width, GRAIN));
  }

  // A row in chunks: one pass for the mean, one for the deviation, in the backward one for the means, one to write.
  __aicore__ inline int32_t Chunk(int32_t j) { return Least(t.chunk, t.width - j); }
  __aicore__ inline void Centred(int32_t j, int32_t w, bool store) {
    Input(j, w, store);
    if (t.center) ByRow<SUB>(a, a, three8, 1, Up(w, GRAIN));
  }
  __aicore__ inline void Long() {
    Duplicate(three, 0.0f, 8);
    if (t.center) {
      for (int32_t j = 0; j < t.width; j += t.chunk) {
        int32_t w = Chunk(j);
        Input(j, w, false);
        Sum(two, Spare(b, a, 1, Up(w, GRAIN)), w);
        Add(three, three, two, 1);
      }
      Muls(three, three, 1.0f / t.width, 1);
      Spread(three8, three, 1);
    }
    Duplicate(one, 0.0f, 8);
    for (int32_t j = 0; j < t.width; j += t.chunk) {
      int32_t w = Chunk(j);
      Centred(j, w, false);
      Mul(b, a, a, Up(w, GRAIN));
      Sum(two, b, w);
      Add(one, one, two, 1);
    }
    Inverse(one, two, 1, t.width, t.eps);
    Spread(one8, one, 1);
    if (back) LongBackward(); else LongForward();
  }
  __aicore__ inline void LongForward() {
    for (int32_t j = 0; j < t.width; j += t.chunk) {
      int32_t w = Chunk(j);
      int32_t pitch = Up(w, GRAIN);
      Centred(j, w, true);
      ByRow<MUL>(a, a, one8, 1, pitch);
      Columns(j, w);
      if (t.factor) Mul(a, a, f_, pitch);
      if (t.shift) Add(a, a, h, pitch);
      Give(yOut, outs, a, j, w);
    }
  }
  __aicore__ inline void LongBackward() {
    LocalTensor<float> mean = meanOf();
    Duplicate(mean, 0.0f, 16);
    for (int32_t j = 0; j < t.width; j += t.chunk) {
      int32_t w = Chunk(j);
      int32_t pitch = Up(w, GRAIN);
      Given(j, w);
      if (t.factor) Mul(c, c, f_, pitch);
      Mul(b, c, a, pitch);
      Sum(two, b, w);
      Add(mean, mean, two, 1);
      if (!t.center) continue;
      Sum(two, Spare(b, c, 1, pitch), w);
      Add(mean[8], mean[8], two, 1);
    }
    Muls(mean, mean, 1.0f / t.width, 16);
    Spread(two8, mean, 1);
    for (int32_t j = 0; j < t.width; j += t.chunk) {
      int32_t w = Chunk(j);
      int32_t pitch = Up(w, GRAIN);
      Given(j, w);
      if (t.factor) Duplicate(df_, 0.0f, pitch);
      if (t.shift) Duplicate(ds_, 0.0f, pitch);
      Weigh(pitch);
      SetAtomicAdd<float>();
      int64_t at = static_cast<int64_t>(GetBlockIdx() + group) * t.width + j;
      if (t.factor) Flush(pipe, dfs[at], df_, w);
      if (t.shift) Flush(pipe, dss[at], ds_, w);
      SetAtomicNone();
      ByRow<MUL>(a, a, two8, 1, pitch);
      Sub(c, c, a, pitch);
      if (t.center) {
        Spread(one8, mean[8], 1);
        ByRow<SUB>(c, c, one8, 1, pitch);
        Spread(one8, one, 1);
      }
      ByRow<MUL>(c, c, one8, 1, pitch);
      Residual(j, w);
      Give(yOut, outs, c, j, w);
    }
  }
  __aicore__ inline LocalTensor<float> meanOf() { return partBuf.Get<float>()[96]; }  // a chunk's parts end before it
  __aicore__ inline void Given(int32_t j, int32_t w) {  // x^ in a, dy in c
    Centred(j, w, false);
    ByRow<MUL>(a, a, one8, 1, Up(w, GRAIN));
    Take(gIn, gs, c, j, w);
    Columns(j, w);
  }

  NormTiling t;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> xIn, rIn, gIn;
  TQue<TPosition::VECOUT, 1> yOut, sOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf, cBuf, fBuf, hBuf, dfBuf, dsBuf, partBuf;
  TBuf<TPosition::VECCALC> oneBuf, twoBuf, threeBuf, oneWide, twoWide, threeWide;
  GlobalTensor<T> xs, rs, gs, outs, sums;
  GlobalTensor<float> factors, shifts, dfs, dss;
  LocalTensor<float> a, b, c, f_, h, df_, ds_, one, two, three, one8, two8, three8, part;
  bool back;
  int32_t group, row, rows;
};

extern "C" __global__ __aicore__ void norm_forward(GM_ADDR x, GM_ADDR residual, GM_ADDR factor, GM_ADDR shift,
                                                   GM_ADDR y, GM_ADDR sum, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Norm k;
  k.Init(x, residual, factor, shift, nullptr, y, sum, nullptr, nullptr, tiling, false);
  k.Process();
}

extern "C" __global__ __aicore__ void norm_backward(GM_ADDR x, GM_ADDR dsum, GM_ADDR factor, GM_ADDR dy, GM_ADDR dx,
                                                    GM_ADDR dfactor, GM_ADDR dshift, GM_ADDR workspace,
                                                    GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Norm k;
  k.Init(x, dsum, factor, nullptr, dy, dx, nullptr, dfactor, dshift, tiling, true);
  k.Process();
}
