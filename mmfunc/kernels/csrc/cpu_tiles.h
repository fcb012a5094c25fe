// Vectors, packed tiles and the one product that attention is made of.
//
// Numbers lie in 32-bit units: one float, or two bf16 that one dot-product instruction takes together. Everything is
// written with the vector types of GCC and Clang, as wide as the machine's, so the same text serves every machine.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, SIDE = 4;  // lanes of a vector; vectors of a panel
#elif defined(__AVX__)
constexpr int W = 8, SIDE = 2;
#else
constexpr int W = 4, SIDE = 2;
#endif
constexpr int PANEL = SIDE * W;   // columns of a panel

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
struct bf16 { uint16_t bits; };

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES 1  // matrix registers: 16 rows of 16 units
#else
#define TILES 0
#endif
// Rows of a strip: its sums over one panel, ROWS x SIDE vectors (over half of it in matrix registers), stay in registers.
template <class C> constexpr int ROWS = TILES && sizeof(C) == 2 ? 32 : 6;

template <class V, class T> inline V read(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V, class T> inline void write(T* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vec all(float x) { return x - vec{}; }

inline vec load(const float* p) { return read<vec>(p); }
inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(read<hvec>(p), uvec) << 16); }
inline void store(float* p, vec v) { write(p, v); }
inline void store(bf16* p, vec v) {
#if defined(__AVX512BF16__)
  write(p, _mm512_cvtneps_pbh((__m512)v));
#else
  uvec bits = (uvec)v, near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  write(p, __builtin_convertvector(v == v ? near : (bits >> 16 | 64), hvec));  // NaN stays NaN
#endif
}

inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline vec max(vec a, vec b) { return a > b ? a : b; }  // b where either is NaN
template <int S, size_t... I> inline vec swapped(vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int(I) ^ S)...);
}
template <int S = W / 2, class F> inline float fold(vec v, F f) {
  v = f(v, swapped<S>(v, std::make_index_sequence<W>()));
  if constexpr (S > 1) return fold<S / 2>(v, f);
  else return v[0];
}

// 2^x for x <= 128, relative error 1e-7, of weights in bf16 1e-4; 0 (or, with AVX512, less than the smallest normal
// number) below -127.
template <class C> inline vec exp2(vec x) {
#if defined(__AVX512DQ__)
  vec f = (vec)_mm512_reduce_ps((__m512)x, 0);  // x less the nearest integer
#else
  constexpr float SHIFT = 12582912 + 127;  // adding it rounds to an integer whose low bits are a float's exponent
  x = max(all(-127), x);
  vec n = x + SHIFT, f = x - (n - SHIFT);
#endif
  vec y;
  if constexpr (sizeof(C) == 2) {
    y = f * 5.5008930e-2f + 2.4221096e-1f;
    y = y * f + 6.9328293e-1f;
  } else {
    y = f * 1.5353362e-4f + 1.3398874e-3f;
    y = y * f + 9.6184374e-3f;
    y = y * f + 5.5503325e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314720e-1f;
  }
  y = y * f + 1;
#if defined(__AVX512DQ__)
  return (vec)_mm512_scalef_ps((__m512)y, (__m512)(x - f));
#else
  return y * (vec)((ivec)n << 23);
#endif
}

// W x W units, transposed, of which `count` rows are wanted: row(i) to to[i * apart].
template <int S, size_t... I> inline void exchange(uvec& a, uvec& b, std::index_sequence<I...>) {
  uvec c = __builtin_shufflevector(a, b, (int(I) & S ? W + int(I) - S : int(I))...);
  b = __builtin_shufflevector(a, b, (int(I) & S ? W + int(I) : int(I) + S)...);
  a = c;
}
template <int S> inline void exchanges(uvec* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_index_sequence<W>());
  if constexpr (S > 1) exchanges<S / 2>(r);
}
template <class R> inline void transpose(R row, uint32_t* to, long apart, int count) {
  uvec r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) r[i] = row(i);
  exchanges<W / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (i < count) write(to + i * apart, r[i]);
}

// ---- operands. C is what is multiplied: float, or bf16 where the machine has its dot product.

template <class C> constexpr int PAIR = 4 / sizeof(C);  // numbers of a unit

inline long up(long n, long step) { return (n + step - 1) / step * step; }

// Units of W neighbours: from one row of floats, from two of bf16.
template <class C> inline uvec unit(const C* p, long apart) {
  if constexpr (PAIR<C> == 1) return read<uvec>(p);
  else return (uvec)load(p) >> 16 | (uvec)load(p + apart);
}

// `count` rows of `width` numbers, `stride` apart, as rows of `units`; zeros up to there and in rows up to `total`.
template <class C, class T>
void rows(const T* from, long stride, int count, int width, uint32_t* to, int units, int total) {
  for (int i = 0; i < total; i++, from += stride, to += units) {
    C* row = (C*)to;
    const int n = i < count ? width : 0;
    if (i + 8 < count)  // rows of one head lie too far apart for the machine to foresee them
      for (int j = 0; j < width; j += 64 / sizeof(T)) __builtin_prefetch(from + 8 * stride + j);
    if constexpr (sizeof(T) == sizeof(C)) {
      constexpr int some = W * PAIR<C>;
      int j = 0;
      for (; j + some <= n; j += some) write(row + j, read<uvec>(from + j));
      if (j < n) std::memcpy(row + j, from + j, sizeof(C) * (n - j));
    } else for (int j = 0; j < n; j++) row[j] = wide(from[j]);
    if (n < units * PAIR<C>) std::memset(row + n, 0, sizeof(uint32_t) * units - sizeof(C) * n);
  }
}

struct Rows { const uint32_t* data; long apart; };  // rows of units, so many units apart

// What rows() makes, or the rows where they are if they are such already: whole vectors, none reads beyond a row.
template <class C, class T>
Rows laid(const T* from, long stride, int count, int width, uint32_t* to, int units, int total) {
  if constexpr (sizeof(T) == sizeof(C))
    if (count == total && width == units * PAIR<C> && units % W == 0 && stride % PAIR<C> == 0)
      return {(const uint32_t*)from, stride / PAIR<C>};
  rows<C>(from, stride, count, width, to, units, total);
  return {to, units};
}

// A row of sums, times a factor, as numbers of T.
template <class T> inline void put(const float* from, float factor, T* to, int width) {
  for (; width >= W; from += W, to += W, width -= W) store(to, load(from) * factor);
  if (width == 0) return;
  T rest[W];
  store(rest, load(from) * factor);
  std::copy_n(rest, width, to);
}

struct Packed {  // the right side of a product, in panels of PANEL columns (the last may have fewer), unit by unit
  uint32_t* data;
  int units, columns;  // columns: a multiple of W
  int width(int column) const { return std::min(PANEL, columns - column); }
  uint32_t* panel(int column) const { return data + long(column) * units; }  // column: a multiple of PANEL
};

// Fetch some rows: those of one head lie too far apart for the machine to foresee them.
inline void ahead(Rows from, int first, int count, int units) {
  for (int i = first; i < first + count; i++)
    for (int j = 0; j < units; j += W) __builtin_prefetch(from.data + i * from.apart + j);
}

// Rows become columns: [columns, units] -> [units, columns].
inline Packed turned(Rows from, int units, int columns, uint32_t* to) {
  Packed b{to, units, columns};
  for (int n = 0; n < columns; n += W) {
    if (n + W < columns) ahead(from, n + W, W, units);
    int width = b.width(n / PANEL * PANEL);
    uint32_t* panel = b.panel(n / PANEL * PANEL) + n % PANEL;
    for (int u = 0; u < units; u += W)
      transpose([&](int i) { return read<uvec>(from.data + (n + i) * from.apart + u); }, panel + long(u) * width, width,
                units - u);
  }
  return b;
}

// Rows stay rows, PAIR<C> of them to a unit: [count, columns] -> [count / PAIR, columns].
template <class C> Packed joined(Rows from, int count, int columns, uint32_t* to) {
  Packed b{to, count / PAIR<C>, columns};
  for (int n = 0; n < columns; n += PANEL) {
    int width = b.width(n);
    uint32_t* panel = b.panel(n);
    for (int r = 0; r < count; r += PAIR<C>) {
      if (r + 8 < count) ahead(from, r + 8, PAIR<C>, columns / PAIR<C>);
      for (int j = 0; j < width; j += W, panel += W)
        write(panel, unit((const C*)(from.data + r * from.apart) + n + j, from.apart * PAIR<C>));
    }
  }
  return b;
}

template <class C> inline vec dot(vec sum, uint32_t a, uvec b) {
#if defined(__AVX512BF16__)
  if constexpr (PAIR<C> == 2)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
  float x;
  std::memcpy(&x, &a, 4);
  return sum + x * (vec)b;
}

#if TILES
// The matrix registers of a thread: 0 to 3 sums, 4 and 6 a left and a right side of 16 units, 5 and 7 of 8.
struct Matrices {
  Matrices() {
    alignas(64) uint8_t to[64] = {1};  // bytes of a row from 16 on, two bytes each; rows from 48 on
    for (int i = 0; i < 8; i++) to[16 + 2 * i] = i == 5 ? 32 : 64, to[48 + i] = i == 7 ? 8 : 16;
    _tile_loadconfig(to);
  }
  ~Matrices() { _tile_release(); }
};

inline bool matrices_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, their data

// As strip() below, 32 rows at two vectors at a time: a right side, which comes from afar, serves two left ones.
// Strides in bytes.
template <bool ADD, int N>
void tiles(const uint32_t* a, long stride, const uint32_t* b, long width, int units, float* c, long apart) {
  if constexpr (N > 2) {
    tiles<ADD, 2>(a, stride, b, width, units, c, apart);
    tiles<ADD, N - 2>(a, stride, b + 2 * W, width, units, c + 2 * W, apart);
  } else {
    const long below = 4 * stride;  // 16 rows, in units
    float* under = c + 4 * apart;
#define START(i, c) if constexpr (ADD) _tile_loadd(i, c, apart); else _tile_zero(i)
#define STEP(left, right)                                                   \
  _tile_loadd(right, b, width);                                                          \
  _tile_loadd(left, a, stride);                                                          \
  _tile_dpbf16ps(0, left, right);                                                        \
  if constexpr (N > 1) { _tile_loadd(right, b + W, width); _tile_dpbf16ps(1, left, right); } \
  _tile_loadd(left, a + below, stride);                                                  \
  if constexpr (N > 1) { _tile_dpbf16ps(3, left, right); _tile_loadd(right, b, width); }     \
  _tile_dpbf16ps(2, left, right)
    START(0, c);
    START(2, under);
    if constexpr (N > 1) { START(1, c + W); START(3, under + W); }
    for (; units >= 16; units -= 16, a += 16, b += 4 * width) { STEP(4, 6); }
    if (units) { STEP(5, 7); }  // sides are multiples of 8
    _tile_stored(0, c, apart);
    _tile_stored(2, under, apart);
    if constexpr (N > 1) { _tile_stored(1, c + W, apart); _tile_stored(3, under + W, apart); }
#undef START
#undef STEP
  }
}
#else
struct Matrices { Matrices() {} };
inline bool matrices_allowed() { return true; }
#endif

// c [ROWS, N vectors] (+)= a [ROWS, units] b [units, N vectors]; rows are `stride`, `width` and `apart` apart.
template <class C, bool ADD, int N>
void strip(const uint32_t* a, long stride, const uint32_t* b, long width, int units, float* c, long apart) {
  #if TILES
  if constexpr (PAIR<C> == 2) return tiles<ADD, N>(a, 4 * stride, b, 4 * width, units, c, 4 * apart);
#endif
  vec sum[ROWS<C>][N];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS<C>; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sum[i][j] = vec{};
#pragma GCC unroll 2
  for (int u = 0; u < units; u++, b += width) {
    uvec right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) right[j] = read<uvec>(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS<C>; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sum[i][j] = dot<C>(sum[i][j], a[i * stride + u], right[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS<C>; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* to = c + i * apart + j * W;
      store(to, ADD ? load(to) + sum[i][j] : sum[i][j]);
    }
}

template <class C, bool ADD, int N = SIDE>
void strip_of(int vectors, const uint32_t* a, long stride, const uint32_t* b, long width, int units, float* c,
              long apart) {
  if (vectors == N) strip<C, ADD, N>(a, stride, b, width, units, c, apart);
  else if constexpr (N > 1) strip_of<C, ADD, N - 1>(vectors, a, stride, b, width, units, c, apart);
}

// Columns from..to of c [ROWS, columns] = (or, with ADD, +=) a [ROWS, begin..end) b; from, to: multiples of W.
template <class C, bool ADD>
void multiply(const uint32_t* a, long stride, const Packed& b, int begin, int end, int from, int to, float* c,
              long apart) {
  constexpr int STEP = PAIR<C> == 1 ? 32 : 1 << 20;  // sums of sums: the error of float32 is that of short rows
  for (int n = from, next; n < to; n = next) {
    const int start = n / PANEL * PANEL, width = b.width(start);
    const uint32_t* right = b.panel(start) + n - start;
    next = std::min(start + width, to);
    const int vectors = (next - n) / W;
    strip_of<C, ADD>(vectors, a + begin, stride, right + long(begin) * width, width, std::min(STEP, end - begin), c + n,
                     apart);
    for (int u = begin + STEP; u < end; u += STEP)
      strip_of<C, true>(vectors, a + u, stride, right + long(u) * width, width, std::min(STEP, end - u), c + n, apart);
  }
}

// Run with a number of rows that the compiler knows.
template <int... M, class F> void choose(int rows, std::integer_sequence<int, M...>, F run) {
  ((rows == M + 1 ? run(std::integral_constant<int, M + 1>()) : void()), ...);
}

// Memory of this thread that lasts, one piece for each slot.
template <class T = uint32_t> T* scratch(int slot, size_t count) {
  struct alignas(64) Line { char bytes[64]; };
  static thread_local std::vector<Line> pieces[16];
  const size_t lines = count * sizeof(T) / 64 + 2;  // a transpose may read a vector too far
  if (pieces[slot].size() < lines) pieces[slot].resize(lines);
  return (T*)pieces[slot].data();
}

}  // namespace
