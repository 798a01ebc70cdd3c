// Devices, streams and events. Everything asked for is done at once, so nothing is ever waited for;
// calls that would make the host wait for the device are counted as "wait <function>".
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "model.h"
#include "tally.h"

static thread_local int current = 0;

int fake_current_device() { return current; }

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake::DEVICES;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fake::DEVICES) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake::CUDA_VERSION_SAID;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, fake::NAME);
  found->major = fake::MAJOR;
  found->minor = fake::MINOR;
  found->totalGlobalMem = fake::capacity();
  found->multiProcessorCount = fake::MULTIPROCESSORS;
  found->warpSize = fake::WARP;
  found->maxThreadsPerBlock = fake::THREADS_OF_A_BLOCK;
  found->maxThreadsPerMultiProcessor = fake::THREADS_OF_A_MULTIPROCESSOR;
  found->maxBlocksPerMultiProcessor = fake::BLOCKS_OF_A_MULTIPROCESSOR;
  found->regsPerBlock = found->regsPerMultiprocessor = fake::REGISTERS;
  found->sharedMemPerBlock = fake::SHARED_MEMORY;
  found->sharedMemPerBlockOptin = fake::SHARED_MEMORY_AT_MOST;
  found->sharedMemPerMultiprocessor = fake::SHARED_MEMORY_AT_MOST + 1024;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = fake::THREADS_OF_A_BLOCK;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = fake::GRID_X;
  found->maxGridSize[1] = found->maxGridSize[2] = fake::GRID_Y;
  found->l2CacheSize = fake::L2_CACHE;
  found->unifiedAddressing = found->canMapHostMemory = found->concurrentKernels = 1;
  found->asyncEngineCount = 3;
  found->textureAlignment = 512;
  found->memoryBusWidth = 5120;
  found->pciBusID = device;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = [attribute] {
    switch (attribute) {
      case cudaDevAttrComputeCapabilityMajor: return fake::MAJOR;
      case cudaDevAttrComputeCapabilityMinor: return fake::MINOR;
      case cudaDevAttrMultiProcessorCount: return fake::MULTIPROCESSORS;
      case cudaDevAttrWarpSize: return fake::WARP;
      case cudaDevAttrMaxThreadsPerBlock: return fake::THREADS_OF_A_BLOCK;
      case cudaDevAttrMaxThreadsPerMultiProcessor: return fake::THREADS_OF_A_MULTIPROCESSOR;
      case cudaDevAttrMaxBlocksPerMultiprocessor: return fake::BLOCKS_OF_A_MULTIPROCESSOR;
      case cudaDevAttrMaxRegistersPerBlock: return fake::REGISTERS;
      case cudaDevAttrMaxSharedMemoryPerBlock: return fake::SHARED_MEMORY;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: return fake::SHARED_MEMORY_AT_MOST;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return fake::SHARED_MEMORY_AT_MOST + 1024;
      case cudaDevAttrL2CacheSize: return fake::L2_CACHE;
      case cudaDevAttrMaxGridDimX: return fake::GRID_X;
      case cudaDevAttrMaxGridDimY:
      case cudaDevAttrMaxGridDimZ: return fake::GRID_Y;
      default: return 0;
    }
  }();
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

EXPORT cudaError_t cudaGetLastError() { return cudaSuccess; }

EXPORT cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

EXPORT cudaError_t cudaDeviceSynchronize() {
  fake::tally("wait cudaDeviceSynchronize");
  return cudaSuccess;
}

static int nothing() { return 0; }

// torch looks for the driver's functions here. What driver_api.cpp lacks, nobody here calls.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = dlsym(RTLD_DEFAULT, symbol);
  if (!*found) *found = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Streams.

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = fake::HIGHEST_PRIORITY;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = static_cast<cudaStream_t>(fake::new_handle());
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) {
  fake::tally("wait cudaStreamSynchronize");
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t*,
                                            const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                            size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

// Events.

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = static_cast<cudaEvent_t>(fake::new_handle());
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

EXPORT cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) {
  fake::tally("wait cudaEventSynchronize");
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
