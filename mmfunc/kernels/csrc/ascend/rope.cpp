// RMSNorm of each head (optional) and rotary position embedding, forward and backward.
//
// y = n * cos + swap(n) * sin, with n the normed head, swap the partner of each channel, cos and sin [tokens, width]
// float tables with an entry per channel, the sign of the rotation in sin: so one kernel rotates halves and neighbours
// over any axes. Partners are found by address (halves that start on 32 bytes), by shifts within 32-bit words
// (neighbours of b16), or by Gather. A tile is a few tokens with all their heads, or some heads of one token.
#include "rows.h"

enum Swap { HALVES, WORDS, GATHER };
struct RopeTiling {
  int32_t tokens, heads, width, pitch, tile, part, tiles, swap, norm;  // tile counts tokens, part heads
  float eps;
};

class Rope {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR partners, GM_ADDR dy, GM_ADDR y,
                              GM_ADDR dw, GM_ADDR tiling, bool backward) {
    ReadTiling(t, tiling);
    back = backward;
    xs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    dys.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dy));
    ys.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y));
    weights.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(w));
    coses.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(cos));
    sines.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(sin));
    places.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(partners));
    dws.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dw));
    int32_t most = t.tile * t.part, n = most * t.pitch, table = Up(t.width, 8);
    bool project = back && t.norm;
    if (!back || t.norm) pipe.InitBuffer(xIn, 2, n * sizeof(T));
    if (back) pipe.InitBuffer(gIn, 2, n * sizeof(T));
    pipe.InitBuffer(yOut, 2, n * sizeof(T));
    pipe.InitBuffer(cosIn, 2, t.tile * table * sizeof(float));
    pipe.InitBuffer(sinIn, 2, t.tile * table * sizeof(float));
    pipe.InitBuffer(aBuf, n * sizeof(float));
    pipe.InitBuffer(bBuf, n * sizeof(float));
    if (project) pipe.InitBuffer(cBuf, n * sizeof(float));
    pipe.InitBuffer(roundBuf, n * sizeof(T));
    if (t.swap == WORDS) pipe.InitBuffer(wordBuf, 2 * n * sizeof(T));
    if (t.swap == GATHER) pipe.InitBuffer(placeBuf, n * sizeof(float));
    if (t.norm) pipe.InitBuffer(wBuf, t.pitch * sizeof(float));
    if (project) pipe.InitBuffer(dwBuf, t.pitch * sizeof(float));
    pipe.InitBuffer(oneBuf, Up(most, 8) * sizeof(float));
    pipe.InitBuffer(twoBuf, Up(most, 8) * sizeof(float));
    pipe.InitBuffer(oneWide, Up(most, 8) * 8 * sizeof(float));
    pipe.InitBuffer(twoWide, Up(most, 8) * 8 * sizeof(float));
    a = aBuf.Get<float>(); b = bBuf.Get<float>();
    one = oneBuf.Get<float>(); two = twoBuf.Get<float>(); one8 = oneWide.Get<float>(); two8 = twoWide.Get<float>();
    if (project) c = cBuf.Get<float>();
    if (t.norm) w_ = wBuf.Get<float>();
    if (project) dw_ = dwBuf.Get<float>();
  }

  __aicore__ inline void Process() {
    int64_t core = GetBlockIdx(), cores = GetBlockNum();
    if (t.norm) Fetch(pipe, w_, weights, t.width);
    if (t.norm && back) Duplicate(dw_, 0.0f, t.pitch);
    if (t.swap == GATHER) Fetch(pipe, placeBuf.Get<float>(), places, t.tile * t.part * t.pitch);
    Duplicate(one, 0.0f, Up(t.tile * t.part, 8));
    Duplicate(two, 0.0f, Up(t.tile * t.part, 8));
    for (int32_t i = t.tiles * core / cores; i < t.tiles * (core + 1) / cores; i++) {
      int32_t parts = (t.heads + t.part - 1) / t.part;
      token = i / parts * t.tile;
      tokens = Least(t.tile, t.tokens - token);
      head = i % parts * t.part;
      heads = Least(t.part, t.heads - head);
      rows = tokens * heads;
      n = rows * t.pitch;
      if (back) Backward(); else Forward();
    }
    if (t.norm && back) Flush(pipe, dws[core * t.width], dw_, t.width);
  }

 private:
  __aicore__ inline int64_t Offset() { return (static_cast<int64_t>(token) * t.heads + head) * t.width; }
  template <class Q> __aicore__ inline void Table(Q& queue, GlobalTensor<float>& from) {
    LocalTensor<float> x = queue.template AllocTensor<float>();
    DataCopyExtParams copy;
    copy.blockCount = tokens; copy.blockLen = t.width * sizeof(float);
    DataCopyPadExtParams<float> pad;
    pad.isPad = true; pad.rightPadding = Up(t.width, 8) - t.width;
    DataCopyPad(x, from[static_cast<int64_t>(token) * t.width], copy, pad);
    queue.EnQue(x);
  }
  // to = x * table, one row of the table for all heads of a token
  __aicore__ inline void ByToken(LocalTensor<float> to, LocalTensor<float> x, LocalTensor<float> table, int32_t width) {
    for (int32_t i = 0; i < tokens; i++) {
      int32_t o = i * heads * t.pitch;
      ByColumn<MUL>(to[o], x[o], table[i * Up(t.width, 8)], heads, t.pitch, width);
    }
  }
  // x16 holds the values of x in the type of global memory; x becomes x * cos (+ or -) swap(x) * sin, b is scratch
  __aicore__ inline void Rotate(LocalTensor<float> x, LocalTensor<T> x16) {
    Table(cosIn, coses);
    Table(sinIn, sines);
    LocalTensor<float> cos = cosIn.DeQue<float>(), sin = sinIn.DeQue<float>();
    if (t.swap == HALVES) {
      int32_t half = t.width / 2;
      ByToken(b, x[half], sin, half);
      ByToken(b[half], x, sin[half], half);
    } else {
      Partners(x, x16);
      ByToken(b, b, sin, t.width);
    }
    ByToken(x, x, cos, t.width);
    if (back) Sub(x, x, b, n); else Add(x, x, b, n);
    cosIn.FreeTensor(cos);
    sinIn.FreeTensor(sin);
  }
  __aicore__ inline void Partners(LocalTensor<float> x, LocalTensor<T> x16) {  // b = swap(x)
    if (t.swap == GATHER) {
      Gather(b, x, placeBuf.Get<uint32_t>(), 0, n);
      return;
    }
    LocalTensor<uint32_t> words = x16.template ReinterpretCast<uint32_t>(), high = wordBuf.Get<uint32_t>()[0];
    LocalTensor<uint32_t> low = high[n / 2];
    ShiftLeft(high, words, static_cast<uint32_t>(16), n / 2);
    ShiftRight(low, words, static_cast<uint32_t>(16), n / 2);
    LocalTensor<uint16_t> h16 = high.ReinterpretCast<uint16_t>();
    Or(h16, h16, low.ReinterpretCast<uint16_t>(), n);
    Load(b, high.ReinterpretCast<T>(), n);
  }
  __aicore__ inline void Normalise(LocalTensor<float> x) {  // x becomes x^, one8 its 1 / root mean square
    Mul(b, x, x, n);
    Reduce(one, b, b, rows, t.pitch, t.width);
    Inverse(one, two, rows, t.width, t.eps);
    Spread(one8, one, rows);
    ByRow<MUL>(x, x, one8, rows, t.pitch);
  }

  __aicore__ inline void Forward() {
    CopyIn(xIn, xs[Offset()], rows, t.width, t.width);
    LocalTensor<T> x = xIn.DeQue<T>();
    Load(a, x, n);
    if (t.norm) {
      Normalise(a);
      ByColumn<MUL>(a, a, w_, rows, t.pitch, t.width);
      Store(roundBuf.Get<T>(), a, n);
      Load(a, roundBuf.Get<T>(), n);
      Rotate(a, roundBuf.Get<T>());
    } else {
      Rotate(a, x);
    }
    xIn.FreeTensor(x);
    Give(a);
  }
  __aicore__ inline void Give(LocalTensor<float> from) {
    LocalTensor<T> y = yOut.AllocTensor<T>();
    Store(y, from, n);
    yOut.EnQue(y);
    CopyOut(yOut, ys[Offset()], rows, t.width, t.width);
  }
  __aicore__ inline void Backward() {
    CopyIn(gIn, dys[Offset()], rows, t.width, t.width);
    LocalTensor<T> g = gIn.DeQue<T>();
    LocalTensor<float> d = t.norm ? c : a;
    Load(d, g, n);
    Rotate(d, g);
    gIn.FreeTensor(g);
    if (t.norm) Project();
    Give(d);
  }
  // c = gradient of the norm's output: to that of its input
  __aicore__ inline void Project() {
    CopyIn(xIn, xs[Offset()], rows, t.width, t.width);
    LocalTensor<T> x = xIn.DeQue<T>();
    Load(a, x, n);
    xIn.FreeTensor(x);
    Normalise(a);
    Mul(b, c, a, n);
    Fold(dw_, b, rows, t.pitch);
    ByColumn<MUL>(c, c, w_, rows, t.pitch, t.width);
    Mul(b, c, a, n);
    Reduce(two, b, b, rows, t.pitch, t.width);
    Muls(two, two, 1.0f / t.width, rows);
    Spread(two8, two, rows);
    ByRow<MUL>(a, a, two8, rows, t.pitch);
    Sub(c, c, a, n);
    ByRow<MUL>(c, c, one8, rows, t.pitch);
  }

  RopeTiling t;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> xIn, gIn, cosIn, sinIn;
  TQue<TPosition::VECOUT, 1> yOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf, cBuf, roundBuf, wordBuf, placeBuf, wBuf, dwBuf, oneBuf, twoBuf, oneWide, twoWide;
  GlobalTensor<T> xs, dys, ys;
  GlobalTensor<float> weights, coses, sines, places, dws;
  LocalTensor<float> a, b, c, w_, dw_, one, two, one8, two8;
  bool back;
  int32_t token, tokens, head, heads, rows, n;
};

extern "C" __global__ __aicore__ void rope_forward(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR partners,
                                                   GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Rope k;
  k.Init(x, w, cos, sin, partners, nullptr, y, nullptr, tiling, false);
  k.Process();
}

extern "C" __global__ __aicore__ void rope_backward(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR partners,
                                                    GM_ADDR dy, GM_ADDR dx, GM_ADDR dw, GM_ADDR workspace,
                                                    GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Rope k;
  k.Init(x, w, cos, sin, partners, dy, dx, dw, tiling, true);
  k.Process();
}
