// cuBLAS and cuBLASLt: matrix products are counted, as "gemm", one launch each, and their "flops".
#include <cublasLt.h>
#include <cublas_v2.h>

#include "tally.h"

namespace {

struct Layout {
  uint64_t rows, columns;
  int32_t batch;
};

struct Description {
  cublasOperation_t first;  // whether the first matrix is transposed
};

cublasStatus_t product(double rows, double columns, double inner, double batch = 1) {
  fake::tally("launches");
  fake::tally("gemm");
  fake::tally("flops", 2 * rows * columns * inner * batch);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

#define BLAS(name, ...) EXPORT cublasStatus_t name(__VA_ARGS__)

BLAS(cublasCreate_v2, cublasHandle_t* handle) {
  *handle = static_cast<cublasHandle_t>(fake::new_handle());
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasDestroy_v2, cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }

BLAS(cublasSetStream_v2, cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }

BLAS(cublasSetWorkspace_v2, cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

BLAS(cublasSetMathMode, cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

BLAS(cublasGetMathMode, cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasSetPointerMode_v2, cublasHandle_t, cublasPointerMode_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasGetPointerMode_v2, cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasGemmEx, cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
     const void*, const void*, cudaDataType, int, const void*, cudaDataType, int, const void*,
     void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
  return product(m, n, k);
}

BLAS(cublasGemmStridedBatchedEx, cublasHandle_t, cublasOperation_t, cublasOperation_t, int m,
     int n, int k, const void*, const void*, cudaDataType, int, long long, const void*,
     cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int batch,
     cublasComputeType_t, cublasGemmAlgo_t) {
  return product(m, n, k, batch);
}

BLAS(cublasSgemm_v2, cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
     const float*, const float*, int, const float*, int, const float*, float*, int) {
  return product(m, n, k);
}

BLAS(cublasSgemmStridedBatched, cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
     int k, const float*, const float*, int, long long, const float*, int, long long, const float*,
     float*, int, long long, int batch) {
  return product(m, n, k, batch);
}

BLAS(cublasLtCreate, cublasLtHandle_t* handle) {
  *handle = static_cast<cublasLtHandle_t>(fake::new_handle());
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulDescCreate, cublasLtMatmulDesc_t* description, cublasComputeType_t,
     cudaDataType_t) {
  *description = reinterpret_cast<cublasLtMatmulDesc_t>(new Description{CUBLAS_OP_N});
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulDescDestroy, cublasLtMatmulDesc_t description) {
  delete reinterpret_cast<Description*>(description);
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulDescSetAttribute, cublasLtMatmulDesc_t description,
     cublasLtMatmulDescAttributes_t attribute, const void* value, size_t) {
  if (attribute == CUBLASLT_MATMUL_DESC_TRANSA)
    reinterpret_cast<Description*>(description)->first =
        *static_cast<const cublasOperation_t*>(value);
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreference_t* preference) {
  *preference = static_cast<cublasLtMatmulPreference_t>(fake::new_handle());
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulPreferenceDestroy, cublasLtMatmulPreference_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreference_t,
     cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatrixLayoutCreate, cublasLtMatrixLayout_t* layout, cudaDataType, uint64_t rows,
     uint64_t columns, int64_t) {
  *layout = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{rows, columns, 1});
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatrixLayoutDestroy, cublasLtMatrixLayout_t layout) {
  delete reinterpret_cast<Layout*>(layout);
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayout_t layout,
     cublasLtMatrixLayoutAttribute_t attribute, const void* value, size_t) {
  if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
    reinterpret_cast<Layout*>(layout)->batch = *static_cast<const int32_t*>(value);
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmulAlgoGetHeuristic, cublasLtHandle_t, cublasLtMatmulDesc_t,
     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
     cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int wanted,
     cublasLtMatmulHeuristicResult_t* results, int* found) {
  for (int i = 0; i < wanted; i++) results[i] = {};
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

BLAS(cublasLtMatmul, cublasLtHandle_t, cublasLtMatmulDesc_t description, const void*, const void*,
     cublasLtMatrixLayout_t a, const void*, cublasLtMatrixLayout_t, const void*, const void*,
     cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t*, void*,
     size_t, cudaStream_t) {
  const auto* first = reinterpret_cast<const Layout*>(a);
  const auto* result = reinterpret_cast<const Layout*>(d);
  bool transposed = reinterpret_cast<Description*>(description)->first != CUBLAS_OP_N;
  double inner = transposed ? first->rows : first->columns;
  return product(result->rows, result->columns, inner, result->batch);
}
