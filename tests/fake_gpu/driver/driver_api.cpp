// libcuda.so.1, as far as Triton's launchers and torch's compiler ask for it. This library carries
// that name, so who opens libcuda.so.1 gets it.
//
// Without cuda.h: what is not looked at need not be declared, as callers pass it in registers and
// clear their own stack.
#include <cstring>

#include "model.h"
#include "tally.h"

int fake_current_device();

using Result = int;  // CUresult, of which 0 is success

// Succeeds, whatever it is asked.
#define NOTHING(name) \
  EXPORT Result name() { return 0; }
// Gives out a handle through its first argument.
#define HANDLE(name)                \
  EXPORT Result name(void** made) { \
    *made = fake::new_handle();     \
    return 0;                       \
  }
// Launches what was compiled in this process.
#define LAUNCH(name)                     \
  EXPORT Result name() {                 \
    fake::tally("launches");             \
    fake::tally("kernel compiled here"); \
    return 0;                            \
  }
#define WAIT(name)                    \
  EXPORT Result name() {              \
    fake::tally("wait " #name);       \
    return 0;                         \
  }
#define TEXT(name)                                   \
  EXPORT Result name(Result, const char** text) {    \
    *text = "an error of the fake driver";           \
    return 0;                                        \
  }

NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxPushCurrent)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuCtxPopCurrent)
NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
NOTHING(cuDevicePrimaryCtxRelease)
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuMemcpyDtoHAsync)
NOTHING(cuMemcpyDtoHAsync_v2)
NOTHING(cuModuleUnload)
NOTHING(cuPointerGetAttributes)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)

HANDLE(cuCtxGetCurrent)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleGetFunction)
HANDLE(cuModuleLoad)
HANDLE(cuModuleLoadData)
HANDLE(cuModuleLoadDataEx)

LAUNCH(cuLaunchCooperativeKernel)
LAUNCH(cuLaunchKernel)
LAUNCH(cuLaunchKernelEx)

WAIT(cuCtxSynchronize)
WAIT(cuStreamSynchronize)

TEXT(cuGetErrorName)
TEXT(cuGetErrorString)

EXPORT Result cuDriverGetVersion(int* version) {
  *version = fake::CUDA_VERSION_SAID;
  return 0;
}

EXPORT Result cuDeviceGetCount(int* count) {
  *count = fake::DEVICES;
  return 0;
}

EXPORT Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

EXPORT Result cuCtxGetDevice(int* device) {
  *device = fake_current_device();
  return 0;
}

EXPORT Result cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}

EXPORT Result cuDeviceGetName(char* text, int size, int) {
  strncpy(text, fake::NAME, size);
  return 0;
}

// The attributes have the runtime's numbers (cudaDeviceAttr).
extern "C" int cudaDeviceGetAttribute(int* value, int attribute, int device);

EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}

EXPORT Result cuFuncGetAttribute(int* value, int attribute, void*) {
  constexpr int MAX_THREADS_PER_BLOCK = 0, REGISTERS_OF_A_THREAD = 4;
  *value = attribute == MAX_THREADS_PER_BLOCK   ? fake::THREADS_OF_A_BLOCK
           : attribute == REGISTERS_OF_A_THREAD ? 32
                                                : 0;
  return 0;
}

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = 2;
  return 0;
}

EXPORT Result cuOccupancyMaxActiveClusters(int* clusters, void*, const void*) {
  *clusters = 1;
  return 0;
}

EXPORT Result cuPointerGetAttribute(void** value, int, unsigned long long address) {
  *value = reinterpret_cast<void*>(address);
  return 0;
}
