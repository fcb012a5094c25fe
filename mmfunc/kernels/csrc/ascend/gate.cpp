// SwiGLU and GELU gates: act(g) * u, or act(g) alone, forward and backward, over flat tensors.
//
// Every activation here is g * sigmoid(g * (alpha + beta * g^2)): SiLU (1, 0), the sigmoid GELU (1.702, 0), and the
// tanh GELU, whose (1 + tanh(z)) / 2 is sigmoid(2 z).
#include "rows.h"

struct GateTiling { int32_t tile, tiles, last, up; float alpha, beta; };  // last: elements of the last tile

class Gate {
 public:
  __aicore__ inline void Init(GM_ADDR g, GM_ADDR u, GM_ADDR dy, GM_ADDR y, GM_ADDR du, GM_ADDR tiling, bool backward) {
    ReadTiling(t, tiling);
    back = backward;
    gs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(g));
    us.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(u));
    dys.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dy));
    ys.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y));
    dus.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(du));
    pipe.InitBuffer(gIn, 2, t.tile * sizeof(T));
    pipe.InitBuffer(yOut, 2, t.tile * sizeof(T));
    if (t.up) pipe.InitBuffer(uIn, 2, t.tile * sizeof(T));
    if (back) pipe.InitBuffer(dIn, 2, t.tile * sizeof(T));
    if (back && t.up) pipe.InitBuffer(uOut, 2, t.tile * sizeof(T));
    pipe.InitBuffer(aBuf, t.tile * sizeof(float));
    pipe.InitBuffer(bBuf, t.tile * sizeof(float));
    pipe.InitBuffer(cBuf, t.tile * sizeof(float));
    if (back) pipe.InitBuffer(dBuf, t.tile * sizeof(float));
    if (back) pipe.InitBuffer(oneBuf, t.tile * sizeof(float));
    a = aBuf.Get<float>(); b = bBuf.Get<float>(); c = cBuf.Get<float>();
    if (back) d = dBuf.Get<float>();
    if (back) ones = oneBuf.Get<float>();
  }
  __aicore__ inline void Process() {
    int64_t core = GetBlockIdx(), cores = GetBlockNum();
    if (back) Duplicate(ones, 1.0f, t.tile);
    for (int64_t i = t.tiles * core / cores; i < t.tiles * (core + 1) / cores; i++) {
      at = i * t.tile;
      width = i == t.tiles - 1 ? t.last : t.tile;
      n = Up(width, GRAIN);
      if (back) Backward(); else Forward();
    }
  }

 private:
  template <class Q> __aicore__ inline void Take(Q& queue, GlobalTensor<T>& from, LocalTensor<float> to) {
    CopyIn(queue, from[at], 1, width, width);
    LocalTensor<T> x = queue.template DeQue<T>();
    Load(to, x, n);
    queue.FreeTensor(x);
  }
  template <class Q> __aicore__ inline void Give(Q& queue, GlobalTensor<T>& to, LocalTensor<float> from) {
    LocalTensor<T> y = queue.template AllocTensor<T>();
    Store(y, from, n);
    queue.EnQue(y);
    CopyOut(queue, to[at], 1, width, width);
  }
  __aicore__ inline void Denominator() {  // b = 1 + exp(-g * (alpha + beta * g^2)) for g in a
    if (t.beta != 0) {
      Mul(b, a, a, n);
      Muls(b, b, -t.beta, n);
      Adds(b, b, -t.alpha, n);
      Mul(b, b, a, n);
    } else {
      Muls(b, a, -t.alpha, n);
    }
    Exp(b, b, n);
    Adds(b, b, 1.0f, n);
  }
  __aicore__ inline void Forward() {
    Take(gIn, gs, a);
    Denominator();
    Div(a, a, b, n);
    if (t.up) {
      Take(uIn, us, c);
      Mul(a, a, c, n);
    }
    Give(yOut, ys, a);
  }
  // with s the sigmoid: d act = s + g s (1 - s) (alpha + 3 beta g^2)
  __aicore__ inline void Backward() {
    Take(gIn, gs, a);
    Take(dIn, dys, d);
    Denominator();
    Div(b, ones, b, n);
    if (t.up) {
      Mul(c, a, b, n);
      Mul(c, c, d, n);
      Give(uOut, dus, c);
    }
    Sub(c, ones, b, n);
    Mul(c, c, b, n);
    Mul(c, c, a, n);
    if (t.beta != 0) {
      Mul(a, a, a, n);
      Muls(a, a, 3 * t.beta, n);
      Adds(a, a, t.alpha, n);
      Mul(c, c, a, n);
    } else if (t.alpha != 1) {
      Muls(c, c, t.alpha, n);
    }
    Add(c, c, b, n);
    Mul(c, c, d, n);
    if (t.up) {
      Take(uIn, us, a);
      Mul(c, c, a, n);
    }
    Give(yOut, ys, c);
  }

  GateTiling t;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> gIn, uIn, dIn;
  TQue<TPosition::VECOUT, 1> yOut, uOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf, cBuf, dBuf, oneBuf;
  GlobalTensor<T> gs, us, dys, ys, dus;
  LocalTensor<float> a, b, c, d, ones;
  bool back;
  int64_t at;
  int32_t width, n;
};

extern "C" __global__ __aicore__ void gate_forward(GM_ADDR g, GM_ADDR u, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Gate k;
  k.Init(g, u, nullptr, y, nullptr, tiling, false);
  k.Process();
}

extern "C" __global__ __aicore__ void gate_backward(GM_ADDR g, GM_ADDR u, GM_ADDR dy, GM_ADDR dg, GM_ADDR du,
                                                    GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Gate k;
  k.Init(g, u, dy, dg, du, tiling, true);
  k.Process();
}
