// The part of CANN's runtime that has to answer when torch_npu starts: one device, whose memory is the host's.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
thread_local int device = 0;
char context[64], stream[64], event[64], model[64];

int take(void** p, size_t n) {
    *p = std::aligned_alloc(512, (n + 1023) / 512 * 512);  // some callers write a whole block past the end
    return *p ? 0 : 1;
}
}  // namespace

#pragma GCC visibility push(default)
extern "C" {
int aclrtGetDeviceCount(uint32_t* n) { *n = 1; return 0; }
int aclrtSetDevice(int d) { device = d; return 0; }
int aclrtGetDevice(int* d) { *d = device; return 0; }
const char* aclrtGetSocName() { return "Ascend910B1"; }
const char* aclGetRecentErrMsg() { return "this is a stand-in for CANN"; }
int aclGetDeviceCapability(uint32_t, int, int64_t* v) { *v = 20; return 0; }
int aclrtDeviceCanAccessPeer(int* can, int, int) { *can = 1; return 0; }

int aclrtMalloc(void** p, size_t n, int) { return take(p, n); }
int aclrtMallocAlign32(void** p, size_t n, int) { return take(p, n); }
int aclrtMallocHost(void** p, size_t n) { return take(p, n); }
int aclrtFree(void* p) { std::free(p); return 0; }
int aclrtFreeHost(void* p) { std::free(p); return 0; }
int aclrtMemcpy(void* to, size_t, const void* from, size_t n, int) { std::memcpy(to, from, n); return 0; }
int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t n, int, void*) { std::memcpy(to, from, n); return 0; }
int aclrtMemset(void* to, size_t, int v, size_t n) { std::memset(to, v, n); return 0; }
int aclrtGetMemInfo(int, size_t* free, size_t* all) { *free = 48ull << 30; *all = 64ull << 30; return 0; }

int aclrtGetCurrentContext(void** c) { *c = context; return 0; }
int aclrtCreateStream(void** s) { *s = stream; return 0; }
int aclrtCreateStreamWithConfig(void** s, uint32_t, uint32_t) { *s = stream; return 0; }
int aclrtCreateEventExWithFlag(void** e, uint32_t) { *e = event; return 0; }
int aclrtEventElapsedTime(float* ms, void*, void*) { *ms = 0; return 0; }
uint64_t MsprofSysCycleTime() { static uint64_t t = 0; return ++t; }

size_t aclGetCompileoptSize(int) { return 16; }
int aclGetCompileopt(int, char* v, size_t n) { std::strncpy(v, "0", n); return 0; }
int aclrtGetSysParamOpt(int, int64_t* v) { *v = 0; return 0; }
int aclrtCtxGetSysParamOpt(int, int64_t* v) { *v = 0; return 0; }
int aclmdlRICaptureGetInfo(void*, int* state, void** m) { *state = 0; if (m) *m = model; return 0; }
int aclmdlRICaptureEnd(void*, void** m) { *m = model; return 0; }

int vsnprintf_s(char* to, size_t n, size_t, const char* format, va_list a) { return std::vsnprintf(to, n, format, a); }
int snprintf_s(char* to, size_t n, size_t, const char* format, ...) {
    va_list a;
    va_start(a, format);
    int written = std::vsnprintf(to, n, format, a);
    va_end(a);
    return written;
}
int strcpy_s(char* to, size_t n, const char* from) { std::strncpy(to, from, n); return 0; }
}
#pragma GCC visibility pop
