// NCCL of a rank whose peers are not there. Calls are counted as "nccl <call> <ranks>" and their
// bytes as "bytes <call> <ranks>". What is small is passed on, as if every rank had this one's: sums
// are its own share, and gathers are so many copies of it.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstring>

#include "memory.h"
#include "tally.h"

struct ncclComm {
  int ranks, rank;
};

namespace {

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 4;
  }
}

ncclResult_t open(ncclComm_t* group, int ranks, int rank) {
  *group = new ncclComm{ranks, rank};
  return ncclSuccess;
}

ncclResult_t counted(const char* call, size_t bytes, ncclComm_t group) {
  std::string name = std::string(" ") + call + " " + std::to_string(group->ranks);
  fake::tally("nccl" + name);
  fake::tally("bytes" + name, bytes);
  return ncclSuccess;
}

}  // namespace

#define NCCL(name, ...) EXPORT ncclResult_t name(__VA_ARGS__)

NCCL(ncclGetUniqueId, ncclUniqueId* id) {
  memset(id, 7, sizeof *id);
  return ncclSuccess;
}

NCCL(ncclCommInitRank, ncclComm_t* group, int ranks, ncclUniqueId, int rank) {
  return open(group, ranks, rank);
}

NCCL(ncclCommInitRankConfig, ncclComm_t* group, int ranks, ncclUniqueId, int rank, ncclConfig_t*) {
  return open(group, ranks, rank);
}

NCCL(ncclCommInitRankScalable, ncclComm_t* group, int ranks, int rank, int, ncclUniqueId*,
     ncclConfig_t*) {
  return open(group, ranks, rank);
}

NCCL(ncclCommCount, const ncclComm_t group, int* ranks) {
  *ranks = group->ranks;
  return ncclSuccess;
}

NCCL(ncclCommUserRank, const ncclComm_t group, int* rank) {
  *rank = group->rank;
  return ncclSuccess;
}

// Never freed: work in flight may still name it.
NCCL(ncclCommDestroy, ncclComm_t) { return ncclSuccess; }

NCCL(ncclCommAbort, ncclComm_t) { return ncclSuccess; }

NCCL(ncclCommFinalize, ncclComm_t) { return ncclSuccess; }

NCCL(ncclCommGetAsyncError, ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

NCCL(ncclCommRegister, const ncclComm_t, void*, size_t, void** handle) {
  *handle = fake::new_handle();
  return ncclSuccess;
}

NCCL(ncclCommDeregister, const ncclComm_t, void*) { return ncclSuccess; }

NCCL(ncclGroupStart) { return ncclSuccess; }

NCCL(ncclGroupEnd) { return ncclSuccess; }

NCCL(ncclAllReduce, const void* source, void* target, size_t count, ncclDataType_t type,
     ncclRedOp_t, ncclComm_t group, cudaStream_t) {
  size_t bytes = count * width(type);
  fake::keep(target, source, bytes);
  return counted("all_reduce", bytes, group);
}

NCCL(ncclBroadcast, const void* source, void* target, size_t count, ncclDataType_t type, int,
     ncclComm_t group, cudaStream_t) {
  size_t bytes = count * width(type);
  fake::keep(target, source, bytes);
  return counted("broadcast", bytes, group);
}

NCCL(ncclBcast, void*, size_t count, ncclDataType_t type, int, ncclComm_t group, cudaStream_t) {
  return counted("broadcast", count * width(type), group);
}

NCCL(ncclReduce, const void*, void*, size_t count, ncclDataType_t type, ncclRedOp_t, int,
     ncclComm_t group, cudaStream_t) {
  return counted("reduce", count * width(type), group);
}

NCCL(ncclAllGather, const void* source, void* target, size_t count, ncclDataType_t type,
     ncclComm_t group, cudaStream_t) {
  size_t bytes = count * width(type);
  for (int rank = 0; rank < group->ranks; rank++)
    fake::keep(static_cast<char*>(target) + rank * bytes, source, bytes);
  return counted("all_gather", bytes * group->ranks, group);
}

NCCL(ncclReduceScatter, const void*, void*, size_t count, ncclDataType_t type, ncclRedOp_t,
     ncclComm_t group, cudaStream_t) {
  return counted("reduce_scatter", count * width(type) * group->ranks, group);
}

NCCL(ncclSend, const void*, size_t count, ncclDataType_t type, int, ncclComm_t group,
     cudaStream_t) {
  return counted("send", count * width(type), group);
}

NCCL(ncclRecv, void*, size_t count, ncclDataType_t type, int, ncclComm_t group, cudaStream_t) {
  return counted("recv", count * width(type), group);
}
