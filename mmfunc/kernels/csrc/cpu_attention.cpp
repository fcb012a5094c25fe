// Softmax attention and its gradient on CPU, tile by tile: scores exist for one strip of rows at a time, in cache.
// Dao et al., FlashAttention (2022) for the running softmax and for recomputing the weights from their log-sum-exp.
// A few queries, as in decoding, are another matter: there keys and values are to be read once.
//
// Each item of work is summed in one order, and no two items write to one place: results do not depend on threads.

#include "cpu_tiles.h"

namespace {

constexpr int QUERIES = 768;        // forward: most queries of an item
constexpr int TILE = 512;           // forward: keys of a step
constexpr int BLOCK = 192;          // backward: keys of a step, queries of a step
constexpr int SOME = 96;            // queries of a block that share a range of keys
constexpr float HIDDEN = -1e30f;    // the score of what is masked
constexpr float LOG2E = 1.44269504f;
constexpr float NONE = -1e20f;      // the largest score of a row that has seen nothing yet
static_assert(TILE % PANEL == 0 && BLOCK % PANEL == 0 && BLOCK % SOME == 0 && SOME % ROWS<float> == 0 &&
                  SOME % ROWS<bf16> == 0 && SOME % W == 0,
              "tiles of whole strips");

struct Tensor { char* data; int64_t batch, row, head; };  // strides; the last dimension is contiguous

struct Problem {
  int64_t half, batch, queries, keys, heads, groups, width, causal, start, threads;
  const int32_t *query_segments, *key_segments;  // [batch, queries] and [batch, keys], or null
  float *lse, *delta, *sums;  // [batch, heads, queries]; sums [splits, batch, heads, queries, columns]
  char* touched;  // [splits, batch, heads, blocks of queries]: whether there is a part of sums
  int64_t splits;
  Tensor q, k, v, out, grad, dq, dk, dv;
  int columns() const { return up(width, W); }
  template <class T> T* at(const Tensor& t, long b, long row, long head) const {
    return (T*)t.data + b * t.batch + row * t.row + head * t.head;
  }
};

// ---- masks

struct Span {  // the segments of a few neighbours
  int low = INT32_MAX, high = 0;
  bool padding = false;
  void take(int id) {
    if (id == 0) { padding = true; return; }
    low = std::min(low, id);
    high = std::max(high, id);
  }
  static Span of(const int32_t* ids, int n) {
    Span s;
    for (int i = 0; i < n; i++) s.take(ids[i]);
    return s;
  }
  bool meets(const Span& s) const { return std::max(low, s.low) <= std::min(high, s.high); }
  bool only(const Span& s) const { return low == high && s.low == low && s.high == low && !padding && !s.padding; }
};

struct Lanes { int from, to; bool whole; };  // what a strip sees, and whether each row sees all of it

// Which lanes each row sees: rows are queries and lanes keys, or the other way round.
struct Sight {
  int count, lanes;
  bool causal, turned;
  long start;
  const int32_t* row_ids;
  std::vector<int32_t> lane_ids;  // padded; empty without segments
  std::vector<Span> spans, wide;  // of the lanes of each vector, and of each MANY
  static constexpr int MANY = 8 * W;

  Sight(const Problem& p, long b, bool turned)
      : count(turned ? p.keys : p.queries), lanes(turned ? p.queries : p.keys), causal(p.causal), turned(turned),
        start(p.start), row_ids(nullptr) {
    if (!p.query_segments) return;
    const int32_t *q = p.query_segments + b * p.queries, *k = p.key_segments + b * p.keys;
    row_ids = turned ? k : q;
    lane_ids.assign(up(lanes, W), 0);
    std::copy_n(turned ? q : k, lanes, lane_ids.begin());
    for (int i = 0; i < lanes; i += W) spans.push_back(Span::of(&lane_ids[i], W));
    for (int i = 0; i < lanes; i += MANY) wide.push_back(Span::of(&lane_ids[i], std::min<int>(MANY, up(lanes, W) - i)));
  }
  int first(int row) const { return causal && turned ? int(std::max(0L, row - start)) : 0; }
  int last(int row) const { return causal && !turned ? int(std::min(long(lanes), row + start + 1)) : lanes; }

  Span ids(int r, int n) const { return row_ids ? Span::of(row_ids + r, std::min(n, count - r)) : Span(); }

  // Of lanes a..b (a: a multiple of W) what rows r..r + n, of segments `mine`, see; from: a multiple of W.
  Lanes see(int r, int n, const Span& mine, int a, int b) const {
    int end = std::min(r + n, count), from = std::max(a, first(r)) / W * W, to = std::min(b, last(end - 1));
    bool whole = r + n <= count && from >= first(end - 1) && to <= last(r) && to % W == 0;
    if (row_ids) {
      while (from < to && !mine.meets(spans[from / W]))
        from = from % MANY || mine.meets(wide[from / MANY]) ? from + W : from + MANY;
      while (from < to && !mine.meets(spans[(to - 1) / W]))
        to = to % MANY || mine.meets(wide[(to - 1) / MANY]) ? (to - 1) / W * W : to - MANY;
      for (int i = from; i < to && whole; i += W) whole = mine.only(spans[i / W]);
    }
    return {from, to, whole};
  }

  // Scores that are masked become HIDDEN: of some rows from r, of segments `mine`, and lanes `at`; s starts at lane a.
  void hide(int r, int rows, const Span& mine, Lanes at, int a, float* s, long apart) const {
    ivec step;
    for (int i = 0; i < W; i++) step[i] = i;
    for (int i = 0; i < rows; i++, r++) {
      const bool none = r >= count || (row_ids && row_ids[r] == 0);
      const int lo = none ? INT32_MAX : first(r), hi = none ? 0 : last(r), id = none || !row_ids ? 0 : row_ids[r];
      const bool only_last = !row_ids && lo <= at.from;  // of causal order the last lanes are hidden
      for (int j = only_last ? std::max(at.from, hi / W * W) : at.from; j < at.to; j += W) {
        const bool same = !row_ids || mine.only(spans[j / W]);
        if (same && j >= lo && j + W <= hi) continue;
        ivec lane = step + j, seen = (lane >= lo) & (lane < hi);
        if (!same) seen &= read<ivec>(&lane_ids[j]) == id;
        float* p = s + i * apart + j - a;
        write(p, seen ? load(p) : all(HIDDEN));
      }
    }
  }
};

// ---- forward

// One strip: scores s [ROWS, n] become weights p; the running maximum m and sum l go on, and what o had is scaled, but
// for the first time, when it has nothing yet.
template <class C>
void softmax(const float* s, int n, float scale, float* m, float* l, float* o, int columns, bool first, C* p) {
  for (int i = 0; i < ROWS<C>; i++, s += TILE, p += TILE, o += columns) {
    vec high = all(HIDDEN);
    for (int j = 0; j < n; j += W) high = max(high, load(s + j));
    float top = std::max(m[i], fold(high, max) * scale);
    vec sum{};
    for (int j = 0; j < n; j += W) {
      vec x = exp2<C>(load(s + j) * scale - top);
      sum += x;
      store(p + j, x);
    }
    const float keep = top == m[i] ? 1 : m[i] == NONE ? 0 : exp2f(m[i] - top);
    l[i] = l[i] * keep + fold(sum, [](vec a, vec b) { return a + b; });
    m[i] = top;
    if (keep != 1 && !first)
      for (int j = 0; j < columns; j += W) store(o + j, load(o + j) * keep);
  }
}

template <class T, class C>
void forward(const Problem& p, const Sight& sight, long b, long head, int first, int count, float scale) {
  const int columns = p.columns(), units = columns / PAIR<C>, strips = up(count, ROWS<C>);
  const Span ids = sight.ids(first, count);
  const long group = head / (p.heads / p.groups);
  uint32_t *q = scratch(0, QUERIES * units), *plain = scratch(1, TILE * units);
  uint32_t *kt = scratch(2, TILE * units), *vj = scratch(3, TILE * units);
  float *o = scratch<float>(4, QUERIES * columns), *s = scratch<float>(5, ROWS<C> * TILE);
  float *m = scratch<float>(6, 2 * QUERIES), *l = m + QUERIES;
  uint32_t* w = scratch(7, ROWS<C> * TILE);
  rows<C>(p.at<T>(p.q, b, first, head), p.q.row, count, p.width, q, units, strips);
  bool begun[QUERIES / ROWS<C> + 1] = {};  // of each strip, whether o has something
  std::fill_n(m, strips, NONE);
  std::fill_n(l, strips, 0.f);
  for (int key = 0; key < p.keys; key += TILE) {
    const int n = std::min<long>(TILE, p.keys - key), padded = up(n, W);
    Lanes seen = sight.see(first, count, ids, key, key + n);
    if (seen.from >= seen.to) continue;
    const Rows k = laid<C>(p.at<T>(p.k, b, key, group), p.k.row, n, p.width, plain, units, padded);
    const Packed keys = turned(k, units, padded, kt);
    const Rows v = laid<C>(p.at<T>(p.v, b, key, group), p.v.row, n, p.width, plain, units, padded);
    const Packed values = joined<C>(v, padded, columns, vj);
    for (int r = 0; r < strips; r += ROWS<C>) {
      const Span mine = sight.ids(first + r, ROWS<C>);
      Lanes at = sight.see(first + r, ROWS<C>, mine, key, key + n);
      if (at.from >= at.to) continue;
      int from = at.from - key, to = up(at.to - key, W);
      multiply<C, false>(q + r * units, units, keys, 0, units, from, to, s, TILE);
      if (!at.whole) sight.hide(first + r, ROWS<C>, mine, at, key, s, TILE);
      bool& more = begun[r / ROWS<C>];
      float* sums = o + r * columns;
      softmax<C>(s + from, to - from, scale * LOG2E, m + r, l + r, sums, columns, !more, (C*)w + from);
      if (more) multiply<C, true>(w, TILE / PAIR<C>, values, from / PAIR<C>, to / PAIR<C>, 0, columns, sums, columns);
      else multiply<C, false>(w, TILE / PAIR<C>, values, from / PAIR<C>, to / PAIR<C>, 0, columns, sums, columns);
      more = true;
    }
  }
  for (int r = 0; r < strips; r += ROWS<C>)
    if (!begun[r / ROWS<C>]) std::fill_n(o + r * columns, ROWS<C> * columns, 0.f);
  float* lse = p.lse + (b * p.heads + head) * p.queries + first;
  for (int i = 0; i < count; i++)  // a row that sees nothing gives 0; NaN stays NaN
    put(o + i * columns, l[i] == 0 ? 0 : 1 / l[i], p.at<T>(p.out, b, first + i, head), p.width);
  for (int i = 0; i < count; i++) {  // of float32 the last bit counts
    const float found = PAIR<C> == 1 ? m[i] / double(LOG2E) + std::log(double(l[i])) : (m[i] + log2f(l[i])) / LOG2E;
    lse[i] = l[i] == 0 ? -HIDDEN : found;
  }
}

// ---- backward

// Scores s and slopes g (of the loss by the weights) of a strip [ROWS, n] -> weights p, slopes by scores d (unscaled).
// lse: of weights in bf16 times LOG2E, of float not yet: its rounding would be that of a whole row.
template <class C>
void slopes(const float* s, const float* g, int n, float scale, const float* lse, const float* delta, C* p, C* d) {
  for (int i = 0; i < ROWS<C>; i++, s += BLOCK, g += BLOCK, p += BLOCK, d += BLOCK)
    for (int j = 0; j < n; j += W) {
      vec x = load(s + j) * scale - load(lse + j);
      x = exp2<C>(PAIR<C> == 1 ? x * LOG2E : x);
      store(p + j, x);
      store(d + j, x * (load(g + j) - load(delta + j)));
    }
}

// A block of keys against a block of queries: what both need, in this thread's memory.
template <class C> struct Backward {
  const Problem& p;
  const Sight& sight;
  const float scale;
  static constexpr float UNIT = PAIR<C> == 1 ? 1 : LOG2E;  // of exponents
  const int columns = p.columns(), units = columns / PAIR<C>, side = BLOCK * units, across = BLOCK / PAIR<C>;
  uint32_t *plain = scratch(0, side), *k = scratch(1, side), *v = scratch(2, side), *kj = scratch(3, side);
  uint32_t *qt = scratch(4, side), *qj = scratch(5, side), *gt = scratch(6, side), *gj = scratch(7, side);
  float *dk = scratch<float>(8, BLOCK * columns), *dv = scratch<float>(9, BLOCK * columns);
  float *s = scratch<float>(10, 2 * ROWS<C> * BLOCK), *slope = s + ROWS<C> * BLOCK;
  float *lse = scratch<float>(11, 2 * BLOCK), *delta = lse + BLOCK;
  C *w = scratch<C>(12, ROWS<C> * BLOCK), *d = scratch<C>(13, BLOCK * BLOCK);  // weights of a strip; slopes by scores
  uint32_t* dt = scratch(14, BLOCK * across);                               // the latter, turned
  int key = 0, n = 0, query = 0, m = 0;                                     // first key, keys, first query, queries
  Packed keys{}, queries{}, queries_joined{}, grads{}, grads_joined{};

  template <class T> void take_keys(long b, long group, int first, int count) {
    key = first, n = count;
    rows<C>(p.at<T>(p.k, b, key, group), p.k.row, n, p.width, k, units, BLOCK);
    rows<C>(p.at<T>(p.v, b, key, group), p.v.row, n, p.width, v, units, BLOCK);
    keys = joined<C>({k, units}, up(n, W * PAIR<C>), columns, kj);
    std::fill_n(dk, BLOCK * columns, 0.f);
    std::fill_n(dv, BLOCK * columns, 0.f);
  }

  template <class T> void take_queries(long b, long head, int first, int count) {
    query = first, m = count;
    const int lanes = up(m, W);
    Rows from = laid<C>(p.at<T>(p.q, b, query, head), p.q.row, m, p.width, plain, units, lanes);
    queries = turned(from, units, lanes, qt), queries_joined = joined<C>(from, lanes, columns, qj);
    from = laid<C>(p.at<T>(p.grad, b, query, head), p.grad.row, m, p.width, plain, units, lanes);
    grads = turned(from, units, lanes, gt), grads_joined = joined<C>(from, lanes, columns, gj);
    const long row = (b * p.heads + head) * p.queries + query;
    for (int i = 0; i < lanes; i++) {
      lse[i] = i < m ? p.lse[row + i] * UNIT : -HIDDEN;
      delta[i] = i < m ? p.delta[row + i] : 0;
    }
  }

  // dk and dv += what these queries give; dq = or += what these keys give.
  void meet(float* dq, bool add) {
    const int strips = up(n, ROWS<C>), pairs = up(n, W * PAIR<C>);
    int low[BLOCK / SOME], high[BLOCK / SOME] = {};  // the keys that queries see
    std::fill_n(low, BLOCK / SOME, BLOCK);
    std::memset(d, 0, sizeof(C) * std::max(strips, pairs) * BLOCK);
    for (int r = 0; r < strips; r += ROWS<C>) {
      const Span mine = sight.ids(key + r, ROWS<C>);
      const Lanes at = sight.see(key + r, ROWS<C>, mine, query, query + m);
      if (at.from >= at.to) continue;
      const int from = at.from - query, to = up(at.to - query, W), a = from / PAIR<C>, z = to / PAIR<C>;
      for (int i = from / SOME; i * SOME < to; i++) {
        low[i] = std::min(low[i], r - r % (W * PAIR<C>));
        high[i] = std::min(r + ROWS<C>, pairs);
      }
      C* strip = d + r * BLOCK;
      multiply<C, false>(k + r * units, units, queries, 0, units, from, to, s, BLOCK);
      if (!at.whole) sight.hide(key + r, ROWS<C>, mine, at, query, s, BLOCK);
      multiply<C, false>(v + r * units, units, grads, 0, units, from, to, slope, BLOCK);
      slopes<C>(s + from, slope + from, to - from, scale * UNIT, lse + from, delta + from, w + from, strip + from);
      multiply<C, true>((uint32_t*)w, across, grads_joined, a, z, 0, columns, dv + r * columns, columns);
      multiply<C, true>((uint32_t*)strip, across, queries_joined, a, z, 0, columns, dk + r * columns, columns);
    }
    for (int i = 0; i < m; i += W)
      for (int j = low[i / SOME]; j < high[i / SOME]; j += W * PAIR<C>)
        transpose([&](int u) { return unit(d + long(j + u * PAIR<C>) * BLOCK + i, BLOCK); },
                  dt + i * across + j / PAIR<C>, across, W);
    for (int r = 0; r < m; r += ROWS<C>, dq += ROWS<C> * columns) {
      const int a = low[r / SOME] / PAIR<C>, z = std::max(a, high[r / SOME] / PAIR<C>);
      if (add) multiply<C, true>(dt + r * across, across, keys, a, z, 0, columns, dq, columns);
      else multiply<C, false>(dt + r * across, across, keys, a, z, 0, columns, dq, columns);
    }
  }
};

// dk and dv of the keys first..last of a group of heads, and their share of dq.
template <class T, class C>
void backward(const Problem& p, const Sight& sight, long b, long group, long split, int first, int last, float scale) {
  Backward<C> x{p, sight, scale};
  const long each = p.heads / p.groups, padded = up(p.queries, SOME), blocks = (p.queries + BLOCK - 1) / BLOCK;
  for (int key = first; key < last; key += BLOCK) {
    const int n = std::min(BLOCK, last - key);
    const Span ids = sight.ids(key, n);
    x.template take_keys<T>(b, group, key, n);
    for (long head = group * each; head < (group + 1) * each; head++)
      for (int query = 0; query < p.queries; query += BLOCK) {
        const int m = std::min<long>(BLOCK, p.queries - query);
        const Lanes seen = sight.see(key, n, ids, query, query + m);
        if (seen.from >= seen.to) continue;
        const long at = (split * p.batch + b) * p.heads + head;
        char& touched = p.touched[at * blocks + query / BLOCK];
        x.template take_queries<T>(b, head, query, m);
        x.meet(p.sums + (at * padded + query) * x.columns, touched);
        touched = true;
      }
    for (int i = 0; i < n; i++) {
      put(x.dk + i * x.columns, scale, p.at<T>(p.dk, b, key + i, group), p.width);
      put(x.dv + i * x.columns, 1, p.at<T>(p.dv, b, key + i, group), p.width);
    }
  }
}

// One query: the product of its gradient with its output, which the softmax takes off all slopes.
template <class T> void delta_of(const Problem& p, long b, long row) {
  for (long head = 0; head < p.heads; head++) {
    const T *g = p.at<T>(p.grad, b, row, head), *o = p.at<T>(p.out, b, row, head);
    vec sum{};
    int j = 0;
    for (; j + W <= p.width; j += W) sum += load(g + j) * load(o + j);
    T x[W] = {}, y[W] = {};
    std::copy(g + j, g + p.width, x);
    std::copy(o + j, o + p.width, y);
    sum += load(x) * load(y);
    p.delta[(b * p.heads + head) * p.queries + row] = fold(sum, [](vec a, vec b) { return a + b; });
  }
}

// One query: its gradient, of the parts there are.
template <class T> void dq_of(const Problem& p, long b, long row, float scale) {
  const long padded = up(p.queries, SOME), columns = p.columns(), blocks = (p.queries + BLOCK - 1) / BLOCK;
  std::vector<float> sum(columns);
  for (long head = 0; head < p.heads; head++) {
    std::fill(sum.begin(), sum.end(), 0.f);
    for (long i = 0; i < p.splits; i++) {
      const long at = (i * p.batch + b) * p.heads + head;
      if (p.touched[at * blocks + row / BLOCK])
        for (int j = 0; j < columns; j += W)
          store(&sum[j], load(&sum[j]) + load(p.sums + (at * padded + row) * columns + j));
    }
    put(sum.data(), scale, p.at<T>(p.dq, b, row, head), p.width);
  }
}

template <class T, class C> void run_forward(const Problem& p, float scale) {
  std::vector<Sight> sights;
  for (long b = 0; b < p.batch; b++) sights.emplace_back(p, b, false);
  const long pairs = p.batch * p.heads, least = (p.queries + QUERIES - 1) / QUERIES;
  const long most = (p.queries + TILE / 4 - 1) / (TILE / 4);  // a row's result is the same in any tile
  const long tiles = std::min(most, std::max(least, (4 * p.threads + pairs - 1) / pairs));
  const long size = up((p.queries + tiles - 1) / tiles, ROWS<C>);
  const long items = pairs * ((p.queries + size - 1) / size);
#pragma omp parallel num_threads(p.threads)
  {
    Matrices ready;
#pragma omp for schedule(dynamic)
    for (long i = items - 1; i >= 0; i--) {  // with causal order the last tiles are the longest
      const long first = i / pairs * size, b = i / p.heads % p.batch, head = i % p.heads;
      forward<T, C>(p, sights[b], b, head, first, std::min(size, p.queries - first), scale);
    }
  }
}

template <class T, class C> void run_backward(const Problem& p, float scale) {
  std::vector<Sight> sights;
  for (long b = 0; b < p.batch; b++) sights.emplace_back(p, b, true);
  const long blocks = (p.keys + BLOCK - 1) / BLOCK, items = p.batch * p.groups * p.splits;
#pragma omp parallel num_threads(p.threads)
  {
    Matrices ready;
#pragma omp for schedule(static)
    for (long i = 0; i < p.batch * p.queries; i++) delta_of<T>(p, i / p.queries, i % p.queries);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < items; i++) {
      const long split = i / (p.batch * p.groups), b = i / p.groups % p.batch, group = i % p.groups;
      const long first = blocks * split / p.splits * BLOCK, last = blocks * (split + 1) / p.splits * BLOCK;
      backward<T, C>(p, sights[b], b, group, split, first, std::min<long>(last, p.keys), scale);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < p.batch * p.queries; i++) dq_of<T>(p, i / p.queries, i % p.queries, scale);
  }
}

// ---- a few queries, without a gradient

constexpr int MOST = 8;  // rows, queries of heads that share a group, for which keys and values are read together

// `rest` numbers, or a vector of them, and zeros.
template <class T> inline vec some(const T* p, int rest) {
  if (rest >= W) return load(p);
  T part[W]{};
  std::copy_n(p, std::max(0, rest), part);
  return load(part);
}

// N vectors of the outputs of R rows, from the one of number `column` on: weights w [R, keys] times values.
template <int R, int N, class T>
void outputs(const T* v, int64_t row, int keys, int rest, const float* w, long apart, const float* sums, T* const* to) {
  vec o[R][N]{};
  for (int key = 0; key < keys; key++, v += row)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      const vec part = N == 1 ? some(v, rest) : load(v + j * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) o[r][j] += w[r * apart + key] * part;
    }
  for (int r = 0; r < R; r++) {
    float line[N * W];
    for (int j = 0; j < N; j++) store(line + j * W, o[r][j]);
    put(line, sums[r] == 0 ? 0 : 1 / sums[r], to[r], std::min(rest, N * W));  // a row that sees nothing gives 0
  }
}

// R rows from `first` on, which count the heads of a group query by query.
template <int R, class T> void few(const Problem& p, long b, long group, int first, float scale) {
  const int shared = p.heads / p.groups, columns = p.columns();
  const long end = p.start + (first + R - 1) / shared + 1, keys = p.causal ? std::clamp(end, 0L, long(p.keys)) : p.keys;
  const long apart = up(keys, W);
  float *q = scratch<float>(0, R * columns), *s = scratch<float>(1, R * apart), sums[R];
  int ids[R];
  long last[R];
  T* out[R];
  for (int r = 0; r < R; r++) {
    const long query = (first + r) / shared, head = group * shared + (first + r) % shared;
    const T* from = p.at<T>(p.q, b, query, head);
    for (int j = 0; j < columns; j += W) store(q + r * columns + j, some(from + j, p.width - j) * (scale * LOG2E));
    ids[r] = p.query_segments ? p.query_segments[b * p.queries + query] : 0;
    last[r] = p.causal ? p.start + query : keys;
    out[r] = p.at<T>(p.out, b, query, head);
  }
  const T* k = p.at<T>(p.k, b, 0, group);
  for (long key = 0; key < keys; key++, k += p.k.row) {
    vec dots[R]{};
    for (int j = 0; j < columns; j += W) {
      const vec part = some(k + j, p.width - j);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) dots[r] += part * load(q + r * columns + j);
    }
    const int id = p.key_segments ? p.key_segments[b * p.keys + key] : 0;
    for (int r = 0; r < R; r++) {
      const bool seen = key <= last[r] && (!p.key_segments || (id == ids[r] && id > 0));
      s[r * apart + key] = seen ? fold(dots[r], [](vec a, vec b) { return a + b; }) : HIDDEN;
    }
  }
  for (int r = 0; r < R; r++) {
    float* row = s + r * apart;
    std::fill(row + keys, row + apart, HIDDEN);
    vec high = all(NONE), sum{};
    for (int j = 0; j < apart; j += W) high = max(high, load(row + j));
    const float top = fold(high, max);
    for (int j = 0; j < apart; j += W) {
      const vec x = exp2<float>(load(row + j) - top);
      sum += x;
      store(row + j, x);
    }
    sums[r] = fold(sum, [](vec a, vec b) { return a + b; });
  }
  const T* v = p.at<T>(p.v, b, 0, group);
  for (int j = 0, rest = p.width; rest > 0;) {
    const int step = rest >= SIDE * W ? SIDE * W : W;
    (step == W ? outputs<R, 1, T> : outputs<R, SIDE, T>)(v + j, p.v.row, keys, rest, s, apart, sums, out);
    for (int r = 0; r < R; r++) out[r] += step;
    j += step, rest -= step;
  }
}

template <class T> void run_few(const Problem& p, float scale) {
  const long rows = p.queries * p.heads / p.groups, all_rows = p.batch * p.groups * rows;
  const long each = std::clamp<long>((all_rows + p.threads - 1) / p.threads, 1, std::min<long>(MOST, rows));
  const long parts = (rows + each - 1) / each;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (long i = 0; i < p.batch * p.groups * parts; i++) {
    const long first = i % parts * each, group = i / parts % p.groups, b = i / parts / p.groups;
    choose(std::min(each, rows - first), std::make_integer_sequence<int, MOST>(),
           [&](auto count) { few<count.value, T>(p, b, group, first, scale); });
  }
}

}  // namespace

#if defined(__AVX512BF16__)
typedef bf16 Half;
#else
typedef float Half;  // bf16 is widened
#endif

// Whether the system lets this process use what the kernels were compiled for.
extern "C" int attention_allowed() { return matrices_allowed(); }

extern "C" void attention_forward(const Problem* p, double scale) {
  p->half ? run_forward<bf16, Half>(*p, scale) : run_forward<float, float>(*p, scale);
}

extern "C" void attention_backward(const Problem* p, double scale) {
  p->half ? run_backward<bf16, Half>(*p, scale) : run_backward<float, float>(*p, scale);
}

extern "C" void attention_few(const Problem* p, double scale) {
  p->half ? run_few<bf16>(*p, scale) : run_few<float>(*p, scale);
}
