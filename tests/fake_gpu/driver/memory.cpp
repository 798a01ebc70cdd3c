// Device memory is addresses in a span that is reserved and never backed, so that 80 GiB cost
// nothing. Kernels write nothing there. Small copies do write: what a program has put on the device,
// such as lengths and flags, it reads back. All else reads as zeros.
#include "memory.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "model.h"
#include "tally.h"

int fake_current_device();

namespace {

constexpr size_t SPAN = size_t(1) << 43;      // bytes of addresses, for all devices and for good
constexpr size_t KEPT = size_t(1) << 20;      // a copy of more bytes is not made
constexpr size_t GRANULE = size_t(2) << 20;   // CUDA's own for large blocks

struct Block {
  size_t bytes;
  int device;
};

std::mutex lock;
std::map<uintptr_t, Block>& blocks() {
  static auto* made = new std::map<uintptr_t, Block>;
  return *made;
}
std::map<uintptr_t, size_t>& pinned() {
  static auto* made = new std::map<uintptr_t, size_t>;
  return *made;
}
uintptr_t start = 0, next = 0;
size_t used[fake::DEVICES];

bool reserve() {
  if (start) return true;
  void* found = mmap(nullptr, SPAN, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return false;
  start = next = reinterpret_cast<uintptr_t>(found);
  return true;
}

bool is_pinned(const void* address) {
  auto at = reinterpret_cast<uintptr_t>(address);
  auto after = pinned().upper_bound(at);
  if (after == pinned().begin()) return false;
  --after;
  return at < after->first + after->second;
}

cudaError_t copy(void* target, const void* source, size_t bytes) {
  bool to = fake::on_device(target), from = fake::on_device(source);
  fake::tally(to && from ? "copy on device" : to ? "copy to device" : "copy to host");
  if (to || bytes <= KEPT)
    fake::keep(target, source, bytes);
  else if (from)
    memset(target, 0, bytes);
  else
    memcpy(target, source, bytes);
  return cudaSuccess;
}

}  // namespace

namespace fake {

bool on_device(const void* address) {
  auto at = reinterpret_cast<uintptr_t>(address);
  return start && at >= start && at - start < SPAN;
}

void keep(void* target, const void* source, size_t bytes) {
  if (bytes <= KEPT && target != source) memmove(target, source, bytes);
}

}  // namespace fake

EXPORT cudaError_t cudaMalloc(void** address, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  int device = fake_current_device();
  size_t taken = (bytes + GRANULE - 1) / GRANULE * GRANULE;
  if (!reserve() || used[device] + bytes > fake::capacity() || next + taken > start + SPAN)
    return cudaErrorMemoryAllocation;
  *address = reinterpret_cast<void*>(next);
  blocks()[next] = {bytes, device};
  next += taken;
  used[device] += bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = blocks().find(reinterpret_cast<uintptr_t>(address));
  if (block == blocks().end()) return address ? cudaErrorInvalidValue : cudaSuccess;
  madvise(address, block->second.bytes, MADV_DONTNEED);
  used[block->second.device] -= block->second.bytes;
  blocks().erase(block);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}

EXPORT cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> guard(lock);
  *total = fake::capacity();
  *free = *total - used[fake_current_device()];
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*address) return cudaErrorMemoryAllocation;
  std::lock_guard<std::mutex> guard(lock);
  pinned()[reinterpret_cast<uintptr_t>(*address)] = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return cudaHostAlloc(address, bytes, 0);
}

EXPORT cudaError_t cudaHostUnregister(void* address) {
  std::lock_guard<std::mutex> guard(lock);
  pinned().erase(reinterpret_cast<uintptr_t>(address));
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  pinned()[reinterpret_cast<uintptr_t>(address)] = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* address) {
  cudaHostUnregister(address);
  free(address);
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  memset(found, 0, sizeof *found);
  std::lock_guard<std::mutex> guard(lock);
  void* same = const_cast<void*>(address);
  if (fake::on_device(address)) {
    auto block = blocks().upper_bound(reinterpret_cast<uintptr_t>(address));
    found->device = block == blocks().begin() ? 0 : std::prev(block)->second.device;
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = same;
  } else if (is_pinned(address)) {
    found->type = cudaMemoryTypeHost;
    found->hostPointer = found->devicePointer = same;
  } else {
    found->type = cudaMemoryTypeUnregistered;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  fake::tally("wait cudaMemcpy");
  return copy(target, source, bytes);
}

EXPORT cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return copy(target, source, bytes);
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes,
                                       cudaStream_t) {
  return copy(target, source, bytes);
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  std::lock_guard<std::mutex> guard(lock);
  if (!reserve()) return cudaErrorMemoryAllocation;
  *address = reinterpret_cast<void*>(start);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void* address, int byte, size_t bytes) {
  if (bytes <= KEPT) memset(address, byte, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* address, int byte, size_t bytes, cudaStream_t) {
  fake::tally("launches");
  return cudaMemset(address, byte, bytes);
}
