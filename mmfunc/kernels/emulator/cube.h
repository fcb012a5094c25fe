// The cube unit of the emulated Ascend C API: fractal layouts, products, and the way back to global memory.
//
// A fractal is 16 rows of 32 bytes. L1 holds NZ: fractals in column order, each row-major. L0A holds ZZ: fractals in
// row order, each row-major. L0B holds ZN: fractals in row order (rows are k), each column-major. L0C holds NZ.
#pragma once
#include "vector.h"

namespace AscendC {
struct Nd2NzParams {
  uint16_t ndNum = 1, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0, dstNzNStride = 1,
           dstNzMatrixStride = 1;
};
// Row-major global memory to NZ in L1, the last dimension padded with zeros to 32 bytes.
template <class T> void DataCopy(const LocalTensor<T>& d, const GlobalTensor<T>& s, const Nd2NzParams& n, EMU_AT) {
  state.at = at; d.aligned();
  EMU_CHECK(d.where == emu::L1, "Nd2Nz goes to L1");
  EMU_CHECK(n.ndNum == 1 && n.dstNzNStride == 1, "the emulator copies one matrix, rows next to each other");
  EMU_CHECK(n.nValue >= 1 && n.nValue <= 16384 && n.dValue >= 1 && n.srcDValue >= n.dValue && n.dstNzC0Stride >= n.nValue,
            "Nd2Nz: %d rows of %d in rows of %d to a stride of %d", n.nValue, n.dValue, n.srcDValue, n.dstNzC0Stride);
  transfer(PIPE_MTE2, double(n.nValue) * n.dValue * sizeof(T), n.srcDValue == n.dValue ? 1 : n.nValue / 16.0 + 1);
  constexpr int C0 = 32 / sizeof(T);
  for (int i = 0; i < n.nValue; i++) {
    const T* row = s.data + uint64_t(i) * n.srcDValue;
    emu::global(row, n.dValue * sizeof(T), PIPE_MTE2, false);
    for (int j = 0; j < n.dValue; j += C0) {
      T* z = d.access((uint64_t(j / C0) * n.dstNzC0Stride + i) * C0, C0, PIPE_MTE2, true);
      int w = std::min(C0, n.dValue - j);
      memcpy(z, row + j, w * sizeof(T)); std::fill(z + w, z + C0, T(0.f));
    }
  }
}

template <class T> struct InitConstValueParams { uint16_t repeatTimes = 1, blockNum = 0, dstGap = 0; T initValue = T(0.f); };
template <class T> void InitConstValue(const LocalTensor<T>& d, const InitConstValueParams<T>& p, EMU_AT) {
  state.at = at; d.aligned(); EMU_CHECK(d.where == emu::L1, "the emulator fills L1 only");
  EMU_CHECK(p.repeatTimes <= 32767 && p.blockNum >= 1 && p.blockNum <= 32767, "InitConstValue of %d blocks", p.blockNum);
  constexpr int C0 = 32 / sizeof(T);
  emu::instruction(PIPE_MTE2, emu::rate::DMA_START + p.repeatTimes * p.blockNum * 32.0 / emu::rate::LOAD);
  for (int r = 0; r < p.repeatTimes; r++) {
    T* z = d.access(uint64_t(r) * (p.blockNum + p.dstGap) * C0, p.blockNum * C0, PIPE_MTE2, true);
    std::fill(z, z + p.blockNum * C0, p.initValue);
  }
}

struct LoadData2DParams {
  uint16_t startIndex = 0; uint8_t repeatTimes = 0; uint16_t srcStride = 0; uint8_t sid = 0; uint16_t dstGap = 0;
  bool ifTranspose = false; uint8_t addrMode = 0;
};
// Fractals of 512 bytes from L1 to L0A or L0B: srcStride from start to start, dstGap from end to start.
template <class T> void LoadData(const LocalTensor<T>& d, const LocalTensor<T>& s, const LoadData2DParams& p, EMU_AT) {
  state.at = at;
  static_assert(sizeof(T) == 2, "the emulator loads fractals of b16");
  EMU_CHECK(s.where == emu::L1 && (d.where == emu::L0A || d.where == emu::L0B), "LoadData goes from L1 to L0A or L0B");
  EMU_CHECK(p.repeatTimes >= 1, "LoadData: repeatTimes %d is not 1 to 255", p.repeatTimes);
  d.aligned(512); s.aligned();
  emu::instruction(PIPE_MTE1, emu::rate::ISSUE + p.repeatTimes * 512 / emu::rate::LOAD, p.repeatTimes * 512);
  for (int r = 0; r < p.repeatTimes; r++) {
    const T* x = s.access((uint64_t(p.startIndex) + r * uint64_t(p.srcStride)) * 256, 256, PIPE_MTE1, false);
    T* z = d.access(uint64_t(r) * (p.dstGap + 1) * 256, 256, PIPE_MTE1, true);
    if (!p.ifTranspose) memcpy(z, x, 512);
    else for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) z[j * 16 + i] = x[i * 16 + j];
  }
}

struct MmadParams {
  uint16_t m = 0, n = 0, k = 0; bool isBias = false; int32_t fmOffset = 0; bool enSsparse = false, enWinogradA = false,
           enWinogradB = false; uint8_t unitFlag = 0; bool cmatrixInitVal = true, cmatrixSource = false;
};
// c [m, n] (+)= a [m, k] b [k, n]; fractals are read whole, so what pads k must be zero and may not be unknown.
template <class T> void Mmad(const LocalTensor<float>& c, const LocalTensor<T>& a, const LocalTensor<T>& b,
                             const MmadParams& p, EMU_AT) {
  state.at = at;
  EMU_CHECK(a.where == emu::L0A && b.where == emu::L0B && c.where == emu::L0C, "Mmad takes L0A and L0B to L0C");
  EMU_CHECK(p.m >= 1 && p.n >= 1 && p.k >= 1 && p.m <= 4095 && p.n <= 4095 && p.k <= 4095, "Mmad of %d, %d, %d", p.m, p.n, p.k);
  a.aligned(512); b.aligned(512); c.aligned(64);
  int M = (p.m + 15) / 16, N = (p.n + 15) / 16, K = (p.k + 15) / 16;
  emu::instruction(PIPE_M, emu::rate::CUBE_START + double(M) * N * K, 2.0 * p.m * p.n * p.k);
  static thread_local std::vector<float> x, y, z; x.assign(M * 16 * K * 16, 0); y.resize(N * 16 * K * 16); z.assign(N * 16, 0);
  for (int i = 0; i < M; i++) for (int k = 0; k < K; k++) {
    int rows = std::min(16, p.m - i * 16);
    const T* f = a.access((uint64_t(i) * K + k) * 256, rows * 16, PIPE_M, false);
    for (int r = 0; r < rows; r++) for (int q = 0; q < 16; q++) x[((i * 16 + r) * K + k) * 16 + q] = float(f[r * 16 + q]);
  }
  for (int k = 0; k < K; k++) for (int j = 0; j < N; j++) {
    int columns = std::min(16, p.n - j * 16);
    const T* f = b.access((uint64_t(k) * N + j) * 256, columns * 16, PIPE_M, false);
    for (int q = 0; q < columns; q++) for (int r = 0; r < 16; r++) y[((k * 16 + r) * N + j) * 16 + q] = float(f[q * 16 + r]);
  }
  for (int j = 0; j < N; j++) for (int i = 0; i < M; i++) {
    uint64_t o = (uint64_t(j) * M + i) * 256; int n = std::min(16, p.m - i * 16) * 16;
    if (!p.cmatrixInitVal) c.access(o, n, PIPE_M, false);
    c.access(o, n, PIPE_M, true);
  }
  float* out = c.data();
  for (int i = 0; i < p.m; i++) {
    auto at_c = [&](int j) { return out + (uint64_t(j) * M + i / 16) * 256 + i % 16 * 16; };
    for (int j = 0; j < N; j++) {
      if (p.cmatrixInitVal) std::fill(&z[j * 16], &z[j * 16] + 16, 0.f); else memcpy(&z[j * 16], at_c(j), 64);
    }
    for (int k = 0; k < K * 16; k++) {
      float v = x[i * K * 16 + k]; const float* w = &y[size_t(k) * N * 16]; float* acc = z.data();
      for (int j = 0; j < N * 16; j++) acc[j] += v * w[j];
    }
    for (int j = 0; j < N; j++) memcpy(at_c(j), &z[j * 16], 64);
  }
}

enum QuantMode_t { NoQuant, F322F16, F322BF16 };
struct FixpipeParamsV220 {
  uint16_t nSize = 0, mSize = 0, srcStride = 0; uint32_t dstStride = 0; QuantMode_t quantPre = NoQuant;
  uint64_t deqScalar = 0; uint16_t ndNum = 1, srcNdStride = 0, dstNdStride = 0; bool reluEn = false; uint8_t unitFlag = 0;
};
// NZ in L0C to row-major global memory (the default configuration, CFG_ROW_MAJOR).
template <class D> void Fixpipe(const GlobalTensor<D>& d, const LocalTensor<float>& s, const FixpipeParamsV220& p, EMU_AT) {
  state.at = at;
  EMU_CHECK(s.where == emu::L0C, "Fixpipe takes L0C"); s.aligned(64);
  EMU_CHECK(p.nSize >= 1 && p.nSize <= 4095 && p.mSize >= 1 && p.mSize <= 8192, "Fixpipe of %d x %d", p.mSize, p.nSize);
  EMU_CHECK(p.srcStride % 16 == 0 && p.srcStride >= p.mSize, "Fixpipe: source stride %d for %d rows", p.srcStride, p.mSize);
  EMU_CHECK(p.dstStride >= p.nSize, "Fixpipe: rows of %d in a stride of %u overlap", p.nSize, p.dstStride);
  constexpr QuantMode_t mode = std::is_same<D, half>::value ? F322F16 : std::is_same<D, bfloat16_t>::value ? F322BF16 : NoQuant;
  EMU_CHECK(p.quantPre == mode, "Fixpipe: quantPre does not fit the type of the destination");
  transfer(PIPE_FIX, double(p.mSize) * p.nSize * sizeof(D), 1);
  std::vector<D> row(p.nSize);
  for (int i = 0; i < p.mSize; i++) {
    for (int j = 0; j < p.nSize; j += 16) {
      int w = std::min(16, p.nSize - j);
      const float* x = s.access((uint64_t(j / 16) * p.srcStride + i) * 16, w, PIPE_FIX, false);
      for (int k = 0; k < w; k++) row[j + k] = D(x[k]);
    }
    D* to = d.data + uint64_t(i) * p.dstStride;
    emu::global(to, p.nSize * sizeof(D), PIPE_FIX, true); write_out(to, row.data(), p.nSize);
  }
}
}  // namespace AscendC
