// The device that the fake driver says it has: one node's, of NVIDIA's H100 80GB HBM3.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace fake {

constexpr int DEVICES = 8;
constexpr int CUDA_VERSION_SAID = 13000;
constexpr char NAME[] = "NVIDIA H100 80GB HBM3";
constexpr int MAJOR = 9, MINOR = 0;  // compute capability
constexpr int MULTIPROCESSORS = 132;
constexpr int WARP = 32;
constexpr int THREADS_OF_A_BLOCK = 1024;
constexpr int THREADS_OF_A_MULTIPROCESSOR = 2048;
constexpr int BLOCKS_OF_A_MULTIPROCESSOR = 32;
constexpr int REGISTERS = 65536;
constexpr int SHARED_MEMORY = 48 << 10;           // bytes of a block
constexpr int SHARED_MEMORY_AT_MOST = 227 << 10;  // where a kernel asks for more
constexpr int L2_CACHE = 50 << 20;
constexpr int GRID_X = 2147483647, GRID_Y = 65535;
constexpr int HIGHEST_PRIORITY = -5;  // of a stream; the lowest is 0

// Bytes of a device; FAKE_GPU_BYTES in the environment sets another number.
inline size_t capacity() {
  static const size_t bytes = [] {
    const char* said = getenv("FAKE_GPU_BYTES");
    return said ? strtoull(said, nullptr, 10) : 84929347584ull;
  }();
  return bytes;
}

}  // namespace fake
