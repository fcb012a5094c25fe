// Types, tensors, buffers, queues and flags of the emulated Ascend C API.
#pragma once
#include "machine.h"
#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*
#define ASCEND_IS_AIC (emu::me().cube)
#define ASCEND_IS_AIV (!emu::me().cube)
enum { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIC_1_2 };
#define KERNEL_TASK_TYPE_DEFAULT(type) \
  EMU_CHECK(emu::state.mix == (type == KERNEL_TYPE_MIX_AIC_1_2), "kernel type " #type " is not how it was launched")

typedef _Float16 half;
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    bits = std::isnan(f) ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const { uint32_t u = uint32_t(bits) << 16; float f; memcpy(&f, &u, 4); return f; }
};

namespace AscendC {
using emu::me; using emu::state; using emu::Space;
enum class TPosition { GM, VECIN, VECOUT, VECCALC, A1, B1, A2, B2, CO1 };
enum class HardEvent { MTE2_V, V_MTE2, V_MTE3, MTE3_V, V_S, S_V, MTE2_S, S_MTE2, MTE3_S, S_MTE3, MTE3_MTE2, MTE2_MTE1,
                       MTE1_MTE2, MTE1_M, M_MTE1, M_FIX, FIX_M };
typedef int event_t;
constexpr Space space(TPosition p) {
  return p <= TPosition::VECCALC ? emu::UB : p <= TPosition::B1 ? emu::L1 : p == TPosition::A2 ? emu::L0A
         : p == TPosition::B2 ? emu::L0B : emu::L0C;
}
constexpr int producer(TPosition p) {
  return p == TPosition::VECIN || p == TPosition::A1 || p == TPosition::B1 ? PIPE_MTE2
         : p == TPosition::A2 || p == TPosition::B2 ? PIPE_MTE1 : p == TPosition::CO1 ? PIPE_M : PIPE_V;
}
constexpr int consumer(TPosition p) {
  return p == TPosition::VECOUT ? PIPE_MTE3 : p == TPosition::A1 || p == TPosition::B1 ? PIPE_MTE1
         : p == TPosition::A2 || p == TPosition::B2 ? PIPE_M : p == TPosition::CO1 ? PIPE_FIX : PIPE_V;
}

inline int64_t GetSubBlockIdx() { return me().cube ? 0 : me().index - (state.mix ? 1 : 0); }
inline int64_t GetTaskRation() { return state.mix ? 2 : 1; }
inline int64_t GetBlockIdx() {  // cube cores count groups, vector cores count themselves
  return me().cube || !state.mix ? me().block : me().block * 2 + GetSubBlockIdx();
}
inline int64_t GetBlockNum() { return state.blocks; }

template <class T> struct GlobalTensor {
  T* data = nullptr; uint64_t size = 0;
  void SetGlobalBuffer(T* p, uint64_t n = ~uint64_t(0) >> 8) { data = p; size = n; }
  GlobalTensor operator[](uint64_t o) const {
    EMU_CHECK(o <= size, "global offset %llu in a tensor of %llu", (unsigned long long)o, (unsigned long long)size);
    GlobalTensor r; r.data = data + o; r.size = size - o; return r;
  }
  T GetValue(uint64_t i, EMU_AT) const {
    state.at = at; EMU_CHECK(i < size, "GetValue %llu out of range", (unsigned long long)i);
    emu::instruction(PIPE_S, emu::rate::ISSUE); emu::global(data + i, sizeof(T), PIPE_S, false); return data[i];
  }
};

template <class T> struct LocalTensor {
  Space where = emu::UB; uint32_t offset = 0, size = 0; emu::Queue* queue = nullptr; int slot = 0; uint32_t generation = 0;
  T* data() const { return reinterpret_cast<T*>(me().memory[where].data.data() + offset); }
  LocalTensor operator[](uint32_t o) const {
    EMU_CHECK(o <= size, "local offset %u in a tensor of %u", o, size);
    LocalTensor r = *this; r.offset += o * sizeof(T); r.size -= o; return r;
  }
  uint32_t GetSize() const { return size; }
  template <class U> LocalTensor<U> ReinterpretCast() const {
    return {where, offset, uint32_t(size * sizeof(T) / sizeof(U)), queue, slot, generation};
  }
  void alive() const {  // between AllocTensor and EnQue, or between DeQue and FreeTensor
    if (!queue) return;
    EMU_CHECK(queue->generation[slot] == generation && queue->state[slot] != emu::FREE, "tensor used after FreeTensor");
    EMU_CHECK(queue->state[slot] != emu::QUEUED, "tensor used between EnQue and DeQue");
  }
  // n elements from element o, by an instruction of pipe p
  T* access(uint64_t o, uint64_t n, int p, bool write) const {
    alive();
    EMU_CHECK(o + n <= size, "%s of elements [%llu, %llu) of a tensor of %u", write ? "write" : "read",
              (unsigned long long)o, (unsigned long long)(o + n), size);
    emu::touch(where, offset + o * sizeof(T), n * sizeof(T), p, write);
    return data() + o;
  }
  void aligned(uint32_t bytes = 32) const {
    EMU_CHECK(offset % bytes == 0, "%s address %u is not a multiple of %u bytes", emu::NAMES[where], offset, bytes);
  }
  T GetValue(uint32_t i, EMU_AT) const {
    state.at = at; emu::instruction(PIPE_S, emu::rate::ISSUE); return *access(i, 1, PIPE_S, false);
  }
  void SetValue(uint32_t i, T v, EMU_AT) const {
    state.at = at; emu::instruction(PIPE_S, emu::rate::ISSUE); *access(i, 1, PIPE_S, true) = v;
  }
};

template <TPosition P> struct TBuf {
  uint32_t offset = 0, bytes = 0;
  template <class T> LocalTensor<T> Get(uint32_t n, EMU_AT) const {
    state.at = at; EMU_CHECK(n * sizeof(T) <= bytes, "TBuf of %u bytes is too small for %u elements", bytes, n);
    return {space(P), offset, n};
  }
  template <class T> LocalTensor<T> Get() const { return {space(P), offset, uint32_t(bytes / sizeof(T))}; }
};

template <TPosition P, int depth> struct TQue {
  std::shared_ptr<emu::Queue> q = std::make_shared<emu::Queue>();
  std::vector<uint32_t> offsets; uint32_t bytes = 0; std::vector<int> order; int next = 0;
  template <class T> LocalTensor<T> tensor(int i) {
    return {space(P), offsets[i], uint32_t(bytes / sizeof(T)), q.get(), i, q->generation[i]};
  }
  template <class T> LocalTensor<T> AllocTensor(EMU_AT) {
    state.at = at; EMU_CHECK(!offsets.empty(), "AllocTensor before InitBuffer");
    int i = 0, n = int(offsets.size());
    for (; i < n; i++) if (q->state[(next + i) % n] == emu::FREE) break;
    EMU_CHECK(i < n, "AllocTensor: all %d buffers are in use, FreeTensor missing", n);
    i = (next + i) % n; next = (i + 1) % n;
    q->state[i] = emu::HELD; q->generation[i]++;
    emu::join(me().clock[producer(P)], q->freed[i]);
    memset(&me().memory[space(P)].known[offsets[i]], 0, bytes);
    return tensor<T>(i);
  }
  template <class T> void EnQue(const LocalTensor<T>& t, EMU_AT) {
    state.at = at; EMU_CHECK(t.queue == q.get() && q->state[t.slot] == emu::HELD, "EnQue of what this queue did not allocate");
    EMU_CHECK(int(order.size()) < depth, "EnQue: more than the %d tensors that the queue is deep", depth);
    q->state[t.slot] = emu::QUEUED; order.push_back(t.slot); q->ready[t.slot] = emu::snapshot(producer(P));
    q->ready[t.slot].time += emu::rate::FLAG;
  }
  template <class T> LocalTensor<T> DeQue(EMU_AT) {
    state.at = at; EMU_CHECK(!order.empty(), "DeQue of an empty queue");
    int i = order.front(); order.erase(order.begin()); q->state[i] = emu::TAKEN;
    emu::join(me().clock[consumer(P)], q->ready[i]);
    return tensor<T>(i);
  }
  template <class T> void FreeTensor(const LocalTensor<T>& t, EMU_AT) {
    state.at = at; EMU_CHECK(t.queue == q.get(), "FreeTensor of what this queue did not allocate");
    EMU_CHECK(q->generation[t.slot] == t.generation && q->state[t.slot] != emu::FREE, "FreeTensor twice");
    EMU_CHECK(q->state[t.slot] != emu::QUEUED, "FreeTensor between EnQue and DeQue");
    q->state[t.slot] = emu::FREE; q->freed[t.slot] = emu::snapshot(consumer(P));
    q->freed[t.slot].time += emu::rate::FLAG;
  }
};

struct TPipe {
  int ids[32] = {};
  uint32_t reserve(Space s, uint32_t bytes) {
    auto& m = me().memory[s];
    EMU_CHECK(bytes > 0, "InitBuffer of 0 bytes");
    EMU_CHECK(s == emu::UB ? !me().cube : !state.mix || me().cube, "%s is not on this kind of core", emu::NAMES[s]);
    EMU_CHECK(m.used + bytes <= emu::BYTES[s], "%s overflow: %zu + %u bytes of %zu", emu::NAMES[s], m.used, bytes,
              emu::BYTES[s]);
    uint32_t offset = m.used; m.used += bytes; return offset;
  }
  template <TPosition P, int depth> void InitBuffer(TQue<P, depth>& q, uint8_t number, uint32_t bytes, EMU_AT) {
    state.at = at; bytes = (bytes + 31) / 32 * 32; q.bytes = bytes;
    for (int i = 0; i < number; i++) q.offsets.push_back(reserve(space(P), bytes));
    q.q->state.assign(number, emu::FREE); q.q->generation.assign(number, 0); q.q->line = at.line;
    q.q->ready.resize(number); q.q->freed.resize(number);
    me().queues.push_back(q.q);
  }
  template <TPosition P> void InitBuffer(TBuf<P>& b, uint32_t bytes, EMU_AT) {
    state.at = at; b.bytes = (bytes + 31) / 32 * 32; b.offset = reserve(space(P), b.bytes);
  }
  template <HardEvent e> event_t AllocEventID() { return ids[int(e)]++; }
  event_t FetchEventID(HardEvent e) { return ids[int(e)]; }
};

constexpr int first(HardEvent e) {
  constexpr int from[] = {PIPE_MTE2, PIPE_V, PIPE_V, PIPE_MTE3, PIPE_V, PIPE_S, PIPE_MTE2, PIPE_S, PIPE_MTE3, PIPE_S,
                          PIPE_MTE3, PIPE_MTE2, PIPE_MTE1, PIPE_MTE1, PIPE_M, PIPE_M, PIPE_FIX};
  return from[int(e)];
}
constexpr int second(HardEvent e) {
  constexpr int to[] = {PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_V, PIPE_S, PIPE_V, PIPE_S, PIPE_MTE2, PIPE_S, PIPE_MTE3,
                        PIPE_MTE2, PIPE_MTE1, PIPE_MTE2, PIPE_M, PIPE_MTE1, PIPE_FIX, PIPE_M};
  return to[int(e)];
}
template <HardEvent e> void SetFlag(event_t id, EMU_AT) {
  state.at = at; int key = int(e) * 8 + id;
  EMU_CHECK(id >= 0 && id < 8, "event id %d is not 0 to 7", id);
  EMU_CHECK(!me().events.count(key), "SetFlag of a flag that is set");
  me().events[key] = emu::snapshot(first(e)); me().events[key].time += emu::rate::FLAG;
}
template <HardEvent e> void WaitFlag(event_t id, EMU_AT) {
  state.at = at; auto f = me().events.find(int(e) * 8 + id);
  EMU_CHECK(f != me().events.end(), "deadlock: WaitFlag of a flag that is not set");
  emu::join(me().clock[second(e)], f->second); me().events.erase(f);
}
template <pipe_t p> void PipeBarrier(EMU_AT) {
  state.at = at; EMU_CHECK(p != PIPE_S, "PipeBarrier<PIPE_S> is a hardware error");
  if (p != PIPE_ALL) return;  // an instruction's own pipe is in order here
  emu::Clock all; for (int i = 0; i < emu::PIPES; i++) emu::join(all, emu::snapshot(i));
  for (auto& c : me().clock) emu::join(c, all);
}
template <uint8_t mode, pipe_t p> void CrossCoreSetFlag(uint16_t id, EMU_AT) {
  static_assert(mode == 2, "the emulator knows mode 2: cube and vector cores of a group");
  state.at = at; EMU_CHECK(state.mix && id <= 10, "cross-core flag %d is not 0 to 10, or the kernel is not mixed", id);
  emu::Clock now = emu::snapshot(p); now.time += emu::rate::CROSS;
  auto deliver = [&](int core, int key) {
    auto& box = state.cores[core]->inbox[key]; box.push_back(now);
    EMU_CHECK(box.size() <= 15, "cross-core flag %d is set more than 15 times", id);
  };
  if (me().cube) { deliver(1, id); deliver(2, id); } else deliver(0, id * 3 + 1000 + me().index);
  for (auto& c : state.cores) c->waiting = false;
}
template <uint8_t mode = 2, pipe_t p = PIPE_S> void CrossCoreWaitFlag(uint16_t id, EMU_AT) {
  auto full = [&] {  // a cube core needs the flag of both vector cores
    if (!me().cube) return !me().inbox[id].empty();
    return !me().inbox[id * 3 + 1001].empty() && !me().inbox[id * 3 + 1002].empty();
  };
  while (!full()) { state.at = at; me().waiting = true; emu::yield(); }
  state.at = at;
  auto take = [&](int key) {
    auto& box = me().inbox[key];
    for (auto& c : me().clock) emu::join(c, box.front());
    box.erase(box.begin());
  };
  if (me().cube) { take(id * 3 + 1001); take(id * 3 + 1002); } else take(id);
}
template <class T> void SetAtomicAdd(EMU_AT) {
  state.at = at; static_assert(std::is_same<T, float>::value, "atomic adds of float only"); me().atomic = true;
}
inline void SetAtomicNone() { me().atomic = false; }
}  // namespace AscendC
