// The machine behind the emulated Ascend C API: cores, pipes, memories, clocks, costs, and the launch of a kernel.
//
// Written from the public documentation of Ascend C (hiascend.com, "Ascend C API" and "Operator development guide",
// CANN 8.x). Every core runs as a coroutine and executes its instructions in program order; what the hardware does in
// parallel is kept as vector clocks. An instruction of one pipe that touches bytes which another pipe (or another core)
// wrote, or still reads, without a queue, a flag or a cross-core flag between the two is an error, as are bytes that
// nobody wrote. The same order carries times, so that a run also gives an estimate of cycles.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

namespace emu {
constexpr int PIPES = 7;
enum Space { UB, L1, L0A, L0B, L0C, SPACES };
constexpr size_t BYTES[SPACES] = {192 << 10, 512 << 10, 64 << 10, 64 << 10, 128 << 10};  // 910B, per core
constexpr const char* NAMES[SPACES] = {"UB", "L1", "L0A", "L0B", "L0C"};
constexpr const char* PIPE_NAMES[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
constexpr int CORES = 3;  // of a group: one cube core and two vector cores

struct At { const char* file; int line; };
#define EMU_AT emu::At at = {__builtin_FILE(), __builtin_LINE()}

// Rates, in cycles and bytes per cycle of one core at 1.8 GHz. [P] public figure, [A] assumption of ours.
namespace rate {
constexpr double HERTZ = 1.8e9;          // [P] 910B2: 24 cube cores x 8192 FLOP x 1.8 GHz = 353.9 TFLOP/s
constexpr double CUBES = 24, VECTORS = 48;  // [P]
constexpr double HBM = 1.6 * 1099511627776.0 / HERTZ;  // [P] 1.6 TiB/s, whole chip
constexpr double L2 = 7e12 / HERTZ;      // [P] 7 TB/s mixed, 192 MB: best-practice guide, "L2Cache切分"
constexpr double MTE = 128;              // [A] bytes per cycle of one core's path to L2, each direction
constexpr double LOAD = 256;             // [A] L1 to L0A and L0B
constexpr double DMA_START = 32;         // [A] per transfer instruction
constexpr double DMA_BLOCK = 4;          // [A] per row of a transfer
constexpr double LATENCY = 400;          // [A] from the end of a transfer to its data being there
constexpr double VECTOR_START = 8;       // [A] per vector instruction; then one repeat of 256 bytes per cycle [P]
constexpr double SLOW = 4;               // [A] Exp, Ln, Sqrt, Div: cycles per repeat
constexpr double GATHER = 8;             // [A] one 32-byte block per cycle
constexpr double CUBE_START = 16;        // [A] per Mmad; then one 16x16x16 product of b16 per cycle [P]
constexpr double FLAG = 20;              // [A] set and wait within a core
constexpr double CROSS = 200;            // [A] set and wait between cores
constexpr double ISSUE = 2;              // [A] scalar unit, per instruction
}  // namespace rate

struct Clock { uint32_t tick[CORES * PIPES] = {}; double time = 0; };
inline void join(Clock& a, const Clock& b) {
  for (int i = 0; i < CORES * PIPES; i++) a.tick[i] = std::max(a.tick[i], b.tick[i]);
  a.time = std::max(a.time, b.time);
}

struct Block { uint32_t wrote = 0, read = 0; uint8_t writer = 255, reader = 255; };  // of 32 bytes, by pipe
struct Memory { std::vector<uint8_t> data, known; std::vector<Block> blocks; size_t used = 0; };

enum Slot : uint8_t { FREE, HELD, QUEUED, TAKEN };
struct Queue {  // the buffers of one TQue
  std::vector<Slot> state; std::vector<uint32_t> generation; std::vector<Clock> ready, freed; int line = 0;
};

struct Counts { double ops[PIPES] = {}, bytes[PIPES] = {}, busy[PIPES] = {}; };

struct Core {
  int index = 0, block = 0; bool cube = false;
  Memory memory[SPACES];
  Clock clock[PIPES]; double free[PIPES] = {}, done[PIPES] = {};
  Counts counts;
  std::vector<std::shared_ptr<Queue>> queues;
  std::map<int, Clock> events;               // of SetFlag, by event and id
  std::map<int, std::vector<Clock>> inbox;   // of CrossCoreSetFlag, by id
  bool atomic = false, finished = false, waiting = false;
  ucontext_t context; std::vector<uint8_t> stack;
};

struct Cell { uint32_t wrote = 0, read = 0; int16_t writer = -1, reader = -1; };
struct Region {  // one tensor of global memory: role 0 input, 1 output, 2 initialised and written, 3 scratch
  uint8_t* data; size_t bytes, grain; int role;
  std::vector<uint8_t> known, cached; std::vector<Cell> cells;
};

inline struct State {
  std::vector<std::unique_ptr<Core>> cores; std::vector<Region> regions; Core* core = nullptr;
  ucontext_t main; std::function<void()> body; std::string name, error; At at{"", 0};
  int blocks = 0, group = 0; bool mix = false;
  Counts total[2]; double cycles = 0, hbm = 0, l2 = 0, share = 1;
} state;

[[noreturn]] inline void fail(const std::string& rule) {
  const char* file = strrchr(state.at.file, '/');
  throw std::runtime_error(state.name + ": " + (file ? file + 1 : state.at.file) + ":" + std::to_string(state.at.line) +
                           ": " + rule);
}
template <class... A> std::string text(const char* form, A... a) {
  char buffer[400]; snprintf(buffer, sizeof buffer, form, a...); return buffer;
}
#define EMU_CHECK(condition, ...) do { if (!(condition)) emu::fail(emu::text(__VA_ARGS__)); } while (0)
inline Core& me() { return *state.core; }

// One instruction on a pipe: its place in the order of its pipe, and its time.
inline void instruction(int p, double busy, double bytes = 0, double latency = 0) {
  Core& c = me();
  c.clock[p].tick[c.index * PIPES + p]++;
  c.clock[PIPE_S].time += rate::ISSUE;
  double start = std::max({c.free[p], c.clock[p].time, c.clock[PIPE_S].time});
  c.free[p] = start + busy;
  c.done[p] = std::max(c.done[p], c.free[p] + latency);
  if (p == PIPE_S) c.clock[p].time = c.free[p];
  c.counts.ops[p]++; c.counts.bytes[p] += bytes; c.counts.busy[p] += busy;
}
inline Clock snapshot(int p) { Clock s = me().clock[p]; s.time = std::max(s.time, me().done[p]); return s; }

// Bytes of a local memory that the current instruction of pipe p reads or writes.
inline void touch(Space space, size_t offset, size_t bytes, int p, bool write) {
  if (!bytes) return;
  Core& c = me(); Memory& m = c.memory[space];
  EMU_CHECK(offset + bytes <= m.used, "%s access [%zu, %zu) outside of the %zu bytes in buffers", NAMES[space], offset,
            offset + bytes, m.used);
  if (write) memset(&m.known[offset], 1, bytes);
  else {
    auto* hole = static_cast<uint8_t*>(memchr(&m.known[offset], 0, bytes));
    EMU_CHECK(!hole, "uninitialised read of %s byte %zu (%zu into a read of %zu)", NAMES[space],
              size_t(hole - m.known.data()), size_t(hole - &m.known[offset]), bytes);
  }
  const Clock& clock = c.clock[p]; uint32_t now = clock.tick[c.index * PIPES + p];
  for (size_t b = offset / 32; b <= (offset + bytes - 1) / 32; b++) {
    Block& k = m.blocks[b];
    auto ordered = [&](int q, uint32_t t) { return q == 255 || q == p || clock.tick[c.index * PIPES + q] >= t; };
    EMU_CHECK(ordered(k.writer, k.wrote), "missing wait: pipe %s %s %s bytes that pipe %s is writing", PIPE_NAMES[p],
              write ? "overwrites" : "reads", NAMES[space], PIPE_NAMES[k.writer]);
    if (write) {
      EMU_CHECK(ordered(k.reader, k.read), "missing wait: pipe %s overwrites %s bytes that pipe %s is reading",
                PIPE_NAMES[p], NAMES[space], PIPE_NAMES[k.reader]);
      k.writer = p; k.wrote = now;
    } else { k.reader = p; k.read = now; }
  }
}

inline Region& region(const void* p, size_t bytes) {
  auto* a = static_cast<const uint8_t*>(p);
  for (auto& r : state.regions) if (a >= r.data && a < r.data + r.bytes) {
    EMU_CHECK(a + bytes <= r.data + r.bytes, "global memory overflow: %zu bytes past the end of tensor %zu",
              size_t(a + bytes - r.data - r.bytes), size_t(&r - state.regions.data()));
    return r;
  }
  fail("global memory access outside of every tensor");
}

// Bytes of global memory that the current instruction reads or writes; counts what comes from HBM and what from L2.
inline void global(const void* p, size_t bytes, int pipe, bool write) {
  if (!bytes) return;
  Core& c = me(); Region& r = region(p, bytes); size_t offset = static_cast<const uint8_t*>(p) - r.data;
  EMU_CHECK(!write || r.role, "the kernel writes an input");
  if (!write) {
    auto* hole = static_cast<uint8_t*>(memchr(&r.known[offset], 0, bytes));
    EMU_CHECK(!hole, "uninitialised read of global memory, tensor %zu byte %zu", size_t(&r - state.regions.data()),
              size_t(hole - r.known.data()));
  } else memset(&r.known[offset], 1, bytes);
  state.l2 += bytes;
  for (size_t l = offset / 512; l <= (offset + bytes - 1) / 512; l++)
    if (!r.cached[l]) { r.cached[l] = 1; state.hbm += std::min<size_t>(512, r.bytes - l * 512); }
  if (r.role == 0) return;
  int thread = (state.group * CORES + c.index) * PIPES + pipe;
  const Clock& clock = c.clock[pipe]; uint32_t now = clock.tick[c.index * PIPES + pipe];
  auto ordered = [&](int t, uint32_t when) {
    if (t < 0 || t == thread) return true;
    return t / (CORES * PIPES) == state.group && clock.tick[t % (CORES * PIPES)] >= when;
  };
  bool add = write && c.atomic; const Cell* last = nullptr; Cell before;
  for (size_t i = offset / r.grain; i <= (offset + bytes - 1) / r.grain; i++) {
    Cell& k = r.cells[i];
    bool same = last && !memcmp(&k, &before, sizeof k); before = k; last = &k;
    if (!same) {
      bool both = add && k.writer <= -2;
      EMU_CHECK(both || ordered(k.writer <= -2 ? -2 - k.writer : k.writer, k.wrote),
                "race in global memory: %s of tensor %zu byte %zu without waiting for the core that writes it",
                write ? "write" : "read", size_t(&r - state.regions.data()), i * r.grain);
      EMU_CHECK(!write || ordered(k.reader, k.read),
                "race in global memory: write of tensor %zu byte %zu without waiting for the core that reads it",
                size_t(&r - state.regions.data()), i * r.grain);
    }
    if (write) { k.writer = add ? -2 - thread : thread; k.wrote = now; } else { k.reader = thread; k.read = now; }
  }
}

inline void yield() { Core* c = state.core; swapcontext(&c->context, &state.main); state.core = c; }

inline void finish() {  // what must hold when a kernel returns
  for (auto& q : me().queues) for (size_t i = 0; i < q->state.size(); i++) {
    state.at.line = q->line;
    EMU_CHECK(q->state[i] == FREE, "buffer %zu of the queue is %s at the end: %s missing", i,
              q->state[i] == QUEUED ? "still enqueued" : "not freed", q->state[i] == QUEUED ? "DeQue" : "FreeTensor");
  }
  EMU_CHECK(me().events.empty(), "SetFlag without WaitFlag at the end of the kernel");
  for (auto& f : me().inbox) EMU_CHECK(f.second.empty(), "cross-core flag %d was set and never awaited", f.first);
  EMU_CHECK(!me().atomic, "SetAtomicNone missing at the end of the kernel");
}

inline void enter() {
  try { state.body(); finish(); }
  catch (const std::exception& e) { if (state.error.empty()) state.error = e.what(); }
  me().finished = true;
  swapcontext(&me().context, &state.main);
}

inline void reset(Core& c, int index, int block, bool cube) {
  c.index = index; c.block = block; c.cube = cube;
  for (int s = 0; s < SPACES; s++) {
    Memory& m = c.memory[s];
    m.data.resize(BYTES[s] + 64); m.known.assign(BYTES[s], 0); m.blocks.assign(BYTES[s] / 32, Block()); m.used = 0;
  }
  for (int p = 0; p < PIPES; p++) { c.clock[p] = Clock(); c.free[p] = c.done[p] = 0; }
  c.counts = Counts(); c.queues.clear(); c.events.clear(); c.inbox.clear();
  c.atomic = c.finished = c.waiting = false; c.stack.resize(1 << 18);
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = c.stack.data(); c.context.uc_stack.ss_size = c.stack.size(); c.context.uc_link = nullptr;
  makecontext(&c.context, enter, 0);
}

inline void run_group(int cores) {
  for (bool moved = true; moved && state.error.empty();) {
    moved = false;
    for (int i = 0; i < cores && state.error.empty(); i++) {
      Core* c = state.cores[i].get();
      if (c->finished || c->waiting) continue;
      state.core = c; swapcontext(&state.main, &c->context); moved = true;
    }
  }
  for (int i = 0; i < cores && state.error.empty(); i++) if (!state.cores[i]->finished)
    state.error = state.name + ": deadlock: a core waits for a cross-core flag that nobody sets";
  for (int i = 0; i < cores; i++) {
    Core& c = *state.cores[i]; Counts& t = state.total[c.cube];
    for (int p = 0; p < PIPES; p++) {
      t.ops[p] += c.counts.ops[p]; t.bytes[p] += c.counts.bytes[p]; t.busy[p] += c.counts.busy[p];
      state.cycles = std::max({state.cycles, c.done[p], c.clock[p].time});
    }
  }
}

inline int launch(const char* name, std::function<void()> body, int blocks, bool mix) {
  state.name = name; state.body = body; state.blocks = blocks; state.mix = mix; state.error.clear(); state.at = {"", 0};
  state.total[0] = state.total[1] = Counts(); state.cycles = state.hbm = state.l2 = 0;
  state.share = mix ? rate::HBM / rate::CUBES : rate::HBM / rate::VECTORS;
  int cores = mix ? CORES : 1;
  while (int(state.cores.size()) < cores) state.cores.push_back(std::make_unique<Core>());
  for (state.group = 0; state.group < blocks && state.error.empty(); state.group++) {
    for (int i = 0; i < cores; i++) reset(*state.cores[i], i, state.group, mix && i == 0);
    run_group(cores);
  }
  for (auto& r : state.regions) if (state.error.empty() && r.role == 1) {
    auto* hole = static_cast<uint8_t*>(memchr(r.known.data(), 0, r.bytes));
    if (hole) state.error = state.name + text(": output tensor %zu was never written at byte %zu",
                                              size_t(&r - state.regions.data()), size_t(hole - r.known.data()));
  }
  return state.error.empty() ? 0 : 1;
}

template <class... A, size_t... I>
int call(const char* name, void (*kernel)(A...), uint8_t** args, int blocks, bool mix, std::index_sequence<I...>) {
  return launch(name, [=] { kernel(args[I]...); }, blocks, mix);
}
template <class... A> int call(const char* name, void (*kernel)(A...), uint8_t** args, int blocks, bool mix) {
  return call(name, kernel, args, blocks, mix, std::index_sequence_for<A...>());
}
}  // namespace emu

extern "C" void emu_clear() { emu::state.regions.clear(); }
extern "C" void emu_tensor(uint8_t* data, size_t bytes, size_t grain, int role) {
  using namespace emu;
  state.regions.push_back({data, bytes, grain, role, std::vector<uint8_t>(bytes, role == 0 || role == 2),
                           std::vector<uint8_t>(bytes / 512 + 1), std::vector<Cell>(role ? bytes / grain + 1 : 0)});
}
extern "C" const char* emu_error() { return emu::state.error.c_str(); }
// cycles, HBM bytes, L2 bytes, then ops, bytes and busy cycles by pipe of the vector cores and of the cube cores
extern "C" void emu_counts(double* out) {
  using namespace emu;
  *out++ = state.cycles; *out++ = state.hbm; *out++ = state.l2;
  for (auto& t : state.total) for (auto* a : {t.ops, t.bytes, t.busy}) for (int p = 0; p < PIPES; p++) *out++ = a[p];
}
extern "C" void emu_rates(double* out) {
  using namespace emu::rate;
  for (double r : {HERTZ, CUBES, VECTORS, HBM, L2}) *out++ = r;
}
#define EMULATE(kernel, mix) \
  extern "C" int run_##kernel(uint8_t** args, int blocks) { return emu::call(#kernel, kernel, args, blocks, mix); }
