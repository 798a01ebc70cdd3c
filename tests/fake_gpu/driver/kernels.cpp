// Kernels: libraries register them when they are loaded, and launches are counted by name, in all as
// "launches" and each as "kernel <its mangled name>".
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "model.h"
#include "tally.h"

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

thread_local Configuration configuration;
std::mutex& lock() {
  static auto* made = new std::mutex;
  return *made;
}
// By the address of the host's function; the names lie in the libraries that register them.
std::unordered_map<const void*, const char*>& names() {
  static auto* made = new std::unordered_map<const void*, const char*>;
  return *made;
}

cudaError_t launch(const void* function) {
  const char* name = "unregistered";
  {
    std::lock_guard<std::mutex> guard(lock());
    auto found = names().find(function);
    if (found != names().end()) name = found->second;
  }
  fake::tally("launches");
  fake::tally(std::string("kernel ") + name);
  return cudaSuccess;
}

}  // namespace

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

EXPORT void __cudaUnregisterFatBinary(void**) {}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                   uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> guard(lock());
  names()[function] = name;
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                              void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t,
                                      cudaStream_t) {
  return launch(kernel);
}

EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t,
                                    cudaStream_t) {
  return launch(function);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) {
  return launch(function);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t,
                                               cudaStream_t) {
  return launch(function);
}

EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = fake::THREADS_OF_A_BLOCK;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 10 * fake::MAJOR + fake::MINOR;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                          int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*,
                                                        const cudaLaunchConfig_t*) {
  *size = 8;
  return cudaSuccess;
}
