// Products of a bf16 matrix with a few rows: y [M, N] = x [M, K] w' [N, K] + b. Bound by reading w, once and in order.

#include "cpu_tiles.h"

namespace {

constexpr int MOST = 8;            // rows of x
constexpr int64_t NEAR = 12 * 1024;  // numbers of x that stay beside w in the first cache

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
  float total() const { return fold(low + high, [](vec a, vec b) { return a + b; }); }
};

// `rows` rows of w at once, so that what is read of x serves all of them.
template <int M, int rows> void product(const bf16* w, const bf16* x, const bf16* b, bf16* y, int64_t n, int64_t k) {
  Sum sums[rows][M];
  auto step = [&](auto... size) {
    return [&, size...](int64_t i) {
      Sum::part part[rows];
      for (int r = 0; r < rows; r++) part[r] = Sum::read(w + r * k + i, size...);
      for (int m = 0; m < M; m++) {
        auto given = Sum::read(x + m * k + i, size...);
        for (int r = 0; r < rows; r++) sums[r][m].add(part[r], given);
      }
    };
  };
  int64_t i = 0;
  for (auto whole = step(); i + 2 * W <= k; i += 2 * W) whole(i);
  if (i < k) step(k - i)(i);
  for (int r = 0; r < rows; r++)
    for (int m = 0; m < M; m++) {
      vec sum = all(sums[r][m].total() + (b ? wide(b[r]) : 0));
      bf16 out[W];
      store(out, sum);
      y[m * n + r] = out[0];
    }
}

template <int M> void products(const bf16* w, const bf16* x, const bf16* b, bf16* y, int64_t n, int64_t k, int threads) {
  int64_t at_once = M * k > NEAR ? 4 : 1, groups = n / at_once;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) {
    int64_t j = g * at_once;
    auto run = at_once == 1 ? product<M, 1> : product<M, 4>;
    run(w + j * k, x, b ? b + j : b, y + j, n, k);
  }
  for (int64_t j = groups * at_once; j < n; j++) product<M, 1>(w + j * k, x, b ? b + j : b, y + j, n, k);
}

template <int... M, class... T> void choose(int rows, std::integer_sequence<int, M...>, T... given) {
  ((rows == M + 1 ? products<M + 1>(given...) : void()), ...);
}

}  // namespace

extern "C" void matvec(const bf16* w, const bf16* x, const bf16* b, bf16* y, int64_t m, int64_t n, int64_t k, int threads) {
  choose(m, std::make_integer_sequence<int, MOST>(), w, x, b, y, n, k, threads);
}
