// Products of a matrix, of bf16 or of int8, with a few rows: y [M, N] = x [M, K] w' [N, K] + b. Bound by reading w, once
// and in order.

#include "cpu_tiles.h"

namespace {

constexpr int MOST = 8;            // rows of x
constexpr int64_t NEAR = 12 * 1024;  // numbers of x that stay beside w in the first cache
constexpr int AHEAD = 4096;          // bytes of w that are on their way: a machine foresees no more than a page

struct Sum {  // of products over one row of w
  vec low{}, high{};
#if defined(__AVX512BF16__)
  typedef __m512bh part;
  static part read(const bf16* p) { return (part)_mm512_loadu_si512(p); }
  static part read(const bf16* p, int64_t n) {
    return (part)_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p);
  }
  void add(part w, part x) { low = (vec)_mm512_dpbf16_ps((__m512)low, w, x); }
#else
  struct part { vec low, high; };
  static part read(const bf16* p) { return {load(p), load(p + W)}; }
  static part read(const bf16* p, int64_t n) {
    bf16 rest[2 * W]{};
    std::copy(p, p + n, rest);
    return read(rest);
  }
  void add(part w, part x) { low += w.low * x.low, high += w.high * x.high; }
#endif
  void operator+=(const Sum& s) { low += s.low, high += s.high; }
  float total() const { return fold(low + high, [](vec a, vec b) { return a + b; }); }
};

// `rows` rows of w at once, so that what is read of x serves all of them; few sums are kept in several parts, as an
// addition to one of them must wait for the one before.
template <int M, int rows> void product(const bf16* w, const bf16* x, const bf16* b, bf16* y, int64_t n, int64_t k) {
  constexpr int PARTS = std::max(1, 8 / (rows * M));
  Sum sums[PARTS][rows][M];
  auto step = [&](auto... size) {
    return [&, size...](int64_t i, int to) {
      Sum::part part[rows];
      for (int r = 0; r < rows; r++) part[r] = Sum::read(w + r * k + i, size...);
      for (int m = 0; m < M; m++) {
        auto given = Sum::read(x + m * k + i, size...);
        for (int r = 0; r < rows; r++) sums[to][r][m].add(part[r], given);
      }
    };
  };
  int64_t i = 0;
  auto whole = step();
  for (; i + PARTS * 2 * W <= k; i += PARTS * 2 * W)
#pragma GCC unroll 8
    for (int to = 0; to < PARTS; to++) {
      for (int r = 0; r < rows; r++) __builtin_prefetch(w + r * k + i + to * 2 * W + AHEAD / 2);
      whole(i + to * 2 * W, to);
    }
  for (; i + 2 * W <= k; i += 2 * W) whole(i, 0);
  if (i < k) step(k - i)(i, 0);
  for (int r = 0; r < rows; r++)
    for (int m = 0; m < M; m++) {
      for (int to = 1; to < PARTS; to++) sums[0][r][m] += sums[to][r][m];
      vec sum = all(sums[0][r][m].total() + (b ? wide(b[r]) : 0));
      bf16 out[W];
      store(out, sum);
      y[m * n + r] = out[0];
    }
}

struct Map { const bf16 *w, *b; bf16* y; int64_t n; };

// Several maps of the same x, one after the other.
template <int M> void products(const Map* maps, int64_t count, const bf16* x, int64_t k, int threads) {
  const int64_t at_once = M * k > NEAR ? 4 : 1;
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const auto [w, b, y, n] = maps[i];
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < n; j += at_once) {
      if (at_once == 4 && j + 4 <= n) product<M, 4>(w + j * k, x, b ? b + j : b, y + j, n, k);
      else for (int64_t r = j; r < std::min(j + at_once, n); r++) product<M, 1>(w + r * k, x, b ? b + r : b, y + r, n, k);
    }
  }
}

// ---- w of int8: in each row `groups` times `size` numbers (fewer at the end) share a factor

typedef int8_t bvec __attribute__((vector_size(W)));
inline vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));  // GCC takes them one by one
#else
  return __builtin_convertvector(__builtin_convertvector(read<bvec>(p), ivec), vec);
#endif
}
inline float wide(float x) { return x; }

constexpr int SIDES = 4, AT_ONCE = W == 16 ? 4 : 2;  // rows of x and of w whose sums stay in registers

struct Shape {
  int64_t m, n, k, groups, size;
  int64_t length() const { return (groups - 1) * up(size, W) + up(k - (groups - 1) * size, W); }  // of spread rows
};

// Rows of x as floats, SIDES of them together, a vector of each in turn; zeros behind a group, where its last vector has
// numbers of the next one in w.
template <class T> const float* spread(const T* x, Shape s) {
  float *all = scratch<float>(0, s.m * s.length()), *to = all;
  for (int64_t first = 0; first < s.m; first += SIDES)
    for (int64_t begin = 0, end; begin < s.k; begin = end) {
      end = std::min(begin + s.size, s.k);
      for (int64_t i = begin; i < end; i += W)
        for (int64_t m = first; m < std::min(first + SIDES, s.m); m++, to += W) {
          T part[W]{};
          std::copy_n(x + m * s.k + i, std::min<int64_t>(W, end - i), part);
          store(to, load(part));
        }
    }
  return all;
}

template <int M, int rows, class T>
void product(const int8_t* w, const T* scale, const float* x, const T* b, T* y, Shape s) {
  vec sums[rows][M]{};
  for (int64_t begin = 0, end; begin < s.k; begin = end, scale++) {
    end = std::min(begin + s.size, s.k);
    vec factor[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      factor[r] = all(wide(scale[r * s.groups]));
      for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(w + r * s.k + i + AHEAD);
    }
    for (int64_t i = begin; i < end; i += W, x += M * W)
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        vec part = load(w + r * s.k + i) * factor[r];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sums[r][m] += part * load(x + m * W);
      }
  }
  for (int r = 0; r < rows; r++)
    for (int m = 0; m < M; m++) {
      T out[W];
      store(out, all(fold(sums[r][m], [](vec a, vec b) { return a + b; }) + (b ? wide(b[r]) : 0)));
      y[m * s.n + r] = out[0];
    }
}

template <class T>
void products(const int8_t* w, const void* scale, const void* x, const void* b, void* y, Shape s, int threads) {
  const float* given = spread((const T*)x, s);
  int8_t* last = scratch<int8_t>(1, s.k + W);  // behind w there is nothing to be read
  std::copy_n(w + (s.n - 1) * s.k, s.k, last);
  auto run = [&](auto rows, const int8_t* from, int64_t j) {
    for (int64_t m = 0; m < s.m; m += SIDES)
      choose(std::min<int64_t>(SIDES, s.m - m), std::make_integer_sequence<int, SIDES>(), [&](auto side) {
        product<side.value, rows.value>(from, (const T*)scale + j * s.groups, given + m * s.length(),
                                        b ? (const T*)b + j : nullptr, (T*)y + m * s.n + j, s);
      });
  };
  const int64_t blocks = (s.n - 1) / AT_ONCE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < blocks; g++)
    run(std::integral_constant<int, AT_ONCE>(), w + g * AT_ONCE * s.k, g * AT_ONCE);
  for (int64_t j = blocks * AT_ONCE; j < s.n; j++)
    run(std::integral_constant<int, 1>(), j + 1 < s.n ? w + j * s.k : last, j);
}

}  // namespace

struct Dense { int64_t m, k, threads, count; const bf16* x; Map maps[]; };
struct Grouped { int64_t m, n, k, groups, wide, threads; const void *x, *b; void* y; const int8_t* w; const void* scale; };

extern "C" void matvec(const Dense* p) {
  choose(p->m, std::make_integer_sequence<int, MOST>(),
         [&](auto rows) { products<rows.value>(p->maps, p->count, p->x, p->k, p->threads); });
}

// scale [N, groups], x, b and y of bf16, or of float where `wide`.
extern "C" void matvec_int8(const Grouped* p) {
  const Shape s{p->m, p->n, p->k, p->groups, (p->k + p->groups - 1) / p->groups};
  if (p->n) (p->wide ? products<float> : products<bf16>)(p->w, p->scale, p->x, p->b, p->y, s, p->threads);
}
