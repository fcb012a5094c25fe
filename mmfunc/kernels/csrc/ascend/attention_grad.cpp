// Flash attention, backward: one item is a tile of keys of one key head, its steps are the tiles of queries of every
// query head that shares it. Scores are recomputed; p = exp(s scale - lse) and ds = p (dp - delta) scale, with
// delta = sum(do o) from attention_delta. Gradients are float: those of keys and values belong to one item, those of
// queries are added atomically by all, so that their last bits depend on the order of the cores.
#include "attention.h"

constexpr int32_t SOFT = 32;  // rows of a vector instruction

class Backward {
 public:
  __aicore__ inline void Init(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR dout, GM_ADDR lse, GM_ADDR delta, GM_ADDR codes,
                              GM_ADDR qseg, GM_ADDR kseg, GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR spaces,
                              GM_ADDR tiling) {
    ReadTiling(t, tiling);
    qs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
    ks.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
    vs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
    gs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dout));
    lses.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse));
    deltas.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(delta));
    dqs.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dq));
    dks.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dk));
    dvs.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dv));
    table.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(codes));
    group = ASCEND_IS_AIC ? GetBlockIdx() : GetBlockIdx() / GetTaskRation();
    tile = QUERIES * t.step;
    auto* space = reinterpret_cast<__gm__ T*>(spaces) + group * 8 * static_cast<int64_t>(tile);
    // scores, dp, p, ds: two steps of each
    for (int32_t i = 0; i < 4; i++) work[i].SetGlobalBuffer(space + i * 2 * tile, 2 * tile);
    if (ASCEND_IS_AIC) {
      int32_t wide = QUERIES * t.pitch;
      pipe.InitBuffer(kIn, 1, wide * sizeof(T));
      pipe.InitBuffer(vIn, 1, wide * sizeof(T));
      pipe.InitBuffer(qIn, 2, wide * sizeof(T));
      pipe.InitBuffer(gIn, 2, wide * sizeof(T));
      pipe.InitBuffer(pIn, 2, tile * sizeof(T));
      pipe.InitBuffer(dIn, 2, tile * sizeof(T));
      cube.Init(pipe);
      return;
    }
    pipe.InitBuffer(sIn, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(eIn, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(pOut, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(dOut, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(aBuf, SOFT * t.step * sizeof(float));
    pipe.InitBuffer(bBuf, SOFT * t.step * sizeof(float));
    pipe.InitBuffer(lseIn, 2, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(deltaIn, 2, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(lseWide, QUERIES / 2 * 8 * sizeof(float));
    pipe.InitBuffer(deltaWide, QUERIES / 2 * 8 * sizeof(float));
    mask.Init(pipe, t, qseg, kseg);
    a = aBuf.Get<float>(); b = bBuf.Get<float>(); lse8 = lseWide.Get<float>(); delta8 = deltaWide.Get<float>();
  }

  __aicore__ inline void Process() {
    for (int64_t i = group; i < t.items; i += GetBlockNum()) {
      key = i % t.Steps() * t.step;
      kv = i / t.Steps() % t.groups;
      batch = i / t.Steps() / t.groups;
      keys = Least(t.step, t.keys - key);
      if (ASCEND_IS_AIC) Multiply(); else Soften();
    }
  }

 private:
  // steps count tiles of queries, head by head
  __aicore__ inline int32_t Last() { return t.heads / t.groups * t.Tiles(); }
  __aicore__ inline int32_t Next(int32_t i) {
    while (i < Last()) {
      int64_t row = static_cast<int64_t>(batch) * t.Tiles() + i % t.Tiles();
      code = table.GetValue(row * t.Steps() + key / t.step);
      if (code != SKIP) break;
      i++;
    }
    return i;
  }
  __aicore__ inline int32_t Head(int32_t i) { return kv * (t.heads / t.groups) + i / t.Tiles(); }
  __aicore__ inline int32_t Query(int32_t i) { return i % t.Tiles() * QUERIES; }
  __aicore__ inline int32_t Count(int32_t i) { return Least(QUERIES, t.queries - Query(i)); }
  __aicore__ inline int64_t Queries(int32_t i) {
    return ((static_cast<int64_t>(batch) * t.queries + Query(i)) * t.heads + Head(i)) * t.width;
  }
  __aicore__ inline int64_t Keys() { return ((static_cast<int64_t>(batch) * t.keys + key) * t.groups + kv) * t.width; }

  // ---- cube core ----
  __aicore__ inline void Multiply() {
    int32_t i = Next(0), n = 0;
    if (i >= Last()) return;
    int32_t row = t.groups * t.width;
    Fractals k = Bring(kIn, ks[Keys()], keys, t.width, row), v = Bring(vIn, vs[Keys()], keys, t.width, row);
    Scores(k, v, i, 0);
    for (; i < Last(); n++) {
      int32_t next = Next(i + 1);
      if (next < Last()) Scores(k, v, next, n + 1);
      CrossCoreWaitFlag(WEIGHTS);
      Gradients(k, i, n);
      i = next;
    }
    kIn.FreeTensor(k.data);
    vIn.FreeTensor(v.data);
  }
  __aicore__ inline void Scores(Fractals k, Fractals v, int32_t i, int32_t n) {
    int32_t o = n % 2 * tile, columns = Up(keys, 16);
    q[n % 2] = Bring(qIn, qs[Queries(i)], Count(i), t.width, t.heads * t.width);
    g[n % 2] = Bring(gIn, gs[Queries(i)], Count(i), t.width, t.heads * t.width);
    cube.Product<false, true>(work[0][o], t.step, q[n % 2], k, Count(i), columns, t.width);
    cube.Product<false, true>(work[1][o], t.step, g[n % 2], v, Count(i), columns, t.width);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES);
  }
  __aicore__ inline void Gradients(Fractals k, int32_t i, int32_t n) {
    int32_t o = n % 2 * tile, columns = Up(keys, 16), row = t.groups * t.width;
    Fractals p = Bring(pIn, work[2][o], Count(i), columns, t.step);
    Fractals d = Bring(dIn, work[3][o], Count(i), columns, t.step);
    SetAtomicAdd<float>();
    cube.Product<true, false>(dvs[Keys()], row, p, g[n % 2], keys, t.width, Count(i));
    cube.Product<true, false>(dks[Keys()], row, d, q[n % 2], keys, t.width, Count(i));
    cube.Product<false, false>(dqs[Queries(i)], t.heads * t.width, d, k, Count(i), t.width, keys);
    SetAtomicNone();
    pIn.FreeTensor(p.data);
    dIn.FreeTensor(d.data);
    qIn.FreeTensor(q[n % 2].data);
    gIn.FreeTensor(g[n % 2].data);
  }

  // ---- vector cores ----
  __aicore__ inline void Soften() {
    first = GetSubBlockIdx() * (QUERIES / 2);
    mask.Columns(batch, key);
    int32_t n = 0;
    for (int32_t i = Next(0); i < Last(); i = Next(i + 1), n++) {
      int32_t rows = Count(i) - first < 0 ? 0 : Least(QUERIES / 2, Count(i) - first);
      if (code == MASKED) mask.Rows(batch, Query(i) + first);
      if (rows > 0) Statistics(i, rows);
      CrossCoreWaitFlag(SCORES);
      for (int32_t r = 0; r < rows; r += SOFT) Softmax(n, r, Least(SOFT, rows - r));
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS);
    }
  }
  template <class Q> __aicore__ inline void Statistic(Q& queue, GlobalTensor<float> from, LocalTensor<float> to,
                                                      int32_t rows) {
    LocalTensor<float> x = queue.template AllocTensor<float>();
    DataCopyExtParams copy;
    copy.blockLen = rows * sizeof(float);
    DataCopyPadExtParams<float> pad;
    pad.isPad = true; pad.rightPadding = Up(rows, 8) - rows;
    DataCopyPad(x, from, copy, pad);
    queue.EnQue(x);
    x = queue.template DeQue<float>();
    Spread(to, x, rows);
    queue.FreeTensor(x);
  }
  __aicore__ inline void Statistics(int32_t i, int32_t rows) {
    int64_t at = (static_cast<int64_t>(batch) * t.heads + Head(i)) * t.queries + Query(i) + first;
    Statistic(lseIn, lses[at], lse8, rows);
    Statistic(deltaIn, deltas[at], delta8, rows);
  }
  __aicore__ inline void Softmax(int32_t n, int32_t r, int32_t high) {
    int32_t pitch = Up(keys, 16), size = high * pitch, place = n % 2 * tile + (first + r) * t.step;
    CopyIn(sIn, work[0][place], high, pitch, t.step);
    CopyIn(eIn, work[1][place], high, pitch, t.step);
    LocalTensor<T> s = sIn.DeQue<T>();
    Load(a, s, size);
    sIn.FreeTensor(s);
    if (code == MASKED) mask.Add(a, b, r, high, pitch);
    Muls(a, a, t.scale, size);
    ByRow<SUB>(a, a, lse8[r * 8], high, pitch);
    Exp(a, a, size);
    LocalTensor<T> p = pOut.AllocTensor<T>();
    Store(p, a, size);
    pOut.EnQue(p);
    CopyOut(pOut, work[2][place], high, pitch, t.step);
    LocalTensor<T> e = eIn.DeQue<T>();
    Load(b, e, size);
    eIn.FreeTensor(e);
    ByRow<SUB>(b, b, delta8[r * 8], high, pitch);
    Mul(b, b, a, size);
    Muls(b, b, t.scale, size);
    LocalTensor<T> d = dOut.AllocTensor<T>();
    Store(d, b, size);
    dOut.EnQue(d);
    CopyOut(dOut, work[3][place], high, pitch, t.step);
  }

  AttentionTiling t;
  TPipe pipe;
  Cube cube;
  Mask mask;
  TQue<TPosition::A1, 1> qIn, gIn, pIn, dIn;
  TQue<TPosition::B1, 1> kIn, vIn;
  TQue<TPosition::VECIN, 1> sIn, eIn, lseIn, deltaIn;
  TQue<TPosition::VECOUT, 1> pOut, dOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf, lseWide, deltaWide;
  GlobalTensor<T> qs, ks, vs, gs, work[4];
  GlobalTensor<float> lses, deltas, dqs, dks, dvs;
  GlobalTensor<uint8_t> table;
  LocalTensor<float> a, b, lse8, delta8;
  Fractals q[2], g[2];
  int64_t group;
  int32_t key, kv, batch, keys, first, tile;
  uint8_t code;
};

extern "C" __global__ __aicore__ void attention_backward(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR dout, GM_ADDR lse,
                                                         GM_ADDR delta, GM_ADDR codes, GM_ADDR qseg, GM_ADDR kseg,
                                                         GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR spaces,
                                                         GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  Backward b;
  b.Init(q, k, v, dout, lse, delta, codes, qseg, kseg, dq, dk, dv, spaces, tiling);
  b.Process();
}

// delta [B, H, S] = sum(do o) over the width, a tile of queries of one head at a time.
class Delta {
 public:
  __aicore__ inline void Init(GM_ADDR o, GM_ADDR dout, GM_ADDR delta, GM_ADDR tiling) {
    ReadTiling(t, tiling);
    os.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o));
    gs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dout));
    deltas.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(delta));
    high = t.pitch <= 128 ? 64 : 32;
    int32_t n = high * t.pitch;
    pipe.InitBuffer(oIn, 2, n * sizeof(T));
    pipe.InitBuffer(gIn, 2, n * sizeof(T));
    pipe.InitBuffer(dOut, 2, high * sizeof(float));
    pipe.InitBuffer(aBuf, n * sizeof(float));
    pipe.InitBuffer(bBuf, n * sizeof(float));
  }
  __aicore__ inline void Process() {
    int32_t tiles = (t.queries + high - 1) / high;
    int64_t all = static_cast<int64_t>(t.batch) * t.heads * tiles;
    LocalTensor<float> a = aBuf.Get<float>(), b = bBuf.Get<float>();
    for (int64_t i = GetBlockIdx(); i < all; i += GetBlockNum()) {
      int32_t query = i % tiles * high, rows = Least(high, t.queries - query), n = rows * t.pitch;
      int64_t head = i / tiles % t.heads, batch = i / tiles / t.heads;
      int64_t at = ((batch * t.queries + query) * t.heads + head) * t.width;
      CopyIn(oIn, os[at], rows, t.width, t.heads * t.width);
      CopyIn(gIn, gs[at], rows, t.width, t.heads * t.width);
      LocalTensor<T> o = oIn.DeQue<T>(), g = gIn.DeQue<T>();
      Load(a, o, n);
      Load(b, g, n);
      oIn.FreeTensor(o);
      gIn.FreeTensor(g);
      Mul(a, a, b, n);
      LocalTensor<float> d = dOut.AllocTensor<float>();
      Reduce(d, a, b, rows, t.pitch, t.width);
      dOut.EnQue(d);
      d = dOut.DeQue<float>();
      DataCopyExtParams copy;
      copy.blockLen = rows * sizeof(float);
      DataCopyPad(deltas[(batch * t.heads + head) * t.queries + query], d, copy);
      dOut.FreeTensor(d);
    }
  }

 private:
  AttentionTiling t;
  int32_t high;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> oIn, gIn;
  TQue<TPosition::VECOUT, 1> dOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf;
  GlobalTensor<T> os, gs;
  GlobalTensor<float> deltas;
};

extern "C" __global__ __aicore__ void attention_delta(GM_ADDR o, GM_ADDR dout, GM_ADDR delta, GM_ADDR workspace,
                                                      GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Delta d;
  d.Init(o, dout, delta, tiling);
  d.Process();
}
