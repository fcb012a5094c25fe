// Flash attention (Dao 2023), forward: one item is a tile of queries of one head, its steps are tiles of keys.
//
// The cube core runs two steps ahead with the scores and the vector cores add the values two steps late, so that
// neither waits for what the other has just begun.
#include "attention.h"

constexpr int32_t SOFT = 32, LAST = 16, SCRATCH = 128;  // rows of scores and of outputs, columns of scratch
constexpr int32_t DEPTH = 3;  // steps that a tile stays in the workspace

class Forward {
 public:
  __aicore__ inline void Init(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR codes, GM_ADDR qseg, GM_ADDR kseg, GM_ADDR o,
                              GM_ADDR lse, GM_ADDR scores, GM_ADDR weights, GM_ADDR values, GM_ADDR tiling) {
    ReadTiling(t, tiling);
    qs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
    ks.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
    vs.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
    os.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(o));
    table.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(codes));
    lses.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse));
    group = ASCEND_IS_AIC ? GetBlockIdx() : GetBlockIdx() / GetTaskRation();
    int64_t tile = static_cast<int64_t>(QUERIES) * t.step, wide = static_cast<int64_t>(QUERIES) * t.pitch;
    ss.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(scores) + group * DEPTH * tile, DEPTH * tile);
    ps.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(weights) + group * DEPTH * tile, DEPTH * tile);
    zs.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(values) + group * DEPTH * wide, DEPTH * wide);
    if (ASCEND_IS_AIC) {
      pipe.InitBuffer(qIn, 1, wide * sizeof(T));
      pipe.InitBuffer(kIn, 2, t.step * t.pitch * sizeof(T));
      pipe.InitBuffer(vIn, 2, t.step * t.pitch * sizeof(T));
      pipe.InitBuffer(pIn, 2, tile * sizeof(T));
      cube.Init(pipe);
      return;
    }
    pipe.InitBuffer(sIn, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(pOut, 2, SOFT * t.step * sizeof(T));
    pipe.InitBuffer(zIn, 2, Fold() * t.pitch * sizeof(float));
    pipe.InitBuffer(oOut, 1, LAST * t.pitch * sizeof(T));
    pipe.InitBuffer(aBuf, SOFT * t.step * sizeof(float));
    pipe.InitBuffer(bBuf, SOFT * SCRATCH * sizeof(float));
    pipe.InitBuffer(accBuf, QUERIES / 2 * t.pitch * sizeof(float));
    pipe.InitBuffer(mBuf, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(lBuf, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(nBuf, QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(alphaBuf, DEPTH * QUERIES / 2 * sizeof(float));
    pipe.InitBuffer(wideBuf, QUERIES / 2 * 8 * sizeof(float));
    pipe.InitBuffer(scaleBuf, 8 * sizeof(float));
    mask.Init(pipe, t, qseg, kseg);
    a = aBuf.Get<float>(); b = bBuf.Get<float>(); acc = accBuf.Get<float>();
    m = mBuf.Get<float>(); l = lBuf.Get<float>(); now = nBuf.Get<float>();
    alpha = alphaBuf.Get<float>(); wide8 = wideBuf.Get<float>();
    scale8 = scaleBuf.Get<float>();
    Duplicate(scale8, t.scale, 8);
    Duplicate(now, 0.0f, QUERIES / 2);
    Duplicate(alpha, 0.0f, DEPTH * QUERIES / 2);
  }

  __aicore__ inline void Process() {
    for (int64_t i = group; i < t.items; i += GetBlockNum()) {
      query = i % t.Tiles() * QUERIES;
      head = i / t.Tiles() % t.heads;
      batch = i / t.Tiles() / t.heads;
      queries = Least(QUERIES, t.queries - query);
      if (ASCEND_IS_AIC) Multiply(); else Soften();
    }
  }

 private:
  __aicore__ inline int32_t Next(int32_t j) {  // the first step from j on that is not skipped
    int64_t row = (static_cast<int64_t>(batch) * t.Tiles() + query / QUERIES) * t.Steps();
    while (j < t.Steps() && (code = table.GetValue(row + j)) == SKIP) j++;
    return j;
  }
  __aicore__ inline int64_t Keys(int32_t j) {
    return ((static_cast<int64_t>(batch) * t.keys + j * t.step) * t.groups + head / (t.heads / t.groups)) * t.width;
  }
  __aicore__ inline int64_t Queries() {
    return ((static_cast<int64_t>(batch) * t.queries + query) * t.heads + head) * t.width;
  }

  // ---- cube core ----
  __aicore__ inline void Multiply() {
    int32_t j = Next(0);
    if (j >= t.Steps()) return;
    Fractals q = Bring(qIn, qs[Queries()], queries, t.width, t.heads * t.width);
    Scores(q, j, 0);
    int32_t next = Next(j + 1);
    if (next < t.Steps()) Scores(q, next, 1);
    for (int32_t n = 0; j < t.Steps(); n++) {
      int32_t after = next < t.Steps() ? Next(next + 1) : next;
      if (after < t.Steps()) Scores(q, after, n + 2);
      Fractals v = Bring(vIn, vs[Keys(j)], Count(j), t.width, t.groups * t.width);  // on its way during the wait
      CrossCoreWaitFlag(WEIGHTS);
      Values(v, j, n);
      j = next;
      next = after;
    }
    qIn.FreeTensor(q.data);
  }
  __aicore__ inline int32_t Count(int32_t j) { return Least(t.step, t.keys - j * t.step); }
  __aicore__ inline void Scores(Fractals q, int32_t j, int32_t n) {
    Fractals k = Bring(kIn, ks[Keys(j)], Count(j), t.width, t.groups * t.width);
    cube.Product<false, true>(ss[n % DEPTH * QUERIES * t.step], t.step, q, k, queries, Up(Count(j), 16), t.width);
    kIn.FreeTensor(k.data);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES);
  }
  __aicore__ inline void Values(Fractals v, int32_t j, int32_t n) {
    Fractals p = Bring(pIn, ps[n % DEPTH * QUERIES * t.step], queries, Up(Count(j), 16), t.step);
    cube.Product<false, false>(zs[n % DEPTH * QUERIES * t.pitch], t.pitch, p, v, queries, t.pitch, Up(Count(j), 16));
    vIn.FreeTensor(v.data);
    pIn.FreeTensor(p.data);
    CrossCoreSetFlag<2, PIPE_FIX>(VALUES);
  }

  // ---- vector cores ----
  __aicore__ inline int32_t Fold() { return t.pitch <= CUBE ? 32 : 16; }  // rows of outputs at a time
  __aicore__ inline int32_t Pitch(int32_t j) { return Up(Least(t.step, t.keys - j * t.step), 16); }
  __aicore__ inline int32_t Place(int32_t n, int32_t r) { return (n % DEPTH * QUERIES + first + r) * t.step; }

  // What the next instructions of the vector unit read is on its way before they wait for it: the scores of step n + 1
  // and the values of step n - 2 are asked for in the middle of step n.
  __aicore__ inline void Soften() {
    first = GetSubBlockIdx() * (QUERIES / 2);
    rows = queries - first < 0 ? 0 : Least(QUERIES / 2, queries - first);
    mask.Rows(batch, query + first);
    Duplicate(m, LOWEST, QUERIES / 2);
    Duplicate(l, 0.0f, QUERIES / 2);
    Duplicate(acc, 0.0f, QUERIES / 2 * t.pitch);
    int32_t n = 0, j = Next(0);
    uint8_t kind = code;
    if (j < t.Steps()) CrossCoreWaitFlag(SCORES);
    if (j < t.Steps()) for (int32_t r = 0; r < rows; r += SOFT) Ask(j, n, r);
    for (; j < t.Steps(); n++) {
      if (kind == MASKED) mask.Columns(batch, j * t.step);
      int32_t next = Next(j + 1);
      if (rows > 0) Softmax(j, n, 0, kind == MASKED);
      if (next < t.Steps()) CrossCoreWaitFlag(SCORES);
      if (next < t.Steps() && rows > 0) Ask(next, n + 1, 0);
      if (n > 1) Expect(n - 2);
      if (rows > SOFT) Softmax(j, n, SOFT, kind == MASKED);
      if (next < t.Steps() && rows > SOFT) Ask(next, n + 1, SOFT);
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS);
      if (n > 1) Accumulate(n - 2);
      j = next;
      kind = code;
    }
    for (int32_t i = n > 1 ? n - 2 : 0; i < n; i++) {
      Expect(i);
      Accumulate(i);
    }
    if (rows > 0) Finish();
  }
  __aicore__ inline void Ask(int32_t j, int32_t n, int32_t r) {
    CopyIn(sIn, ss[Place(n, r)], Least(SOFT, rows - r), Pitch(j), t.step);
  }
  __aicore__ inline void Softmax(int32_t j, int32_t n, int32_t r, bool masked) {
    int32_t high = Least(SOFT, rows - r), pitch = Pitch(j), size = high * pitch;
    LocalTensor<float> best = now[r], scale = alpha[n % DEPTH * (QUERIES / 2) + r];
    LocalTensor<T> s = sIn.DeQue<T>();
    Load(a, s, size);
    sIn.FreeTensor(s);
    int32_t some = SOFT * SCRATCH / t.step;
    if (masked) for (int32_t i = 0; i < high; i += some) mask.Add(a[i * pitch], b, r + i, Least(some, high - i), pitch);
    Best(best, high, pitch);
    Max(best, best, m[r], high);
    Sub(scale, m[r], best, high);
    Muls(scale, scale, t.scale, high);
    Exp(scale, scale, high);
    Adds(m[r], best, 0.0f, high);
    Muls(best, best, -t.scale, high);
    Spread(wide8, best, high);
    for (int32_t c = 0; c < pitch; c += LANES)  // (s - m) scale
      FusedMulAdd(a[c], scale8, wide8, Least(LANES, pitch - c), high, {1, 0, 0, Stride(pitch), 0, 1});
    Exp(a, a, size);
    LocalTensor<T> p = pOut.AllocTensor<T>();
    Store(p, a, size);
    pOut.EnQue(p);
    CopyOut(pOut, ps[Place(n, r)], high, pitch, t.step);
    Reduce(best, a, b, high, pitch, pitch);
    Mul(l[r], l[r], scale, high);
    Add(l[r], l[r], best, high);
  }
  __aicore__ inline void Best(LocalTensor<float> to, int32_t high, int32_t pitch) {  // maxima of the rows of a
    if (pitch <= LANES) {
      Whole<true>(to, a, pitch, high, pitch / 8);
      return;
    }
    int32_t second = Least(LANES, pitch - LANES);
    if (second < LANES) {
      Adds(b, a, 0.0f, high * pitch);
      Reduce<true>(to, b, b, high, pitch, pitch);
      return;
    }
    Max(b, a, a[LANES], LANES, high, {1, 1, 1, 8, Stride(pitch), Stride(pitch)});
    for (int32_t j = 2 * LANES; j < pitch; j += LANES)
      Max(b, b, a[j], Least(LANES, pitch - j), high, {1, 1, 1, 8, 8, Stride(pitch)});
    Whole<true>(to, b, LANES, high, 8);
  }
  __aicore__ inline void Expect(int32_t n) {  // as many values as there are buffers
    CrossCoreWaitFlag(VALUES);
    for (int32_t r = 0; r < rows && r < 2 * Fold(); r += Fold()) Fetched(n, r);
  }
  __aicore__ inline void Fetched(int32_t n, int32_t r) {
    LocalTensor<float> z = zIn.AllocTensor<float>();
    DataCopy(z, zs[(n % DEPTH * QUERIES + first + r) * t.pitch], Least(Fold(), rows - r) * t.pitch);
    zIn.EnQue(z);
  }
  __aicore__ inline void Accumulate(int32_t n) {  // acc = acc * alpha + values
    if (rows == 0) return;
    Spread(wide8, alpha[n % DEPTH * (QUERIES / 2)], rows);
    for (int32_t r = 0; r < rows; r += Fold()) {
      int32_t high = Least(Fold(), rows - r);
      LocalTensor<float> part = acc[r * t.pitch], z = zIn.DeQue<float>();
      uint8_t row = Stride(t.pitch);
      for (int32_t c = 0; c < t.pitch; c += LANES)
        FusedMulAdd(part[c], wide8[r * 8], z[c], Least(LANES, t.pitch - c), high, {1, 0, 1, row, 1, row});
      zIn.FreeTensor(z);
      if (r + 2 * Fold() < rows) Fetched(n, r + 2 * Fold());
    }
  }
  __aicore__ inline void Finish() {  // o = acc / l and lse = m scale + log l; a row that sees nothing is zero
    Maxs(l, l, 1e-30f, QUERIES / 2);
    Ln(now, l, QUERIES / 2);
    Muls(m, m, t.scale, QUERIES / 2);
    Add(now, now, m, QUERIES / 2);
    Flush(pipe, lses[(static_cast<int64_t>(batch) * t.heads + head) * t.queries + query + first], now, rows);
    Spread(wide8, l, rows);
    for (int32_t r = 0; r < rows; r += LAST) {
      int32_t high = Least(LAST, rows - r);
      LocalTensor<float> part = acc[r * t.pitch];
      ByRow<DIV>(part, part, wide8[r * 8], high, t.pitch);
      LocalTensor<T> o = oOut.AllocTensor<T>();
      Store(o, part, high * t.pitch);
      oOut.EnQue(o);
      o = oOut.DeQue<T>();
      DataCopyExtParams copy;
      copy.blockCount = high; copy.blockLen = t.width * sizeof(T); copy.dstStride = (t.heads - 1) * t.width * sizeof(T);
      DataCopyPad(os[Queries() + static_cast<int64_t>(first + r) * t.heads * t.width], o, copy);
      oOut.FreeTensor(o);
    }
  }

  AttentionTiling t;
  TPipe pipe;
  Cube cube;
  Mask mask;
  TQue<TPosition::A1, 1> qIn, pIn;
  TQue<TPosition::B1, 1> kIn, vIn;
  TQue<TPosition::VECIN, 2> sIn, zIn;
  TQue<TPosition::VECOUT, 1> pOut, oOut;
  TBuf<TPosition::VECCALC> aBuf, bBuf, accBuf, mBuf, lBuf, nBuf, alphaBuf, wideBuf, scaleBuf;
  GlobalTensor<T> qs, ks, vs, os, ss, ps;
  GlobalTensor<float> lses, zs;
  GlobalTensor<uint8_t> table;
  LocalTensor<float> a, b, acc, m, l, now, alpha, wide8, scale8;
  int64_t group;
  int32_t query, head, batch, queries, first, rows;
  uint8_t code;
};

extern "C" __global__ __aicore__ void attention_forward(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR codes, GM_ADDR qseg,
                                                        GM_ADDR kseg, GM_ADDR o, GM_ADDR lse, GM_ADDR scores,
                                                        GM_ADDR weights, GM_ADDR values, GM_ADDR workspace,
                                                        GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  Forward f;
  f.Init(q, k, v, codes, qseg, kseg, o, lse, scores, weights, values, tiling);
  f.Process();
}
