// Transfers between global memory and UB, and the vector unit, of the emulated Ascend C API.
#pragma once
#include "tensors.h"

namespace AscendC {
enum class RoundMode { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC };
struct DataCopyExtParams { uint16_t blockCount = 1; uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0; };
template <class T> struct DataCopyPadExtParams {
  bool isPad = false; uint8_t leftPadding = 0, rightPadding = 0; T paddingValue = T(0);
};
struct DataCopyParams { uint16_t blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0; };

inline void transfer(int pipe, double bytes, double rows) {
  double rate = std::min(emu::rate::MTE, state.mix ? emu::rate::MTE : state.share);
  emu::instruction(pipe, emu::rate::DMA_START + emu::rate::DMA_BLOCK * (rows - 1) + bytes / rate, bytes,
                   emu::rate::LATENCY);
}

template <class T> void DataCopy(const LocalTensor<T>& d, const GlobalTensor<T>& s, uint32_t n, EMU_AT) {
  state.at = at; d.aligned();
  EMU_CHECK(n && n * sizeof(T) % 32 == 0, "DataCopy of %zu bytes: not a multiple of 32, use DataCopyPad", n * sizeof(T));
  transfer(PIPE_MTE2, n * sizeof(T), 1);
  emu::global(s.data, n * sizeof(T), PIPE_MTE2, false);
  memcpy(d.access(0, n, PIPE_MTE2, true), s.data, n * sizeof(T));
}

template <class T> void write_out(T* to, const T* from, size_t n) {
  if (!me().atomic) { memcpy(to, from, n * sizeof(T)); return; }
  if constexpr (std::is_same<T, float>::value) for (size_t i = 0; i < n; i++) to[i] += from[i];
  else emu::fail("atomic add of a type that is not float");
}

template <class T> void DataCopy(const GlobalTensor<T>& d, const LocalTensor<T>& s, uint32_t n, EMU_AT) {
  state.at = at; s.aligned();
  EMU_CHECK(n && n * sizeof(T) % 32 == 0, "DataCopy of %zu bytes: not a multiple of 32, use DataCopyPad", n * sizeof(T));
  transfer(PIPE_MTE3, n * sizeof(T), 1);
  const T* from = s.access(0, n, PIPE_MTE3, false);
  emu::global(d.data, n * sizeof(T), PIPE_MTE3, true); write_out(d.data, from, n);
}

inline void check(const DataCopyExtParams& e, size_t grain) {
  EMU_CHECK(e.blockCount >= 1 && e.blockCount <= 4095, "DataCopyPad: blockCount %d is not 1 to 4095", e.blockCount);
  EMU_CHECK(e.blockLen >= 1 && e.blockLen <= 2097151, "DataCopyPad: blockLen %u is not 1 to 2097151", e.blockLen);
  EMU_CHECK(e.blockLen % grain == 0, "DataCopyPad: blockLen %u cuts an element", e.blockLen);
}

// Rows of blockLen bytes; srcStride in bytes between rows, dstStride in blocks of 32 bytes.
template <class T> void DataCopyPad(const LocalTensor<T>& d, const GlobalTensor<T>& s, const DataCopyExtParams& e,
                                    const DataCopyPadExtParams<T>& pad, EMU_AT) {
  state.at = at; check(e, sizeof(T)); d.aligned();
  EMU_CHECK(pad.leftPadding * sizeof(T) <= 32 && pad.rightPadding * sizeof(T) <= 32, "DataCopyPad: over 32 bytes of padding");
  uint32_t n = e.blockLen / sizeof(T), left = pad.isPad ? pad.leftPadding : 0, right = pad.isPad ? pad.rightPadding : 0;
  uint64_t row = ((n + left + right) * sizeof(T) + 31) / 32 * 32 + uint64_t(e.dstStride) * 32;
  transfer(PIPE_MTE2, double(e.blockCount) * e.blockLen, e.srcStride || e.dstStride || row != e.blockLen ? e.blockCount : 1);
  for (uint64_t b = 0; b < e.blockCount; b++) {
    auto* from = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(s.data) + b * (e.blockLen + uint64_t(e.srcStride)));
    emu::global(from, e.blockLen, PIPE_MTE2, false);
    T* to = d.access(b * row / sizeof(T), n + left + right, PIPE_MTE2, true);
    std::fill(to, to + left, pad.paddingValue);
    memcpy(to + left, from, e.blockLen);
    std::fill(to + left + n, to + left + n + right, pad.paddingValue);
  }
}
// Rows of blockLen bytes; srcStride in blocks of 32 bytes, dstStride in bytes.
template <class T> void DataCopyPad(const GlobalTensor<T>& d, const LocalTensor<T>& s, const DataCopyExtParams& e, EMU_AT) {
  state.at = at; check(e, sizeof(T)); s.aligned();
  uint32_t n = e.blockLen / sizeof(T); uint64_t row = (e.blockLen + 31) / 32 * 32 + uint64_t(e.srcStride) * 32;
  transfer(PIPE_MTE3, double(e.blockCount) * e.blockLen, e.srcStride || e.dstStride || row != e.blockLen ? e.blockCount : 1);
  for (uint64_t b = 0; b < e.blockCount; b++) {
    auto* to = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(d.data) + b * (e.blockLen + uint64_t(e.dstStride)));
    const T* from = s.access(b * row / sizeof(T), n, PIPE_MTE3, false);
    emu::global(to, e.blockLen, PIPE_MTE3, true); write_out(to, from, n);
  }
}

// ---- vector unit: the first n elements, or a mask of lanes and repeats with strides in blocks of 32 bytes ----
inline void vector(double n, size_t grain, double cost = 1) {
  emu::instruction(PIPE_V, emu::rate::VECTOR_START + std::ceil(n * grain / 256) * cost, n * grain);
}
template <class T> void lanes(uint64_t mask, int repeat) {
  EMU_CHECK(mask >= 1 && mask <= 256 / sizeof(T), "mask %llu is not 1 to %zu", (unsigned long long)mask, 256 / sizeof(T));
  EMU_CHECK(repeat >= 1 && repeat <= 255, "repeat %d is not 1 to 255", repeat);
}
template <class T> constexpr void real() {
  static_assert(std::is_same<T, float>::value || std::is_same<T, half>::value, "the vector unit computes float and half");
}
struct BinaryRepeatParams {
  uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
};

template <class T, class F>
void binary(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t n, double cost, F f) {
  EMU_CHECK(n > 0, "count %d", n); d.aligned(); a.aligned(); b.aligned();
  vector(n, sizeof(T), cost);
  const T *x = a.access(0, n, PIPE_V, false), *y = b.access(0, n, PIPE_V, false);
  T* z = d.access(0, n, PIPE_V, true);
  for (int32_t i = 0; i < n; i++) z[i] = f(x[i], y[i]);
}
template <class T, class F> void binary(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b,
                                        uint64_t mask, int repeat, const BinaryRepeatParams& r, double cost, F f) {
  lanes<T>(mask, repeat); d.aligned(); a.aligned(); b.aligned();
  vector(double(repeat) * 256 / sizeof(T), sizeof(T), cost);
  constexpr int B = 32 / sizeof(T);
  for (int i = 0; i < repeat; i++) for (uint64_t k = 0; k * B < mask; k++) {
    uint64_t n = std::min<uint64_t>(B, mask - k * B);
    const T* x = a.access((i * r.src0RepStride + k * r.src0BlkStride) * B, n, PIPE_V, false);
    const T* y = b.access((i * r.src1RepStride + k * r.src1BlkStride) * B, n, PIPE_V, false);
    T* z = d.access((i * r.dstRepStride + k * r.dstBlkStride) * B, n, PIPE_V, true);
    for (uint64_t j = 0; j < n; j++) z[j] = f(x[j], y[j]);
  }
}
#define EMU_BINARY(name, cost, expression)                                                                           \
  template <class T> void name(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t n, \
                               EMU_AT) {                                                                             \
    state.at = at; real<T>(); binary(d, a, b, n, cost, [](T x, T y) { return T(expression); });                      \
  }                                                                                                                  \
  template <class T> void name(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b,            \
                               uint64_t mask, uint8_t repeat, const BinaryRepeatParams& r, EMU_AT) {                 \
    state.at = at; real<T>(); binary(d, a, b, mask, repeat, r, cost, [](T x, T y) { return T(expression); });        \
  }
EMU_BINARY(Add, 1, x + y)
EMU_BINARY(Sub, 1, x - y)
EMU_BINARY(Mul, 1, x * y)
EMU_BINARY(Div, emu::rate::SLOW, x / y)
EMU_BINARY(Max, 1, x > y ? x : y)
EMU_BINARY(Min, 1, x < y ? x : y)
template <class T> void MulAddDst(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t n, EMU_AT) {
  state.at = at; real<T>(); EMU_CHECK(n > 0, "count %d", n); d.aligned(); a.aligned(); b.aligned();
  vector(n, sizeof(T));
  const T *x = a.access(0, n, PIPE_V, false), *y = b.access(0, n, PIPE_V, false), *w = d.access(0, n, PIPE_V, false);
  T* z = d.access(0, n, PIPE_V, true);
  for (int32_t i = 0; i < n; i++) z[i] = T(w[i] + x[i] * y[i]);
}
// d = d * a + b
template <class T> void FusedMulAdd(const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, uint64_t mask,
                                    uint8_t repeat, const BinaryRepeatParams& r, EMU_AT) {
  state.at = at; real<T>(); lanes<T>(mask, repeat); d.aligned(); a.aligned(); b.aligned();
  vector(double(repeat) * 256 / sizeof(T), sizeof(T));
  constexpr int B = 32 / sizeof(T);
  for (int i = 0; i < repeat; i++) for (uint64_t k = 0; k * B < mask; k++) {
    uint64_t n = std::min<uint64_t>(B, mask - k * B), o = (i * r.dstRepStride + k * r.dstBlkStride) * B;
    const T* x = a.access((i * r.src0RepStride + k * r.src0BlkStride) * B, n, PIPE_V, false);
    const T* y = b.access((i * r.src1RepStride + k * r.src1BlkStride) * B, n, PIPE_V, false);
    d.access(o, n, PIPE_V, false);
    T* z = d.access(o, n, PIPE_V, true);
    for (uint64_t j = 0; j < n; j++) z[j] = T(z[j] * x[j] + y[j]);
  }
}
#define EMU_BITS(name, expression)                                                                                     \
  inline void name(const LocalTensor<uint16_t>& d, const LocalTensor<uint16_t>& a, const LocalTensor<uint16_t>& b,      \
                   int32_t n, EMU_AT) {                                                                                \
    state.at = at; binary(d, a, b, n, 1, [](uint16_t x, uint16_t y) { return uint16_t(expression); });                 \
  }
EMU_BITS(Or, x | y)
EMU_BITS(And, x & y)

template <class T, class F> void unary(const LocalTensor<T>& d, const LocalTensor<T>& a, int32_t n, double cost, F f) {
  EMU_CHECK(n > 0, "count %d", n); d.aligned(); a.aligned();
  vector(n, sizeof(T), cost);
  const T* x = a.access(0, n, PIPE_V, false); T* z = d.access(0, n, PIPE_V, true);
  for (int32_t i = 0; i < n; i++) z[i] = f(x[i]);
}
#define EMU_UNARY(name, cost, expression)                                                                   \
  template <class T> void name(const LocalTensor<T>& d, const LocalTensor<T>& a, int32_t n, EMU_AT) {       \
    state.at = at; real<T>(); unary(d, a, n, cost, [](T v) { float x = float(v); return T(expression); });  \
  }
EMU_UNARY(Exp, emu::rate::SLOW, expf(x))
EMU_UNARY(Ln, emu::rate::SLOW, logf(x))
EMU_UNARY(Sqrt, emu::rate::SLOW, sqrtf(x))
EMU_UNARY(Abs, 1, fabsf(x))
#define EMU_SCALAR(name, expression)                                                                          \
  template <class T> void name(const LocalTensor<T>& d, const LocalTensor<T>& a, T y, int32_t n, EMU_AT) {    \
    state.at = at; real<T>(); unary(d, a, n, 1, [y](T x) { return T(expression); });                          \
  }
EMU_SCALAR(Adds, x + y)
EMU_SCALAR(Muls, x * y)
EMU_SCALAR(Maxs, x > y ? x : y)
EMU_SCALAR(Mins, x < y ? x : y)
inline void ShiftLeft(const LocalTensor<uint32_t>& d, const LocalTensor<uint32_t>& a, uint32_t y, int32_t n, EMU_AT) {
  state.at = at; unary(d, a, n, 1, [y](uint32_t x) { return x << y; });
}
inline void ShiftRight(const LocalTensor<uint32_t>& d, const LocalTensor<uint32_t>& a, uint32_t y, int32_t n, EMU_AT) {
  state.at = at; unary(d, a, n, 1, [y](uint32_t x) { return x >> y; });
}
template <class T> void Duplicate(const LocalTensor<T>& d, T v, int32_t n, EMU_AT) {
  state.at = at; EMU_CHECK(n > 0, "count %d", n); d.aligned(); vector(n, sizeof(T));
  T* z = d.access(0, n, PIPE_V, true); std::fill(z, z + n, v);
}
template <class T> void CreateVecIndex(const LocalTensor<T>& d, T start, uint32_t n, EMU_AT) {
  state.at = at; d.aligned(); vector(n, sizeof(T));
  T* z = d.access(0, n, PIPE_V, true); for (uint32_t i = 0; i < n; i++) z[i] = T(start + T(i));
}

// Widening keeps values (CAST_NONE); narrowing to b16 rounds to nearest even here (CAST_RINT).
template <class D, class S> void Cast(const LocalTensor<D>& d, const LocalTensor<S>& s, RoundMode mode, uint32_t n, EMU_AT) {
  state.at = at; EMU_CHECK(n > 0, "count 0"); d.aligned(); s.aligned();
  constexpr bool widen = sizeof(D) > sizeof(S);
  static_assert(sizeof(D) != sizeof(S) || !std::is_same<D, S>::value, "Cast between equal types");
  static_assert(widen ? std::is_same<D, float>::value : std::is_same<S, float>::value || std::is_same<S, int32_t>::value,
                "Cast between b16 and float, or from int32 to float");
  if (widen) EMU_CHECK(mode == RoundMode::CAST_NONE, "Cast to a wider type needs CAST_NONE");
  else EMU_CHECK(mode == RoundMode::CAST_RINT, "Cast to a narrower type: only CAST_RINT rounds as torch does");
  vector(n, std::max(sizeof(D), sizeof(S)));
  const S* x = s.access(0, n, PIPE_V, false); D* z = d.access(0, n, PIPE_V, true);
  for (uint32_t i = 0; i < n; i++) z[i] = D(float(x[i]));
}

template <class T, class F> void whole(const LocalTensor<T>& d, const LocalTensor<T>& s, int32_t mask, int32_t repeat,
                                       int32_t dst, int32_t block, int32_t stride, F f) {
  real<T>(); lanes<T>(mask, repeat); s.aligned();
  EMU_CHECK(d.offset % sizeof(T) == 0, "reduction to an address that cuts an element");
  vector(double(repeat) * 256 / sizeof(T), sizeof(T));
  constexpr int B = 32 / sizeof(T);
  for (int i = 0; i < repeat; i++) {
    T lane[256 / sizeof(T)];
    for (int k = 0; k * B < mask; k++) {
      int n = std::min(B, mask - k * B);
      memcpy(lane + k * B, s.access(uint64_t(i * stride + k * block) * B, n, PIPE_V, false), n * sizeof(T));
    }
    for (int n = mask; n > 1; n = (n + 1) / 2) {  // a binary tree of neighbours
      for (int j = 0; j < n / 2; j++) lane[j] = f(lane[2 * j], lane[2 * j + 1]);
      if (n % 2) lane[n / 2] = lane[n - 1];
    }
    *d.access(uint64_t(i) * dst, 1, PIPE_V, true) = lane[0];
  }
}
template <class T> void WholeReduceSum(const LocalTensor<T>& d, const LocalTensor<T>& s, int32_t mask, int32_t repeat,
                                       int32_t dstRepStride, int32_t srcBlkStride, int32_t srcRepStride, EMU_AT) {
  state.at = at; whole(d, s, mask, repeat, dstRepStride, srcBlkStride, srcRepStride, [](T x, T y) { return T(x + y); });
}
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
template <class T> void WholeReduceMax(const LocalTensor<T>& d, const LocalTensor<T>& s, int32_t mask, int32_t repeat,
                                       int32_t dstRepStride, int32_t srcBlkStride, int32_t srcRepStride,
                                       ReduceOrder order, EMU_AT) {
  state.at = at; EMU_CHECK(order == ReduceOrder::ORDER_ONLY_VALUE, "WholeReduceMax: only ORDER_ONLY_VALUE is emulated");
  whole(d, s, mask, repeat, dstRepStride, srcBlkStride, srcRepStride, [](T x, T y) { return x > y ? x : y; });
}

struct BrcbRepeatParams { uint16_t dstBlkStride = 1, dstRepStride = 8; };
// Eight elements a repeat, each to a whole block of 32 bytes.
template <class T> void Brcb(const LocalTensor<T>& d, const LocalTensor<T>& s, uint8_t repeat, const BrcbRepeatParams& r,
                             EMU_AT) {
  state.at = at; EMU_CHECK(repeat >= 1, "repeat 0"); d.aligned(); s.aligned();
  vector(double(repeat) * 256 / sizeof(T), sizeof(T));
  constexpr int B = 32 / sizeof(T);
  for (int i = 0; i < repeat; i++) for (int k = 0; k < 8; k++) {
    T v = *s.access(i * 8 + k, 1, PIPE_V, false);
    T* z = d.access(uint64_t(i * r.dstRepStride + k * r.dstBlkStride) * B, B, PIPE_V, true); std::fill(z, z + B, v);
  }
}
// offsets in bytes from the start of the source
template <class T> void Gather(const LocalTensor<T>& d, const LocalTensor<T>& s, const LocalTensor<uint32_t>& offsets,
                               uint32_t base, uint32_t n, EMU_AT) {
  state.at = at; d.aligned(); s.aligned(); offsets.aligned(); vector(n, sizeof(T), emu::rate::GATHER);
  const uint32_t* o = offsets.access(0, n, PIPE_V, false); std::vector<T> got(n);
  for (uint32_t i = 0; i < n; i++) {
    EMU_CHECK((base + o[i]) % sizeof(T) == 0, "Gather offset %u cuts an element", o[i]);
    got[i] = *s.access((base + o[i]) / sizeof(T), 1, PIPE_V, false);
  }
  memcpy(d.access(0, n, PIPE_V, true), got.data(), n * sizeof(T));
}
}  // namespace AscendC
